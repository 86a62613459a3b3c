"""The rise of the loss under random displacements: against closed forms, the dense trace, and rescaled networks."""

import copy
import math
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn

import flatmin
from flatmin import problems
from flatmin.noise import filter_norms
from tests.curvature.nets import NETS, criterion, dense_hessian, make
from tests.interrupts import InterruptAt

SEEDS = 40


def objective_of(problem, x=None):
    module = problem.module()
    if x is not None:
        with torch.no_grad():
            module.x.copy_(x)
    return flatmin.Objective(module, None, [torch.zeros(1)], forward=lambda m, b: (m(), b))


def setting(name):
    model, x, y = make(name)
    objective = flatmin.Objective(model, criterion, [(x[:10], y[:10]), (x[10:20], y[10:20]), (x[20:], y[20:])])
    return objective, dense_hessian(model, lambda: criterion(model(x), y))


def errors(results, truth):
    """The errors of many results in units of the standard error that each reports."""
    return np.array([(r.value - truth) / r.stderr for r in results])


def test_a_quadratic_at_every_sigma():
    problem = problems.ill_conditioned(6, 10.0)
    objective, trace = objective_of(problem), float(problem.trace(problem.start))
    for sigma in (1e-3, 0.1, 3.0):
        results = [flatmin.noise_stability(objective, sigma, num_draws=20, seed=seed) for seed in range(SEEDS)]
        z = errors(results, sigma**2 / 2 * trace)
        assert abs(np.mean([r.implied_trace.value for r in results]) / trace - 1) < 3 * 0.3 / math.sqrt(SEEDS)
        assert 0.6 < z.std() < 1.5
        assert (np.abs(z) < 5).all()


def test_the_smoothed_hyperbola_has_its_fourth_order_term():
    # E (1 - (x + u)(y + v))^2 - (1 - xy)^2 = sigma^2 (x^2 + y^2) + sigma^4 at any (x, y).
    sigma = 1.0
    objective = objective_of(problems.hyperbola(), torch.tensor([1.0, 1.5], dtype=torch.float64))
    result = flatmin.noise_stability(objective, sigma, num_draws=4000)
    truth = sigma**2 * 3.25 + sigma**4
    assert abs(result.value - truth) < 3 * result.stderr < 0.5 * sigma**4
    assert result.clean_loss == pytest.approx(0.25)


@pytest.mark.parametrize("name", list(NETS))
def test_a_small_sigma_gives_the_trace_in_all_and_per_layer(name):
    objective, hessian = setting(name)
    sigma = 1e-4 if name in ("relu", "conv") else 3e-3  # kinks, of max-pool too, must be out of reach
    result = flatmin.noise_stability(objective, sigma, num_draws=60, per_layer=True)
    factor = 2 / sigma**2
    assert abs(result.implied_trace.value - float(hessian.trace())) < 4 * result.implied_trace.stderr
    start, blocks = 0, dict.fromkeys(objective.layers, 0.0)
    for layer, p in zip(objective.layers, objective.params, strict=True):
        blocks[layer] += float(hessian.diagonal()[start : start + p.numel()].sum())
        start += p.numel()
    for layer, part in result.per_layer.items():
        assert abs(factor * part.value - blocks[layer]) < 4 * factor * part.stderr + 1e-4
    assert set(result.per_layer) == set(objective.layers)


def filter_scales(objective):
    norms = zip(filter_norms(objective.params), objective.params, strict=True)
    return torch.cat([norm.expand_as(p).flatten() for norm, p in norms])


def test_noise_scaled_to_the_filters_gives_the_scaled_trace():
    objective, hessian = setting("tanh")
    norms = filter_scales(objective)
    sigma = 2e-3
    result = flatmin.noise_stability(objective, sigma, num_draws=200, scale="filter")
    truth = float((hessian.diagonal() * norms**2).sum())
    assert abs(result.implied_trace.value - truth) < 4 * result.implied_trace.stderr
    assert abs(truth / float(hessian.trace()) - 1) > 0.2  # so that the two are told apart


def test_both_sides_cancel_the_gradient():
    objective = objective_of(problems.ill_conditioned(6, 10.0), torch.full((6,), 5.0, dtype=torch.float64))
    one, both = (flatmin.noise_stability(objective, 0.1, num_draws=100, two_sided=two) for two in (False, True))
    assert both.stderr < 0.1 * one.stderr
    assert abs(one.value - both.value) < 4 * one.stderr
    assert (one.num_losses, both.num_losses) == (100 + 5, 200 + 5)  # rounds of 8, 8, 16, 32 and 36 draws


def test_fresh_noise_for_every_batch():
    model, x, y = make("tanh")
    spread = [
        np.std(flatmin.noise_stability(flatmin.Objective(model, criterion, data), 0.01, num_draws=200).samples)
        for data in ([(x, y)], [(x, y)] * 8)
    ]
    assert spread[1] == pytest.approx(spread[0] / math.sqrt(8), rel=0.25)


