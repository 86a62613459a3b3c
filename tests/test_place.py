"""From one place away to another: the same bits as by way of the weights, and home again."""

import pytest
import torch

from flatmin.noise import Noise
from flatmin.place import Place
from flatmin.radii import Radii
from flatmin.vectors import Vector


def _noise(params, radii=(0.1, 0.1, 0.1), **options):
    return Noise(params, Radii(radii), "normal", 7, **options)


DISPLACEMENTS = {
    "a vector": lambda params: Vector([torch.full_like(p, 0.3) for p in params]),
    "a vector with a gap": lambda params: Vector([torch.full_like(params[0], 0.3), None, torch.ones_like(params[2])]),
    "noise": _noise,
    "noise drawn again": lambda params: _noise(params, keep=False),
    "noise on some": lambda params: _noise(params, (0.1, 0.0, 0.2)),
    "noise of several sizes": lambda params: _noise(params, (0.1, 0.3, 0.2)),
}


@pytest.mark.parametrize("make", DISPLACEMENTS.values(), ids=DISPLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_to_the_other_side(make, dtype):
    torch.manual_seed(0)
    params = [torch.randn(shape).to(dtype).requires_grad_() for shape in [(3, 4), (4,), (5, 2)]]
    before, pointers = [p.detach().clone() for p in params], [p.data_ptr() for p in params]
    u = make(params)
    expected = [p.clone() for p in before]
    (-u).add_to(expected)

    place = Place(params)
    place.move(u)
    assert any(not torch.equal(p, b) for p, b in zip(params, before, strict=True))
    place.move(-u)
    for p, e in zip(params, expected, strict=True):
        assert torch.equal(p, e)
    place.home()
    for p, b in zip(params, before, strict=True):
        assert torch.equal(p, b)
    assert [p.data_ptr() for p in params] == pointers


def test_to_a_place_where_others_are_moved():
    params = [torch.zeros(2), torch.zeros(3)]
    place = Place(params)
    place.move(Vector([torch.ones(2), None]))
    place.move(Vector([torch.ones(2) * 2, torch.ones(3)]))
    assert torch.equal(torch.cat(params), torch.tensor([2.0, 2, 1, 1, 1]))
    place.move(Vector([None, torch.ones(3)]))
    assert torch.equal(torch.cat(params), torch.tensor([0.0, 0, 1, 1, 1]))
    place.move(Vector([torch.ones(2), torch.ones(3)]))
    place.move(Vector([torch.ones(2) * 2, torch.ones(3)]))
    assert torch.equal(torch.cat(params), torch.tensor([2.0, 2, 1, 1, 1]))
    place.home()
    assert torch.equal(torch.cat(params), torch.zeros(5))
