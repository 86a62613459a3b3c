"""The trace estimate in units of its own standard error, at a fixed number of probes, over many seeds."""

import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import flatmin
from flatmin import problems
from flatmin.curvature.products.operators import HessianOperator
from flatmin.curvature.products.ways import choose_way
from flatmin.curvature.traces import estimators
from tests.curvature.nets import NETS, DenseHessian, criterion, dense_hessian, make

SEEDS = 200


def setting(name):
    model, x, y = make(name)
    objective = flatmin.Objective(model, criterion, [(x[:10], y[:10]), (x[10:20], y[10:20]), (x[20:], y[20:])])
    return objective, dense_hessian(model, lambda: criterion(model(x), y))


@pytest.fixture
def repeated(monkeypatch):
    """The traces of many seeds, with products that are made of the dense Hessians of the batches.

    Double backward gives the same numbers, as is checked for three of the seeds, and would take most of the time.
    """

    def traces(objective, seeds, **options):
        model = objective.model
        matrices = [dense_hessian(model, lambda x=x, y=y: criterion(model(x), y)) for x, y in objective.data]
        way = replace(choose_way(objective), swaps=False)  # nothing is differentiated

        def opened(_, batch, index):
            batch.evaluate()
            return DenseHessian(matrices[index])

        few = [flatmin.trace(objective, seed=seed, **options) for seed in range(3)]
        monkeypatch.setattr(HessianOperator, "_open", opened)
        monkeypatch.setattr(estimators, "choose_way", lambda *_, **__: way)
        results = [flatmin.trace(objective, seed=seed, **options) for seed in range(seeds)]
        for a, b in zip(few, results, strict=False):
            assert a.samples == pytest.approx(b.samples, rel=1e-8)
            assert a.value == pytest.approx(b.value, rel=1e-8)
        return results

    return traces


def layer_traces(objective, hessian):
    traces, start = dict.fromkeys(objective.layers, 0.0), 0
    for layer, p in zip(objective.layers, objective.params, strict=True):
        block = hessian[start : start + p.numel(), start : start + p.numel()]
        traces[layer] += float(block.trace())
        start += p.numel()
    return traces


@pytest.mark.parametrize("name", list(NETS))
def test_unbiased_and_its_interval_covers_at_the_stated_rate(name, repeated):
    objective, hessian = setting(name)
    truth = float(hessian.trace())
    results = repeated(objective, SEEDS, max_products=12, method="hutchinson")
    values = np.array([r.value for r in results])
    assert abs(values.mean() - truth) < 3 * values.std() / math.sqrt(SEEDS)
    covered = np.mean([low <= truth <= high for low, high in (r.interval(0.9) for r in results)])
    assert abs(covered - 0.9) < 3 * math.sqrt(0.9 * 0.1 / SEEDS)
    # The reported standard error is the spread that is seen over seeds.
    assert math.sqrt(np.mean([r.stderr**2 for r in results])) == pytest.approx(values.std(), rel=0.2)
    assert all(r.num_products == 12 and len(r.samples) == 12 for r in results)


@pytest.mark.parametrize("name", ["relu", "conv"])
def test_layers_add_up_and_are_unbiased(name, repeated):
    objective, hessian = setting(name)
    truth = layer_traces(objective, hessian)
    results = repeated(objective, SEEDS, max_products=8, method="hutchinson")
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
    assert abs(result.value - float(problem.trace(problem.start))) <= 4 * result.stderr + 1e-9


def test_a_linear_loss_has_no_curvature():
    model = torch.nn.Linear(2, 1)
    objective = flatmin.Objective(model, None, [torch.ones(4, 2)], forward=lambda m, b: (m(b).mean(), b))
    assert flatmin.trace(objective, max_products=4).value == 0


