"""Vector and Radii against the same arithmetic on one concatenated float64 vector."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flatmin
from flatmin.radii import Radii, check_radius
from flatmin.vectors import Vector


@st.composite
def vectors(draw, count=1):
    shapes = draw(st.lists(st.sampled_from([(), (1,), (3,), (2, 3)]), min_size=1, max_size=4))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        present = draw(st.lists(st.booleans(), min_size=len(shapes), max_size=len(shapes)))
        made.append(
            Vector(
                torch.randn(shape, generator=generator, dtype=torch.float64) if here else None
                for shape, here in zip(shapes, present, strict=True)
            )
        )
    return made, shapes


def flat(vector: Vector, shapes) -> torch.Tensor:
    parts = [
        torch.zeros(shape, dtype=torch.float64) if t is None else t
        for t, shape in zip(vector.tensors, shapes, strict=True)
    ]
    return torch.cat([t.flatten() for t in parts])


def test_the_unit_vector():
    v = Vector([torch.tensor([3.0, 0.0]), None, torch.tensor(-4.0)]).unit()
    assert v.support == [0, 2]
    assert torch.cat([t.flatten() for t in v.present]).tolist() == pytest.approx([0.6, 0.0, -0.8])
    assert Vector([torch.zeros(3)]).unit().present[0].tolist() == [0.0] * 3
    assert Radii([0.3, 0.0, 2.0]).ones.values == (1.0, 0.0, 1.0)


def test_a_constant_factor_is_where_the_norm_is():
    gradient = Vector([torch.tensor([1.0, -2.0], dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16)])
    with torch.device("meta"):  # a device that nothing may be made on
        step = Radii([0.5, 0.25]).ascent(gradient, lambda _: 3.0)
    assert [t.tolist() for t in step.vector.present] == [[1.5, -3.0], [0.75]]


def test_vectors_of_different_spaces_are_refused():
    short, long = (flatmin.Vector(torch.ones(n) for n in sizes) for sizes in ([2], [2, 3]))
    for act in (lambda: short + long, lambda: short.dot(long), lambda: long.times(short), lambda: long.add_(short)):
        with pytest.raises(ValueError, match=r"vectors of different spaces: (1|2) entries against (1|2)"):
            act()


@given(vectors(2), st.floats(-3, 3))
@settings(deadline=None, max_examples=60)
def test_arithmetic_is_that_of_one_long_vector(made, c):
    (a, b), shapes = made
    x, y = flat(a, shapes), flat(b, shapes)
    close = torch.testing.assert_close
    close(flat(a + b, shapes), x + y)
    close(flat(a - b, shapes), x - y)
    close(flat(-a, shapes), -x)
    close(flat(c * a, shapes), c * x)
    close(flat(a * torch.tensor(c, dtype=torch.float64), shapes), c * x)
    close(a.dot(b).double(), x @ y)
    close(a.norm().double(), x.norm())


@given(vectors(1), st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=4, max_size=4))
@settings(deadline=None, max_examples=60)
def test_radii_scale_the_moved_entries_and_the_norm_is_over_them_only(made, values):
    (v,), shapes = made
    radii = Radii(values[: len(shapes)])
    moved = radii.select(v)
    assert all(t is None for t, r in zip(moved.tensors, radii.values, strict=True) if r == 0)
    norm = flat(moved, shapes).norm()
    along = radii.along(v)
    for t, a, r in zip(v.tensors, along.tensors, radii.values, strict=True):
        if t is not None and r > 0:
            assert a is not None
            torch.testing.assert_close(a, r * t / norm)
        else:
            assert a is None


def test_the_zero_vector_stays_zero():
    along = Radii([1.0]).along(Vector([torch.zeros(3)]))
    assert torch.equal(along.present[0], torch.zeros(3))


def test_a_tiny_vector_still_has_its_direction():
    along = Radii([1.0]).along(Vector([torch.tensor([3e-15, 4e-15])]))
    torch.testing.assert_close(along.present[0], torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_norms_are_taken_in_single_precision(dtype):
    v = Vector([torch.full((4096,), 1.0, dtype=dtype), torch.full((4096,), 1.0, dtype=dtype)])
    assert v.norm().dtype == torch.float32
    assert v.norm() == 8192**0.5
    assert v.dot(v) == 8192
    assert (v * v.norm()).present[0].dtype == dtype


def test_sparse_entries():
    dense = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    v = Vector([dense.to_sparse(1), torch.ones(2)])
    torch.testing.assert_close(v.norm(), torch.tensor(27.0).sqrt())
    params = [torch.zeros(3, 2), torch.zeros(2)]
    Radii([2.0, 2.0]).along(v).add_to(params)
    torch.testing.assert_close(params[0], 2 * dense / 27**0.5)


def test_the_empty_vector():
    v = Vector([None, None])
    assert v.norm() == 0
    assert v.dot(v) == 0
    v.add_to([torch.zeros(1), torch.zeros(1)])
    assert (v + Vector([torch.ones(1), None])).present == [torch.ones(1)]


def test_adding_in_place():
    params = [torch.ones(2), torch.zeros(2)]
    Vector([torch.ones(2), None]).add_to(params, sign=-3.0)
    assert torch.equal(params[0], torch.full((2,), -2.0))
    total = Vector([torch.ones(2), None]).add_(Vector([torch.ones(2), torch.ones(2)]))
    assert torch.equal(torch.cat(total.present), torch.tensor([2.0, 2, 1, 1]))


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "1", None])
def test_a_bad_radius_is_named(value):
    with pytest.raises(ValueError, match="sigma must be a finite number >= 0"):
        check_radius("sigma", value)


def test_the_norm_of_complex_beside_real_entries_is_real():
    v = Vector([torch.tensor([3.0 + 4.0j]), torch.tensor([12.0])])
    assert v.norm() == 13.0
    assert v.norm().dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 3])
def test_whether_entries_are_finite_and_left_as_they_are(dtype, bad, at):
    info = torch.finfo(dtype)
    odd = torch.tensor([info.max, info.min, info.tiny / 4, -0.0, 0.0], dtype=dtype)
    tensors = [torch.randn(7).to(dtype), odd, torch.zeros(0, dtype=dtype), torch.tensor(-1.5, dtype=dtype)]
    if bad is not None:
        tensors[at].view(-1)[0] = bad
    before = [t.clone() for t in tensors]
    assert Vector(tensors).isfinite_() == Vector(tensors).isfinite() == (bad is None)
    if bad is None:
        for t, b in zip(tensors, before, strict=True):
            assert torch.equal(t.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


def test_whether_odd_entries_are_finite():
    grown = torch.randn(3, requires_grad=True)
    odd = [torch.randn(4, 1).expand(4, 3), torch.randn(6, 4).t()[::2], torch.randn(2, dtype=torch.cfloat), grown]
    for t in odd:
        assert Vector([t]).isfinite_()
        assert not Vector([t, torch.tensor([math.inf])]).isfinite_()
    assert grown._version == 0
    assert Vector([]).isfinite_()
    assert Vector([None, torch.randn(2).double(), torch.randn(2).bfloat16()]).isfinite_()


def test_a_vector_that_the_kernel_refuses_half_way_says_nothing_of_the_next():
    refused = Vector([torch.tensor([math.inf]), torch.randn(4, 1).expand(4, 3)])
    assert not refused.isfinite_()
    assert Vector([torch.ones(3)]).isfinite_()


def test_flags_that_a_thread_makes_in_inference_mode_serve_outside():
    with ThreadPoolExecutor(1) as thread:

        def first() -> bool:
            with torch.inference_mode():
                return Vector([torch.ones(3)]).isfinite_()

        assert thread.submit(first).result()
        assert not thread.submit(lambda: Vector([torch.tensor([math.nan])]).isfinite_()).result()
        assert thread.submit(lambda: Vector([torch.ones(3)]).isfinite_()).result()


@pytest.mark.parametrize("size", [1e-40, 1e-23, 1e-18, 1.0, 1e19, 3e37])
def test_norms_of_tiny_and_huge_entries_do_not_leave_the_range_of_fp32(size):
    vector = Vector([torch.tensor([3.0 * size, 0.0]), torch.zeros(0), torch.tensor(4.0 * size)])
    assert vector.size() == pytest.approx(5 * size, rel=1e-4)
    assert vector.isfinite()
    for bad in (math.inf, math.nan):
        assert not math.isfinite(Vector([torch.tensor([size, bad]), torch.tensor([size])]).size())
    assert Vector([torch.zeros(2)]).size() == 0.0


@pytest.mark.parametrize("missing", [None, torch.zeros(2).to_sparse()])
def test_so_do_norms_of_vectors_that_lack_an_entry(missing):
    assert Vector([torch.full((4,), 1e-30), missing]).size() == pytest.approx(2e-30)
    assert Vector([torch.full((4,), 1e30), missing]).size() == pytest.approx(2e30)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_factor_is_not_rounded_to_the_width_of_another_entry(dtypes):
    v = Vector(torch.ones(3, dtype=dtype) for dtype in dtypes)
    for found in (v * (1 / 3)).tensors:
        assert found is not None
        assert (found == torch.tensor(1 / 3, dtype=found.dtype)).all()


def test_a_factor_first_used_in_inference_mode_serves_outside():
    with torch.inference_mode():
        _ = Vector([torch.ones(2)]) * 0.8125
    weight = torch.ones(2, requires_grad=True)
    (Vector([weight]) * 0.8125).tensors[0].sum().backward()  # type: ignore[union-attr]
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.8125, 0.8125]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-44, 1e-41, 1e-38, 1e-30, 1e-3])
@pytest.mark.parametrize("rho", [0.05, 50.0])
def test_a_step_along_a_tiny_gradient_has_its_radius(dtype, size, rho):
    """rho / |g| is beyond fp32 where |g| is a denormal number, as that of a sample that is fitted perfectly."""
    g = Vector(
        [torch.tensor([3.0, 0.0], dtype=torch.float64).mul(size).to(dtype), torch.tensor([4.0 * size], dtype=dtype)]
    )
    params = [torch.zeros(2, dtype=dtype), torch.zeros(1, dtype=dtype)]
    step = Radii([rho, rho]).ascent(g)
    step.add_to(params)
    moved = torch.cat(params).double()
    exact = torch.cat([t.double() for t in g.present])
    # Of the entries as they are, which are rounded where they are denormal.
    assert torch.allclose(moved, rho * exact / exact.norm(), rtol=1e-6)
    assert step.isfinite()