def test_the_average_over_a_sphere():
    problem = problems.ill_conditioned(6, 10.0)
    objective, trace = objective_of(problem), float(problem.trace(problem.start))
    results = [flatmin.average_sharpness(objective, 0.5, num_draws=20, seed=seed) for seed in range(SEEDS)]
    z = errors(results, 0.5**2 / (2 * 6) * trace)
    assert abs(z.mean()) < 3 * 1.2 / math.sqrt(SEEDS)
    assert np.mean([r.implied_trace.value for r in results]) == pytest.approx(trace, rel=0.1)


@pytest.mark.parametrize("metric", ["adaptive", "filter", "monge"])
def test_the_average_over_the_sphere_of_a_metric(metric):
    objective, hessian = setting("tanh")
    w = torch.cat([p.detach().flatten() for p in objective.params])
    norms = filter_scales(objective)
    g = torch.cat([t.flatten() for t in objective.gradient().present])
    inverse = {  # A^2
        "adaptive": torch.diag(w**2),
        "filter": torch.diag(norms**2),
        "monge": torch.linalg.inv(torch.eye(len(w), dtype=w.dtype) + torch.outer(g, g)),
    }[metric]
    result = flatmin.average_sharpness(objective, 0.02, metric, num_draws=80)
    assert abs(result.implied_trace.value - float((inverse @ hessian).trace())) < 4 * result.implied_trace.stderr


def rescaled(factor):
    """A ReLU net, its first layer times `factor` and the second one's weights divided by it: the same function."""
    torch.manual_seed(1)
    first, second = nn.Linear(5, 12), nn.Linear(12, 3)
    model = nn.Sequential(first, nn.ReLU(), second).double()
    with torch.no_grad():
        first.weight.mul_(factor)
        first.bias.mul_(factor)
        second.weight.div_(factor)
    x, y = torch.randn(24, 5, dtype=torch.float64), torch.randint(3, (24,))
    return flatmin.Objective(model, criterion, [(x, y)])


@pytest.mark.parametrize(
    ("measure", "invariant"),
    [
        (lambda o: flatmin.noise_stability(o, 0.05, num_draws=8), False),
        (lambda o: flatmin.noise_stability(o, 0.05, num_draws=8, scale="filter"), True),
        (lambda o: flatmin.average_sharpness(o, 0.5, num_draws=8), False),
        (lambda o: flatmin.average_sharpness(o, 0.5, "adaptive", num_draws=8), True),
        (lambda o: flatmin.average_sharpness(o, 0.5, "filter", num_draws=8), True),
        (lambda o: flatmin.ascent_sharpness(o, 0.2), False),
        (lambda o: flatmin.ascent_sharpness(o, 0.2, "monge"), False),
        (lambda o: flatmin.ascent_sharpness(o, 0.2, "adaptive"), True),
        (lambda o: flatmin.ascent_sharpness(o, 0.2, "filter"), True),
    ],
)
def test_rescaling_changes_the_plain_measures_and_not_the_invariant_ones(measure, invariant):
    plain, other = rescaled(1.0), rescaled(4.0)
    assert other.loss() == pytest.approx(plain.loss(), rel=1e-12)
    a, b = measure(plain).value, measure(other).value
    if invariant:
        assert b == pytest.approx(a, rel=1e-9)
    else:
        assert abs(b / a - 1) > 0.2


def test_to_a_relative_error():
    objective, _ = setting("tanh")
    result = flatmin.noise_stability(objective, 0.01)
    assert result.converged
    assert result.stderr <= 0.05 * result.value
    unmet = flatmin.noise_stability(objective, 0.01, rtol=1e-6, num_draws=20)
    assert not unmet.converged
    assert len(unmet.samples) == 20
    low, high = unmet.interval()
    assert low < unmet.value < high
    assert flatmin.noise_stability(objective, 0.01, num_draws=4).samples == unmet.samples[:4]


MEASURING = ("flatmin.curvature.sharpness.average", "flatmin.curvature.sharpness.ascent", "flatmin.place")


@pytest.mark.parametrize(
    "measure",
    [lambda o: flatmin.noise_stability(o, 0.1, num_draws=2), lambda o: flatmin.ascent_sharpness(o, 0.1, num_steps=2)],
    ids=["noise", "ascent"],
)
def test_an_interrupt_at_any_line_leaves_the_weights(measure):
    objective, _ = setting("relu")
    before = [p.detach().clone() for p in objective.params]
    pointers = [p.data_ptr() for p in objective.params]
    line, interrupted = 1, True
    while interrupted:
        with suppress(KeyboardInterrupt), InterruptAt(line, MEASURING):
            measure(objective)
            interrupted = False
        assert all(torch.equal(p, b) for p, b in zip(objective.params, before, strict=True)), f"line {line}"
        line += 7
    assert line > 100
    assert [p.data_ptr() for p in objective.params] == pointers


