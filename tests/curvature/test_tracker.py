"""A tracker keeps its share of the time, and what it finds is true; the free trace against the trace."""

import json
import math

import numpy as np
import pytest
import torch
from torch.optim import SGD

import flatmin
from tests.curvature.nets import criterion, dense_hessian, make
from tests.curvature.products.test_products import Never, Once, custom


class Clock:
    """Time that passes when told so, and with every product."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def setting(name="tanh"):
    model, x, y = make(name)
    objective = flatmin.Objective(model, criterion, [(x[:16], y[:16]), (x[16:], y[16:])])
    return objective, dense_hessian(model, lambda: criterion(model(x), y))


@pytest.mark.parametrize(("cost", "max_overhead"), [(0.5, 0.05), (2.0, 0.2), (7.0, 0.05)])
def test_it_keeps_its_share_of_the_time(cost, max_overhead, monkeypatch):
    objective, _ = setting()
    clock = Clock()
    tracker = flatmin.Tracker(objective, max_overhead=max_overhead, clock=clock)
    measure = tracker._measure

    def slow(seed):
        clock.now += cost
        return measure(seed)

    monkeypatch.setattr(tracker, "_measure", slow)
    first = None
    for step in range(400):
        clock.now += 1.0
        point = tracker.update(step)
        first = first or point
        if point and len(tracker.points) > 1:
            assert point.overhead <= max_overhead + 1e-9
    assert first is not None
    assert first.step == 0  # the first one is always made
    assert tracker.overhead <= max_overhead
    # and the time that there is, is used
    assert len(tracker.points) >= 0.8 * 400 * max_overhead / cost - 1
    assert [p.seconds for p in tracker.points] == [cost] * len(tracker.points)


def test_what_it_finds_is_true():
    objective, hessian = setting()
    tracker = flatmin.Tracker(objective, max_overhead=1.0, num_probes=16, sigma=0.01)
    points = [tracker.update() for _ in range(6)]
    assert [p.step for p in points if p] == list(range(6))
    top, trace = float(torch.linalg.eigvalsh(hessian)[-1]), float(hessian.trace())
    for p in tracker.points:
        assert p.loss == objective.loss()
        assert p.lambda_max.value <= top * (1 + 1e-9)
    # The draws are skewed, so that 16 of them may miss by many of their standard errors; six times 16 do not.
    for name, factor in (("trace", 1.0), ("noise_stability", 2 / 0.01**2)):
        parts = [getattr(p, name) for p in tracker.points]
        error = math.sqrt(np.mean([p.stderr**2 for p in parts]) / 6)
        assert abs(factor * np.mean([p.value for p in parts]) - trace) < 4 * factor * error
    # Four steps at a time, but from the last vector: what one finds, the next one starts with.
    assert tracker.points[0].lambda_max.value < 0.99 * top
    assert tracker.points[-1].lambda_max.value > 0.999 * top
    assert len({p.trace.value for p in tracker.points}) == 6  # new probes every time


def test_it_follows_the_weights_and_changes_nothing():
    objective, _ = setting()
    model = objective.model
    tracker = flatmin.Tracker(objective, max_overhead=1.0)
    tracker.update()
    before = [p.detach().clone() for p in model.parameters()]
    rng = torch.get_rng_state()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    for _ in range(5):
        tracker.update()
    assert all(torch.equal(p, 2 * b) for p, b in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), rng)
    assert tracker.points[-1].loss == objective.loss() != tracker.points[0].loss
    found = tracker.points[-1].lambda_max.value
    assert found == pytest.approx(flatmin.top_eigenvalues(objective).value, rel=0.02)
    assert abs(found / tracker.points[0].lambda_max.value - 1) > 0.05


def test_an_interrupted_measurement_costs_and_leaves_no_point(monkeypatch):
    objective, _ = setting()
    clock = Clock()
    tracker = flatmin.Tracker(objective, clock=clock)

    def interrupted(seed):
        clock.now += 3.0
        raise KeyboardInterrupt

    monkeypatch.setattr(tracker, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tracker.update()
    assert tracker.points == []
    assert tracker.overhead == 1.0


def test_the_picture_and_plain_data():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    objective, _ = setting()
    tracker = flatmin.Tracker(objective, max_overhead=1.0)
    tracker.update(10)
    tracker.update(20)
    axes = tracker.plot()
    assert [ax.get_title() for ax in axes] == ["loss", "trace", "lambda_max"]
    assert list(axes[0].lines[0].get_xdata()) == [10, 20]
    matplotlib.pyplot.close("all")
    data = json.loads(json.dumps(tracker.to_dict(), allow_nan=False))
    assert data["points"][1]["noise_stability"]["value"] is None
    assert data["points"][1]["step"] == 20


def test_points_are_a_table_and_a_point_a_line():
    tracker = flatmin.Tracker(setting()[0], max_overhead=1.0, sigma=0.01, clock=Clock())
    assert repr(tracker) == str(tracker) == "Tracker(0 points, 0 of the time)"
    for step in (0, 10):
        tracker.update(step)
    title, names, *rows = str(tracker).splitlines()
    assert title == "Tracker(2 points, 0 of the time)"
    assert names.split() == ["step", "loss", "trace", "lambda_max", "noise_stability"]
    assert [row.split()[0] for row in rows] == ["0", "10"]
    point = tracker.points[1]
    assert str(point.trace) in rows[1]
    assert names.index("lambda_max") == rows[1].index(str(point.lambda_max))
    assert str(point).startswith(f"step 10, loss {point.loss:.4g}, trace {point.trace}, lambda_max {point.lambda_max}")
    assert repr(tracker.points) == f"[TrackPoint({tracker.points[0]}), TrackPoint({point})]"
    without = flatmin.Tracker(setting()[0], max_overhead=1.0)
    assert "noise" not in str(without.update(3))


def test_bad_arguments():
    objective, _ = setting()
    for options in ({"max_overhead": 0.0}, {"max_overhead": 2.0}, {"num_probes": 1}, {"num_steps": 0}, {"sigma": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            flatmin.Tracker(objective, **options)  # type: ignore[arg-type]
    for build in (lambda: flatmin.FreeTrace(0.0), lambda: flatmin.FreeTrace(0.1, window=1)):
        with pytest.raises(ValueError, match="must be"):
            build()
    free = flatmin.FreeTrace(0.1)
    assert math.isnan(free.estimate().value)
    with pytest.raises(ValueError, match="losses must be pairs"):
        free.update([1.0, 2.0, 3.0], clean=1.0)


@pytest.mark.parametrize("num_perturbations", [1, 2])
def test_the_free_trace_of_noise_stability_optimization(num_perturbations):
    model, x, y = make("tanh")
    truth = float(dense_hessian(model, lambda: criterion(model(x), y)).trace())
    sigma = 0.01
    optimizer = flatmin.NSO(SGD(model.parameters(), lr=0.0), sigma=sigma, num_perturbations=num_perturbations)
    free = flatmin.FreeTrace(sigma, window=300)
    for _ in range(400):
        losses = []
        for _ in optimizer.probes():
            losses.append(criterion(model(x), y))
            losses[-1].backward()
        with torch.no_grad():
            free.update(losses, clean=criterion(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    found = free.estimate()
    assert found.num_samples == 300
    assert abs(found.value - truth) < 4 * found.stderr
    assert found.stderr < 0.05 * truth


def test_batches_of_its_own_for_the_clean_loss_would_be_useless():
    # The reason why `clean` must be on the same batch: the difference between batches is divided by sigma^2.
    model, x, y = make("tanh")
    sigma, values = 0.01, []
    with torch.no_grad():
        for rows in (slice(0, 12), slice(12, 24)):
            free = flatmin.FreeTrace(sigma)
            free.update([criterion(model(x[rows]), y[rows])] * 2, clean=criterion(model(x), y))
            values.append(free.estimate().value)
    truth = float(dense_hessian(model, lambda: criterion(model(x), y)).trace())
    assert np.abs(values).min() > 10 * truth


@pytest.mark.parametrize("activation", [Once, Never])
def test_models_without_second_or_first_derivatives(activation):
    objective, hessian = custom(activation.apply)
    tracker = flatmin.Tracker(objective, max_overhead=1.0, num_probes=32)
    for _ in range(4):
        tracker.update()
    point = tracker.points[-1]
    assert abs(point.trace.value - float(hessian.trace())) < 5 * point.trace.stderr
    if activation is Once:  # by differences of gradients
        assert point.lambda_max.value == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=0.01)
    else:  # by differences of losses, which give no product
        assert math.isnan(point.lambda_max.value)
