"""Slices against closed forms; the centre is the loss; weights are as before; pictures."""

import json

import numpy as np
import pytest
import torch

import flatmin
from flatmin import problems
from flatmin.noise import filter_norms
from flatmin.vectors import Vector
from tests.curvature.nets import criterion, make
from tests.curvature.sharpness.test_sharpness import objective_of, rescaled


def setting(name="relu"):
    model, x, y = make(name)
    return flatmin.Objective(model, criterion, [(x[:16], y[:16]), (x[16:], y[16:])])


def test_a_line_and_a_plane_of_the_hyperbola():
    objective = objective_of(problems.hyperbola(), torch.tensor([2.0, 0.5], dtype=torch.float64))
    x, y = (Vector([torch.tensor(d, dtype=torch.float64)]) for d in ([1.0, 0.0], [0.0, 1.0]))
    line = flatmin.loss_slice(objective, x, span=(-1.0, 2.0), num_points=7)
    a = np.array(line.coordinates[0])
    assert np.allclose(a, np.linspace(-1, 2, 7))
    assert np.allclose(line.losses, (1 - (2 + a) * 0.5) ** 2)
    plane = flatmin.loss_slice(objective, x, y, span=0.5, num_points=5)
    a, b = np.meshgrid(*plane.coordinates, indexing="ij")
    assert np.allclose(plane.losses, (1 - (2 + a) * (0.5 + b)) ** 2)


def test_printed_it_is_a_sentence():
    objective = objective_of(problems.hyperbola(), torch.tensor([2.0, 0.5], dtype=torch.float64))
    x, y = (Vector([torch.tensor(d, dtype=torch.float64)]) for d in ([1.0, 0.0], [0.0, 1.0]))
    line = flatmin.loss_slice(objective, x, span=(-1.0, 2.0), num_points=7, labels=["x"])
    assert str(line) == (
        "Loss along x (-1 .. 2), 7 points, 1 samples: 0 at the weights, lowest 0 at 0, highest 1 at 2."
    )
    plane = flatmin.loss_slice(objective, x, y, span=(0.5, 1.0), num_points=3)
    assert str(plane) == (
        "Loss along direction 1 (0.5 .. 1) and direction 2 (0.5 .. 1), 3 x 3 points, 1 samples: "
        "lowest 2.25 at 0.5, 0.5, highest 12.25 at 1, 1."
    )
    assert len(repr(plane)) < 100
    assert line != plane


def test_the_middle_is_the_loss_and_the_weights_are_as_before():
    objective = setting("conv")
    before = [p.detach().clone() for p in objective.params]
    directions = [flatmin.random_direction(objective, seed=seed) for seed in (0, 1)]
    for found in (
        flatmin.loss_slice(objective, directions[0]),
        flatmin.loss_slice(objective, *directions, num_points=3),
    ):
        losses = np.array(found.losses)
        assert losses[tuple(n // 2 for n in losses.shape)] == objective.loss()
        assert found.coordinates[0][len(found.coordinates[0]) // 2] == 0
        assert found.num_samples == 24
    assert all(torch.equal(p, b) for p, b in zip(objective.params, before, strict=True))


def test_from_one_checkpoint_to_another():
    here, there = setting(), setting()
    with torch.no_grad():
        for p in there.params:
            p.add_(0.1 * torch.randn_like(p))
    found = flatmin.loss_slice(
        here,
        flatmin.direction_to(here, there.model.state_dict()),
        span=(0.0, 1.0),
        num_points=3,
        labels=["to the other"],
    )
    assert found.losses[0] == pytest.approx(here.loss(), rel=1e-12)
    assert found.losses[-1] == pytest.approx(there.loss(), rel=1e-12)
    assert found.labels == ("to the other",)


def test_along_an_eigenvector_the_curvature_is_the_eigenvalue():
    objective = setting("tanh")
    top = flatmin.top_eigenvalues(objective, vectors=True, tol=1e-6)
    h = 1e-3
    low, middle, high = flatmin.loss_slice(objective, top.vectors[0], span=h, num_points=3).losses
    assert (low - 2 * middle + high) / h**2 == pytest.approx(top.value, rel=1e-3)


def test_random_directions_are_as_long_as_the_weights_filter_by_filter():
    objective = setting("conv")
    direction = flatmin.random_direction(objective, seed=3)
    torch.testing.assert_close(filter_norms(direction.present), filter_norms(objective.params))
    again, other = (flatmin.random_direction(objective, seed=seed) for seed in (3, 4))
    assert torch.equal(direction.present[0], again.present[0])
    assert not torch.equal(direction.present[0], other.present[0])


def test_rescaling_does_not_change_the_picture():
    plain, other = (flatmin.loss_slice(o, flatmin.random_direction(o)) for o in (rescaled(1.0), rescaled(4.0)))
    assert np.allclose(plain.losses, other.losses, rtol=1e-9)
    raw = Vector(torch.ones_like(p) for p in rescaled(1.0).params)
    plain, other = (flatmin.loss_slice(o, raw, span=1.0) for o in (rescaled(1.0), rescaled(4.0)))
    assert not np.allclose(plain.losses, other.losses, rtol=0.05)


def test_pictures_and_plain_data():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    objective = setting()
    d1, d2 = (flatmin.random_direction(objective, seed=seed) for seed in (0, 1))
    line = flatmin.loss_slice(objective, d1, labels=["random"])
    axes = line.plot()
    assert axes.get_xlabel() == "random"
    assert np.allclose(axes.lines[0].get_ydata(), line.losses)
    plane = flatmin.loss_slice(objective, d1, d2, num_points=5)
    axes = plane.plot()
    assert axes.get_ylabel() == "direction 2"
    assert json.loads(json.dumps(plane.to_dict()))["losses"] == [list(row) for row in plane.losses]
    matplotlib.pyplot.close("all")


def test_bad_arguments():
    objective = setting()
    d = flatmin.random_direction(objective)
    with pytest.raises(ValueError, match="one or two directions, got 3"):
        flatmin.loss_slice(objective, d, d, d)
    with pytest.raises(ValueError, match="1 directions have 2 labels"):
        flatmin.loss_slice(objective, d, labels=["a", "b"])
    with pytest.raises(ValueError, match="the span must not be empty"):
        flatmin.loss_slice(objective, d, span=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"the checkpoint has nothing for '0\.weight'"):
        flatmin.direction_to(objective, {})


def test_a_direction_of_another_objective_is_refused():
    model, x, y = make("tanh")
    objective = flatmin.Objective(model, criterion, [(x, y)])
    part = objective.only(objective.names[:1])
    for mine, direction in ((objective, flatmin.random_direction(part)), (part, flatmin.random_direction(objective))):
        with pytest.raises(ValueError, match="another shape than the parameters"):
            flatmin.loss_slice(mine, direction)
