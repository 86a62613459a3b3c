"""Local probes: unbiased for every parameter and of the stated error, for layers of many kinds; refused where wrong."""

import math

import pytest
import torch
from torch import Tensor, nn

import flatmin
from flatmin.curvature.per_sample import uses
from flatmin.curvature.per_sample.norms import PerSample
from flatmin.curvature.per_sample.uses import LinearUse, SumUse
from flatmin.curvature.products.operators import ResidualOperator
from flatmin.curvature.products.probes import VectorProbes
from flatmin.curvature.products.ways import choose_way
from flatmin.curvature.traces.gauss_newton import split_of
from flatmin.curvature.traces.local import LocalProbes, LocalResidual, why_not
from tests.curvature.nets import criterion, dense_gauss_newton, dense_hessian, make
from tests.curvature.traces.test_gauss_newton import LAYERS, build, traces_by_param

DRAWS = 200


def local(objective, seed=0, graph_memory=2**31):
    way, split = choose_way(objective), split_of(objective)
    assert why_not(objective, way, split.layouts, seed) == ""
    return LocalProbes(LocalResidual(objective, way, split.layouts, graph_memory=graph_memory), seed)


def residual(model, x, y):
    gauss_newton = dense_gauss_newton(model, lambda: model(x), lambda z: criterion(z, y))
    return dense_hessian(model, lambda: criterion(model(x), y)) - gauss_newton


def uses_of(objective, x):
    """The uses of a batch, and a tensor of the shape of the output that each of them acts on."""
    outputs = objective.model(x)
    found = PerSample(outputs, objective.params)
    deltas = torch.autograd.grad(outputs.square().sum(), found.edges)
    return [(use, deltas[at]) for use, at in zip(found.uses, found.at, strict=True)]


@pytest.mark.parametrize("layers", list(LAYERS))
def test_the_covariance_of_a_perturbation_is_that_of_random_signs(layers):
    # E (m' e)^2 = m' B B' m = |B' m|^2 for each sample: the per-sample norm of the gradient along m.
    model, x, y = build(layers)
    generator = torch.Generator().manual_seed(0)
    for use, like in uses_of(flatmin.Objective(model, criterion, [(x, y)]), x):
        m = torch.randn(like.shape, dtype=like.dtype, generator=generator)
        expected = use.norms(m.unsqueeze(0))[0]
        draws = torch.stack([use.rows(m * use.perturbation(like, generator)).sum((1, 2)) for _ in range(DRAWS)])
        squares = draws.square()
        assert bool(((squares.mean(0) - expected).abs() <= 4.5 * squares.std(0) / math.sqrt(DRAWS) + 1e-9).all())
        together = draws.sum(1).square()  # samples are independent of each other
        assert abs(together.mean() - expected.sum()) <= 4.5 * together.std() / math.sqrt(DRAWS) + 1e-9


@pytest.mark.parametrize("layers", ["few positions", "grouped, strided, dilated convolution"])
def test_block_by_block_of_samples_is_the_same(layers, monkeypatch):
    model, x, y = build(layers)
    objective = flatmin.Objective(model, criterion, [(x, y)])
    for use, like in uses_of(objective, x):
        v = torch.randn(len(x), *use.shape, dtype=x.dtype)
        whole = use.changes(v, like)
        monkeypatch.setattr(uses, "PATCHES", 1)
        torch.testing.assert_close(use.changes(v, like), whole)
        monkeypatch.undo()
    monkeypatch.setattr(uses, "PATCHES", 1)
    truth = float(residual(model, x, y).trace())
    samples = local(objective).draw(0, DRAWS).sum(1)
    assert abs(float(samples.mean()) - truth) <= 4 * float(samples.std()) / math.sqrt(DRAWS) + 1e-9


SINGLE = [name for name in LAYERS if name not in ("tied", "plain product")]


@pytest.mark.parametrize("layers", SINGLE)
def test_the_form_of_every_parameter_is_that_of_the_dense_matrix(layers):
    model, x, y = build(layers)
    objective, truth, start = flatmin.Objective(model, criterion, [(x, y)]), residual(model, x, y), 0
    ((curvature, _),) = local(objective).operator.batches()
    for i, p in enumerate(objective.params):
        v = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(i))
        block = truth[start : start + p.numel(), start : start + p.numel()]
        assert curvature.form(i, v) == pytest.approx(float(v.flatten() @ block @ v.flatten()), rel=1e-9, abs=1e-12)
        start += p.numel()


