"""The trace estimate in units of its own standard error, at a fixed number of probes, over many seeds."""

import math

import numpy as np
import pytest
import torch

import flatmin
from flatmin import problems
from tests.curvature.nets import NETS, criterion, dense_hessian, make

SEEDS = 200


def setting(name):
    model, x, y = make(name)
    objective = flatmin.Objective(model, criterion, [(x[:10], y[:10]), (x[10:20], y[10:20]), (x[20:], y[20:])])
    return objective, dense_hessian(model, lambda: criterion(model(x), y))


def layer_traces(objective, hessian):
    traces, start = dict.fromkeys(objective.layers, 0.0), 0
    for layer, p in zip(objective.layers, objective.params, strict=True):
        block = hessian[start : start + p.numel(), start : start + p.numel()]
        traces[layer] += float(block.trace())
        start += p.numel()
    return traces


@pytest.mark.parametrize("name", list(NETS))
def test_unbiased_and_its_interval_covers_at_the_stated_rate(name):
    objective, hessian = setting(name)
    truth = float(hessian.trace())
    results = [flatmin.trace(objective, max_products=12, seed=seed) for seed in range(SEEDS)]
    values = np.array([r.value for r in results])
    assert abs(values.mean() - truth) < 3 * values.std() / math.sqrt(SEEDS)
    covered = np.mean([low <= truth <= high for low, high in (r.interval(0.9) for r in results)])
    assert abs(covered - 0.9) < 3 * math.sqrt(0.9 * 0.1 / SEEDS)
    # The reported standard error is the spread that is seen over seeds.
    assert math.sqrt(np.mean([r.stderr**2 for r in results])) == pytest.approx(values.std(), rel=0.2)
    assert all(r.num_products == 12 and len(r.samples) == 12 for r in results)


@pytest.mark.parametrize("name", ["relu", "conv"])
def test_layers_add_up_and_are_unbiased(name):
    objective, hessian = setting(name)
    truth = layer_traces(objective, hessian)
    results = [flatmin.trace(objective, max_products=8, seed=seed) for seed in range(SEEDS)]
    for r in results[:5]:
        assert sum(part.value for part in r.per_layer.values()) == pytest.approx(r.value, rel=1e-10)
    for layer, expected in truth.items():
        parts = np.array([r.per_layer[layer].value for r in results])
        assert abs(parts.mean() - expected) <= 3 * parts.std() / math.sqrt(SEEDS) + 1e-12
    if name == "conv":
        assert truth["unused"] == 0
        assert results[0].per_layer["unused"].value == 0


def test_the_requested_relative_error_is_met():
    objective, hessian = setting("tanh")
    truth = float(hessian.trace())
    results = [flatmin.trace(objective, rtol=0.05, seed=seed) for seed in range(60)]
    assert all(r.converged and r.stderr <= 0.05 * abs(r.value) for r in results)
    errors = np.array([abs(r.value - truth) / truth for r in results])
    # |N(0, 1)| <= 1 in 68% of cases; stopping when the error looks small costs a little.
    assert np.mean(errors <= 0.05) > 0.55
    assert np.mean(errors <= 0.10) > 0.85


def test_exact_where_probes_have_no_variance():
    # Rademacher probes are exact on a diagonal Hessian.
    a = torch.diag(torch.tensor([3.0, 1.0, 0.5])).double()
    model = problems.quadratic(a).module()
    objective = flatmin.Objective(model, None, [torch.zeros(1)], forward=lambda m, b: (m(), b))
    result = flatmin.trace(objective, max_products=3)
    assert result.value == pytest.approx(4.5, rel=1e-12)
    assert result.stderr == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("make_problem", [problems.ill_conditioned, problems.rank_deficient, problems.hyperbola])
def test_problems(make_problem):
    problem = make_problem()
    objective = flatmin.Objective(problem.module(), None, [torch.zeros(1)], forward=lambda m, b: (m(), b))
    result = flatmin.trace(objective, max_products=400)
    assert abs(result.value - float(problem.trace(problem.start))) < 4 * result.stderr


def test_a_linear_loss_has_no_curvature():
    model = torch.nn.Linear(2, 1)
    objective = flatmin.Objective(model, None, [torch.ones(4, 2)], forward=lambda m, b: (m(b).mean(), b))
    assert flatmin.trace(objective, max_products=4).value == 0


def test_budgets():
    objective, _ = setting("relu")
    assert flatmin.trace(objective, max_products=3).num_products == 3
    unmet = flatmin.trace(objective, rtol=1e-6, max_products=20)
    assert unmet.num_products == 20
    assert not unmet.converged
    assert flatmin.trace(objective, max_seconds=0.2).num_products > 8
    short = flatmin.trace(objective, rtol=1e-9, max_seconds=0.01)
    assert not short.converged
    assert flatmin.trace(objective, max_products=1).stderr == math.inf
    with pytest.raises(ValueError, match="rtol must be positive, got 0"):
        flatmin.trace(objective, rtol=0.0)
    with pytest.raises(ValueError, match="max_products must be positive, got -1"):
        flatmin.trace(objective, max_products=-1)
    with pytest.raises(ValueError, match="unknown trace method 'xtrace'"):
        flatmin.trace(objective, method="xtrace")


def test_same_seed_same_number():
    objective, _ = setting("relu")
    a, b, c = (flatmin.trace(objective, max_products=9, seed=seed) for seed in (1, 1, 2))
    assert a == b
    assert a.value != c.value


def test_every_batch_has_a_probe_of_its_own():
    # Eight times the same batch: one probe for all of them would have the variance of one batch, not an eighth.
    model, x, y = make("relu")
    spread = []
    for data in ([(x, y)], [(x, y)] * 8):
        result = flatmin.trace(flatmin.Objective(model, criterion, data), max_products=200)
        spread.append(np.std(result.samples))
    assert spread[1] == pytest.approx(spread[0] / math.sqrt(8), rel=0.25)