def test_budgets():
    objective, _ = setting("tanh")
    assert flatmin.trace(objective, max_products=3).num_products == 3
    unmet = flatmin.trace(objective, rtol=1e-6, max_products=20)
    assert unmet.num_products <= 20
    assert not unmet.converged
    assert flatmin.trace(objective, max_seconds=1.0, method="hutchinson").num_products > 8
    short = flatmin.trace(objective, rtol=1e-9, max_seconds=0.01)
    assert not short.converged
    assert flatmin.trace(objective, max_products=1).stderr == math.inf
    with pytest.raises(ValueError, match="rtol must be positive, got 0"):
        flatmin.trace(objective, rtol=0.0)
    with pytest.raises(ValueError, match="max_products must be at least 1, got -1"):
        flatmin.trace(objective, max_products=-1)
    with pytest.raises(ValueError, match=r"max_products must be a whole number, got 1000\.0"):
        flatmin.trace(objective, method="hutchinson", max_products=1e3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"xtrace needs max_products of at least 12, got 5"):
        flatmin.trace(objective, method="xtrace", max_products=5)
    with pytest.raises(ValueError, match=r"unknown trace method 'power'\. Known: auto, hutchinson"):
        flatmin.trace(objective, method="power")


def test_same_seed_same_number():
    objective, _ = setting("tanh")
    a, b, c = (flatmin.trace(objective, max_products=9, seed=seed) for seed in (1, 1, 2))
    assert a == b
    assert a.value != c.value


def test_every_batch_has_a_probe_of_its_own():
    # Eight times the same batch: one probe for all of them would have the variance of one batch, not an eighth.
    model, x, y = make("relu")
    spread = []
    for data in ([(x, y)], [(x, y)] * 8):
        result = flatmin.trace(flatmin.Objective(model, criterion, data), max_products=200, method="hutchinson")
        spread.append(np.std(result.samples))
    assert spread[1] == pytest.approx(spread[0] / math.sqrt(8), rel=0.25)