@pytest.mark.parametrize("layers", SINGLE)
def test_unbiased_for_every_parameter(layers):
    model, x, y = build(layers)
    objective = flatmin.Objective(model, criterion, [(x[:4], y[:4]), (x[4:], y[4:])])
    truth = traces_by_param(model, residual(model, x, y))
    samples = local(objective).draw(0, DRAWS)
    assert bool(((samples.mean(0) - truth).abs() <= 4 * samples.std(0) / math.sqrt(DRAWS) + 1e-9).all())


def test_every_sample_has_a_probe_of_its_own():
    # Eight times the same sample: with one probe for all of them the variance would be that of one sample.
    model, x, y = make("tanh")
    spread = []
    for times in (1, 8):
        data = [(x[:1].repeat(times, 1), y[:1].repeat(times))]
        first = flatmin.Objective(model, criterion, [(x[:2], y[:2])])  # layouts cannot be found from one sample
        objective = flatmin.Objective(model, criterion, data)
        rest = LocalResidual(objective, choose_way(objective), split_of(first).layouts)
        spread.append(float(LocalProbes(rest, 0).draw(0, 200).sum(1).std()))
    assert spread[1] == pytest.approx(spread[0] / math.sqrt(8), rel=0.25)


def test_a_fraction_of_the_variance_of_probes_of_the_parameters():
    model, x, y = make("tanh")
    objective = flatmin.Objective(model, criterion, [(x[:12], y[:12]), (x[12:], y[12:])])
    vectors = VectorProbes(ResidualOperator(objective), 0).draw(0, 200).sum(1)
    assert float(local(objective).draw(0, 200).sum(1).var()) < float(vectors.var()) / 4


def test_graphs_kept_or_not_and_probes_in_one_round_or_two_are_the_same():
    model, x, y = make("attention")
    objective = flatmin.Objective(model, criterion, [(x[:10], y[:10]), (x[10:], y[10:])])
    once = local(objective).draw(0, 5)
    fresh = local(objective, graph_memory=0)
    torch.testing.assert_close(torch.cat([fresh.draw(0, 2), fresh.draw(2, 3)]), once, rtol=1e-10, atol=1e-12)


class Iterated(nn.Module):
    """Uses its layer more often for inputs above a threshold."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2 if x[0, 0] > 0 else 1):
            x = self.one(x).tanh()
        return self.two(x)


def test_a_parameter_that_enters_twice_is_left_to_products():
    model, x, y = build("tied")
    objective = flatmin.Objective(model, criterion, [(x, y)])
    assert why_not(objective, choose_way(objective), split_of(objective).layouts, 0) == (
        "a parameter enters several operations"
    )
    method = flatmin.trace(objective, method="gauss-newton", max_products=8).method
    assert method.startswith("Hutchinson")
    assert method.endswith("(no local probes: a parameter enters several operations)")


def test_also_if_only_another_batch_is_computed_so():
    torch.manual_seed(0)
    model, x, y = Iterated().double(), torch.randn(40, 5).double(), torch.randint(3, (40,))
    x[:20, 0], x[20:, 0] = -1.0, 1.0
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    objective = flatmin.Objective(model, criterion, batches)
    result = flatmin.trace(objective, method="gauss-newton", max_products=600)
    truth = dense_hessian(model, lambda: torch.stack([criterion(model(a), b) for a, b in batches]).mean()).trace()
    assert result.method.startswith("Hutchinson")
    assert "(no local probes: a parameter enters several operations)" in result.method
    assert abs(result.value - float(truth)) <= 4 * result.stderr
    assert result.stderr < 0.05 * float(truth)


@pytest.mark.parametrize("use", [LinearUse, SumUse])
def test_the_trial_sees_a_change_that_is_wrong(use, monkeypatch):
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 3)), torch.randn(8, 5), torch.arange(8) % 3
    names = ["0.weight"] if use is LinearUse else ["0.bias"]
    objective = flatmin.Objective(model, criterion, [(x, y)], params=names)
    way, layouts = choose_way(objective), split_of(objective).layouts
    assert why_not(objective, way, layouts, 0) == ""
    right = use.changes
    monkeypatch.setattr(use, "changes", lambda self, v, like: 1.001 * right(self, v, like))
    assert why_not(objective, way, layouts, 0) == f"for {names[0]} they differ from a product"
    assert flatmin.trace(objective, method="gauss-newton", max_products=8).method.startswith("Hutchinson")


def test_only_by_double_backward():
    model, x, y = make("tanh")
    objective = flatmin.Objective(model, criterion, [(x, y)])
    result = flatmin.trace(objective, method="gauss-newton", products="difference", max_products=40)
    truth = float(dense_hessian(model, lambda: criterion(model(x), y)).trace())
    assert result.method.startswith("Hutchinson")
    assert abs(result.value - truth) <= 4 * result.stderr