@pytest.mark.parametrize(
    "measure",
    [
        lambda o: flatmin.trace(o, max_products=2, method="hutchinson"),
        lambda o: flatmin.trace(o, max_products=2, method="hutchinson", products="difference"),
        lambda o: flatmin.trace(o, max_products=2, method="hutchinson", products="loss"),
        lambda o: flatmin.top_eigenvalues(o, tol=0.1),
        lambda o: flatmin.noise_stability(o, 0.1, num_draws=2),
        lambda o: flatmin.ascent_sharpness(o, 0.1, num_steps=2),
        lambda o: flatmin.loss_slice(o, flatmin.random_direction(o), num_points=3),
    ],
    ids=["trace", "differences", "losses", "eigenvalues", "noise", "ascent", "slice"],
)
def test_a_graph_of_the_users_stays_valid(measure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(16, 5), torch.randint(3, (16,))
    loss = criterion(model(x), y)
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    measure(flatmin.Objective(model, criterion, [(x, y)]))
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_error_of_the_model_leaves_the_weights():
    model, x, y = make("relu")
    calls = []

    def forward(m, batch):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return m(batch[0]), batch[1]

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="out of memory"):
        flatmin.noise_stability(flatmin.Objective(model, criterion, [(x, y)], forward=forward), 0.1, num_draws=8)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_gradients_mode_and_random_state_are_as_before():
    objective, _ = setting("conv")
    objective.model.train()
    rng, grads = torch.get_rng_state(), [p.grad for p in objective.params]
    flatmin.noise_stability(objective, 0.1, num_draws=2)
    flatmin.ascent_sharpness(objective, 0.1, num_steps=2)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(module.training for module in objective.model.modules())
    assert all(p.grad is g for p, g in zip(objective.params, grads, strict=True))


def test_bad_arguments():
    objective, _ = setting("relu")
    for radius in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="sigma must be"):
            flatmin.noise_stability(objective, radius)
        with pytest.raises(ValueError, match="rho must be"):
            flatmin.ascent_sharpness(objective, radius)
    with pytest.raises(ValueError, match="unknown metric 'fisher'"):
        flatmin.average_sharpness(objective, 0.1, "fisher")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_draws must be at least 1, got 0"):
        flatmin.noise_stability(objective, 0.1, num_draws=0)
    with pytest.raises(ValueError, match=r"num_draws must be a whole number, got 2\.5"):
        flatmin.noise_stability(objective, 0.1, num_draws=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_starts must be at least 1"):
        flatmin.ascent_sharpness(objective, 0.1, num_starts=0)
    with pytest.raises(ValueError, match="scale must be"):
        flatmin.noise_stability(objective, 0.1, scale="layer")  # type: ignore[arg-type]


def test_rounding_is_part_of_the_error_in_single_precision():
    model, x, y = make("tanh")
    truth = float(dense_hessian(model, lambda: criterion(model(x), y)).trace())
    objective = flatmin.Objective(model.float(), criterion, [(x.float(), y)])
    z = []
    for seed in range(10):
        tiny = flatmin.noise_stability(objective, 3e-5, num_draws=2000 if seed == 0 else 100, seed=seed).implied_trace
        z.append((tiny.value - truth) / tiny.stderr)
        assert tiny.stderr > 0.5 * truth  # nothing is left of it at this sigma
    assert np.abs(z).max() < 4
    assert flatmin.noise_stability(objective, 0.01, num_draws=100).implied_trace.stderr < 0.1 * truth


def test_displaced_brings_the_weights_back():
    objective, _ = setting("relu")
    before = [p.detach().clone() for p in objective.params]
    with objective.displaced() as place:
        place.move(objective.zeros().apply(lambda t: t + 1))
        assert not torch.equal(objective.params[0], before[0])
    assert all(torch.equal(p, b) for p, b in zip(objective.params, before, strict=True))


@pytest.mark.parametrize("where", ["weights", "autocast"])
@pytest.mark.parametrize(("measure", "radius"), [(flatmin.noise_stability, 1e-3), (flatmin.average_sharpness, 0.1)])
def test_coarse_numbers_on_the_way_to_a_fine_loss_are_part_of_the_error(where, measure, radius):
    torch.manual_seed(1)
    x = torch.randn(256, 32)
    y = x[:, :8].argmax(1)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))

    def coarse(model, batch):
        if where == "weights":
            return model(batch[0].bfloat16()).float(), batch[1]
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch[0]).float(), batch[1]

    if where == "weights":
        model = model.bfloat16()
    fine = copy.deepcopy(model).float()
    data = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 256, 64)]
    found = measure(flatmin.Objective(model, nn.CrossEntropyLoss(), data, forward=coarse), radius)
    truth = measure(flatmin.Objective(fine, nn.CrossEntropyLoss(), data), radius)
    assert truth.converged
    assert not found.converged
    assert abs(found.value - truth.value) < 2 * found.stderr