SHORT = 80
# (method, net, products): where the error is not zero. Of XTrace the interval is wider than need be.
ESTIMATES = [
    ("gauss-newton", "attention", 12, (0.8, 0.99)),
    ("hutch++", "tanh", 24, (0.8, 0.99)),
    ("xtrace", "tanh", 24, (0.81, 1.0)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name", "products", "rates"), ESTIMATES)
def test_the_other_methods_are_unbiased_and_their_intervals_cover(method, name, products, rates, repeated):
    objective, hessian = setting(name)
    truth = float(hessian.trace())
    results = repeated(objective, SHORT, max_products=products, method=method)
    values = np.array([r.value for r in results])
    assert abs(values.mean() - truth) < 3 * values.std() / math.sqrt(SHORT)
    covered = np.mean([low <= truth <= high for low, high in (r.interval(0.9) for r in results)])
    assert rates[0] <= covered <= rates[1]
    assert {r.num_products for r in results} == {products}
    layers = layer_traces(objective, hessian)
    for layer, expected in layers.items():
        parts = np.array([r.per_layer[layer].value for r in results])
        assert abs(parts.mean() - expected) <= 3.5 * parts.std() / math.sqrt(SHORT) + 1e-9 * abs(truth)
    for r in results[:3]:
        assert sum(part.value for part in r.per_layer.values()) == pytest.approx(r.value, rel=1e-9)


def test_a_piecewise_linear_net_is_exact_at_the_cost_of_its_classes():
    objective, hessian = setting("relu")
    result = flatmin.trace(objective)
    assert result.value == pytest.approx(float(hessian.trace()), rel=1e-10)
    assert result.stderr == 0
    assert result.converged
    assert result.interval() == (result.value, result.value)
    assert result.num_gradients <= (1 + 2 * 3) / 3  # the forward pass, two vectors, the check of a sample
    for layer, expected in layer_traces(objective, hessian).items():
        assert result.per_layer[layer].value == pytest.approx(expected, rel=1e-10)
    assert "piecewise linear in every parameter" in result.method


CHOICES = [
    ("tanh", 0.02, "local probes, fresh for every sample; Gauss-Newton exact; of the rest", "few probes were needed"),
    ("conv", 0.01, "Hutch++ with", "in a pilot, probes of H - G had"),
]


@pytest.mark.parametrize(("name", "rtol", "text", "why"), CHOICES)
def test_auto_says_what_it_chose_and_why_and_needs_less(name, rtol, text, why):
    objective, hessian = setting(name)
    auto = flatmin.trace(objective, rtol=rtol, max_products=5000)
    plain = flatmin.trace(objective, rtol=rtol, max_products=5000, method="hutchinson")
    assert text in auto.method
    assert why in auto.method
    assert auto.num_gradients < plain.num_gradients / 2
    assert abs(auto.value - float(hessian.trace())) < 4 * auto.stderr
    assert auto.stderr <= rtol * auto.value


def test_auto_without_outputs():
    model, x, y = make("relu")
    own = flatmin.Objective(model, None, [(x, y)], forward=lambda m, b: (criterion(m(b[0]), b[1]), b[1]))
    result = flatmin.trace(own, max_products=8)
    assert "auto: no Gauss-Newton: Gauss-Newton and Fisher need the outputs" in result.method
    with pytest.raises(ValueError, match="criterion=None"):
        flatmin.trace(own, method="gauss-newton")


@pytest.mark.parametrize("max_products", [150, 200, 500])
def test_a_subspace_that_does_not_pay_is_paid_for_out_of_the_budget(max_products):
    basis = torch.linalg.qr(torch.randn(300, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    signs = torch.ones(300, dtype=torch.float64)
    signs[::2] = -1  # equal in size: nothing is gained by taking a few of them out
    model = nn.Linear(300, 1, bias=False).double()
    objective = flatmin.Objective(model, None, [basis], forward=lambda m, b: ((m(b).flatten() ** 2 @ signs) / 2, signs))
    result = flatmin.trace(objective, max_products=max_products)
    assert "Hutchinson" in result.method
    assert result.num_products == max_products
    assert len(result.samples) == max_products - 32  # 8 test vectors, 2 products for each, and 16 probes of the rest


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_a_hessian_of_low_rank_is_exact(method):
    problem = problems.rank_deficient()
    objective = flatmin.Objective(problem.module(), None, [torch.zeros(1)], forward=lambda m, b: (m(), b))
    result = flatmin.trace(objective, method=method)
    assert result.value == pytest.approx(float(problem.trace(problem.start)), rel=1e-9)


@pytest.mark.parametrize(("products", "parts"), [("difference", True), ("loss", False)])
def test_without_second_derivatives(products, parts):
    objective, hessian = setting("tanh")
    result = flatmin.trace(objective, max_products=60, method="hutchinson", products=products)
    reference = flatmin.trace(objective, max_products=60, method="hutchinson")
    assert result.value == pytest.approx(reference.value, rel=1e-4)  # the same probes
    assert ("differences of gradients" if parts else "differences of losses") in result.method
    assert set(result.per_layer) == (set(layer_traces(objective, hessian)) if parts else set())


@pytest.mark.parametrize("method", ["hutchinson", "gauss-newton"])
def test_memory_does_not_grow_with_batches_or_probes(method):
    model, x, y = make("tanh")
    peaks = []
    for batches, probes in [(2, 4), (12, 24)]:
        objective = flatmin.Objective(model, criterion, [(x, y)] * batches)
        with Alive() as alive:
            flatmin.trace(objective, max_products=probes, method=method, graph_memory=0)
        peaks.append(alive.peak)
    assert peaks[1] <= peaks[0] + 24 * 8 * len(list(model.parameters())) + 1000


class Alive(TorchDispatchMode):
    """The most bytes of tensors made inside that were alive at a time."""

    def __init__(self):
        super().__init__()
        self._sizes = weakref.WeakKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self._sizes[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self._sizes.values()))
        return out
