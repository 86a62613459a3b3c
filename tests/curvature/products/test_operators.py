"""Hessian, Gauss-Newton, residual and Fisher products against dense float64 matrices; kept graphs."""

import gc

import pytest
import torch
from torch import nn

import flatmin
from flatmin.curvature.products.factored import FisherOperator, GaussNewtonOperator
from flatmin.curvature.products.operators import HessianOperator, ResidualOperator
from flatmin.vectors import Vector
from tests.contracts.live_bytes import LiveBytes
from tests.curvature.nets import NETS, criterion, dense_gauss_newton, dense_hessian, make


def flat(v: Vector) -> torch.Tensor:
    return torch.cat([t.flatten() for t in v.present])


def ragged(x, y):
    return [(x[:16], y[:16]), (x[16:], y[16:])]


def random_like(objective):
    return Vector(torch.randn_like(p) for p in objective.params)


@pytest.mark.parametrize("name", list(NETS))
def test_products_against_dense_matrices(name):
    model, x, y = make(name)
    objective = flatmin.Objective(model, criterion, ragged(x, y))
    hessian = dense_hessian(model, lambda: criterion(model(x), y))
    gauss_newton = dense_gauss_newton(model, lambda: model(x), lambda z: criterion(z, y))
    v = random_like(objective)
    for operator, matrix in [
        (HessianOperator(objective), hessian),
        (GaussNewtonOperator(objective), gauss_newton),
        (ResidualOperator(objective), hessian - gauss_newton),
    ]:
        for _ in range(2):  # the second product uses the kept graphs
            torch.testing.assert_close(flat(operator.product(v)), matrix @ flat(v), rtol=1e-9, atol=1e-11)
        assert operator.num_params == len(matrix)
        assert operator.cost == 2.0
        assert operator.name in operator.method
        assert "double backward" in operator.method


LOSSES = {
    "weights, smoothing, ignored": nn.CrossEntropyLoss(
        weight=torch.tensor([0.5, 1.0, 2.0]).double(), label_smoothing=0.1, ignore_index=2
    ),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "regression": lambda z, y: nn.functional.mse_loss(z, y.double().unsqueeze(1).expand_as(z)),
    "multi-label": lambda z, y: nn.functional.binary_cross_entropy_with_logits(
        z, nn.functional.one_hot(y, z.shape[1]).double()
    ),
}


@pytest.mark.parametrize("loss", list(LOSSES))
def test_gauss_newton_for_losses_of_many_kinds(loss):
    model, x, y = make("tanh")
    objective = flatmin.Objective(model, LOSSES[loss], [(x, y)])
    scale = len(x) if loss == "sum" else 1
    gauss_newton = dense_gauss_newton(model, lambda: model(x), lambda z: LOSSES[loss](z, y) / scale)
    v = random_like(objective)
    torch.testing.assert_close(
        flat(GaussNewtonOperator(objective).product(v)), gauss_newton @ flat(v), rtol=1e-9, atol=1e-11
    )


def test_the_empirical_fisher_is_the_mean_outer_product_of_the_samples_gradients():
    model, x, y = make("attention")
    objective = flatmin.Objective(model, criterion, ragged(x, y))
    params = list(model.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        rows = [torch.autograd.grad(criterion(model(a[None]), b[None]), params) for a, b in zip(x, y, strict=True)]
    gradients = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    v = random_like(objective)
    truth = gradients.T @ (gradients @ flat(v)) / len(x)
    torch.testing.assert_close(flat(FisherOperator(objective, "empirical").product(v)), truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("loss", ["cross-entropy", "regression"])
def test_the_fisher_of_drawn_targets_is_fixed_and_averages_to_gauss_newton(loss):
    model, x, y = make("relu")
    objective = flatmin.Objective(model, LOSSES.get(loss, criterion), ragged(x, y))
    v = random_like(objective)
    operator = FisherOperator(objective, "mc", seed=4)
    torch.testing.assert_close(flat(operator.product(v)), flat(FisherOperator(objective, "mc", seed=4).product(v)))
    forms = torch.stack([flat(FisherOperator(objective, seed=s).product(v)) @ flat(v) for s in range(100)])
    truth = flat(GaussNewtonOperator(objective).product(v)) @ flat(v)
    assert abs(forms.mean() - truth) < 3 * forms.std() / 10


def test_graphs_are_kept_within_their_bound_and_rebuilt_when_the_weights_change():
    model, x, y = make("tanh")
    evaluations = []
    model.register_forward_hook(lambda *_: evaluations.append(1))
    objective = flatmin.Objective(model, criterion, ragged(x, y))
    objective.check()
    v = random_like(objective)
    for memory, first, second in [(2**30, 2, 0), (0, 2, 2)]:
        operator = HessianOperator(objective, graph_memory=memory)
        assert ("graphs kept" in operator.method) == (memory > 0)
        assert operator.cost == (2.0 if memory else 3.0)
        for expected in (first, second):
            evaluations.clear()
            operator.product(v)
            assert len(evaluations) == expected
    operator = HessianOperator(objective)
    operator.product(v)
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(1.5)
    torch.testing.assert_close(flat(operator.product(v)), flat(HessianOperator(objective).product(v)))


def test_missing_entries_are_zeros():
    model, x, y = make("tanh")
    objective = flatmin.Objective(model, criterion, [(x, y)])
    v = random_like(objective)
    some = Vector([v.tensors[0], *[None] * (len(v) - 1)])
    zeros = Vector([v.tensors[0], *[torch.zeros_like(t) for t in v.present[1:]]])
    operator = HessianOperator(objective)
    torch.testing.assert_close(flat(operator.product(some)), flat(operator.product(zeros)))


def test_what_is_not_possible_is_refused():
    model, x, y = make("tanh")
    own = flatmin.Objective(model, None, [(x, y)], forward=lambda m, b: (criterion(m(b[0]), b[1]), b[1]))
    with pytest.raises(ValueError, match="need the outputs of the model and a criterion"):
        GaussNewtonOperator(own).product(own.zeros())
    pairs = flatmin.Objective(model, lambda z, y: criterion(z[0], y), [(x, y)], forward=lambda m, b: ((m(b[0]),), b[1]))
    with pytest.raises(ValueError, match="outputs that are one tensor, got tuple"):
        GaussNewtonOperator(pairs).product(own.zeros())
    with pytest.raises(ValueError, match="kind must be 'mc' or 'empirical', got 'exact'"):
        FisherOperator(own, "exact")  # type: ignore[arg-type]
    # The expectation of drawn targets would be Gauss-Newton's matrix, which is zero: the curvature is in log_softmax.
    likely = flatmin.Objective(torch.nn.Sequential(model, torch.nn.LogSoftmax(1)), torch.nn.NLLLoss(), [(x, y)])
    with pytest.raises(ValueError, match=r"linear in the outputs.*before log_softmax.*CrossEntropyLoss"):
        FisherOperator(likely).product(likely.zeros())
    assert float(FisherOperator(likely, "empirical").product(random_like(likely)).norm()) > 0
    # A batch of outliers is linear where it is, and no more than that: it has a share, which is zero.
    outliers = flatmin.Objective(model, lambda z, y: torch.nn.functional.huber_loss(z, 0 * z + 100), [(x, y)])
    assert float(FisherOperator(outliers).product(random_like(outliers)).norm()) == 0
    contrastive = flatmin.Objective(model, lambda z, y: (z @ z.T).logsumexp(1).mean(), [(x, y)])
    with pytest.raises(ValueError, match="targets cannot be drawn"):
        FisherOperator(contrastive).product(own.zeros())


def test_a_graph_that_was_built_away_from_home_is_not_used_later():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(8, 3, dtype=torch.float64)
    objective = flatmin.Objective(model, nn.MSELoss(), [(x, x[:, :1])])
    operator, v = HessianOperator(objective), objective.zeros().apply(torch.ones_like)
    with objective.displaced() as place:
        place.move(v)
        operator.product(v)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)  # one new version, as the displacement was
    found, truth = operator.product(v), HessianOperator(objective).product(v)
    torch.testing.assert_close(found.tensors, truth.tensors)


@pytest.mark.parametrize("name", list(NETS))
def test_kept_graphs_hold_the_gradient_too(name):
    model, x, y = make(name)
    objective = flatmin.Objective(model, criterion, ragged(x, y))
    truth, v = objective.gradient(), random_like(objective)
    evaluations = []
    for graph_memory, num_evaluations in ((2**31, 2), (0, 4)):
        operator = HessianOperator(objective, graph_memory=graph_memory)
        handle = model.register_forward_hook(lambda *_: evaluations.append(1))
        torch.testing.assert_close(flat(operator.gradient()), flat(truth), rtol=1e-10, atol=1e-13)
        operator.product(v)
        handle.remove()
        assert len(evaluations) == num_evaluations
        evaluations.clear()


@pytest.mark.parametrize("kind", [HessianOperator, ResidualOperator, GaussNewtonOperator, FisherOperator])
def test_kept_graphs_take_the_memory_that_is_said_and_no_copy_of_the_parameters_each(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    data = [(torch.randn(2, 64), torch.randint(64, (2,))) for _ in range(10)]
    copy = sum(p.numel() * p.element_size() for p in model.parameters())

    def live_and_said(batches):
        objective = flatmin.Objective(model, criterion, batches)
        with LiveBytes() as memory:
            memory.ignore(*model.parameters(), *[t for batch in batches for t in batch])
            operator = kind(objective)
            operator.product(objective.zeros().apply(torch.ones_like))
            operator.product(objective.zeros().apply(torch.ones_like))
            gc.collect()
            return memory.live, operator._graph_bytes

    (few, said_of_few), (many, said_of_many) = live_and_said(data[:2]), live_and_said(data)
    assert 0 < many - few < 2 * (said_of_many - said_of_few) < copy


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
def test_a_product_goes_through_all_kept_graphs_and_is_that_of_fresh_ones(kind):
    """Ragged batches, one of which does not use the first layer."""
    torch.manual_seed(0)
    first, last = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()
    model = nn.ModuleList([first, last])

    def forward(model, batch):
        x, y = batch
        return model[1](x if x.shape[1] == 4 else torch.tanh(model[0](x))), y

    batches = [(torch.randn(n, d, dtype=torch.float64), torch.randint(3, (n,))) for n, d in [(7, 5), (3, 4), (7, 5)]]
    objective = flatmin.Objective(model, criterion, batches, forward=forward)
    kept, fresh = kind(objective), kind(objective, graph_memory=0)
    for _ in range(3):
        v = random_like(objective)
        torch.testing.assert_close(flat(kept.product(v)), flat(fresh.product(v)), rtol=1e-12, atol=1e-15)


class TimeFirst(nn.Module):
    """Outputs (T, N, C) of inputs (N, T, ...)."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).transpose(0, 1)


def test_the_empirical_fisher_matrix_wants_samples_first():
    torch.manual_seed(0)
    layer, x, y = nn.Linear(2, 3).double(), torch.randn(4, 5, 2, dtype=torch.float64), torch.randint(3, (4, 5))
    cross_entropy = nn.functional.cross_entropy
    objective = flatmin.Objective(TimeFirst(layer), lambda z, y: cross_entropy(z.permute(1, 2, 0), y), [(x, y)])
    with pytest.raises(ValueError, match="a row of outputs for each sample"):
        FisherOperator(objective, "empirical").product(objective.gradient())
    first = flatmin.Objective(layer, lambda z, y: cross_entropy(z.permute(0, 2, 1), y), [(x, y)])
    assert FisherOperator(first, "empirical").product(objective.gradient()).norm() > 0


class ClassesSecond(nn.Module):
    """Outputs (N, C, T), as nn.CrossEntropyLoss wants them, by a transposition: not contiguous."""

    def __init__(self, contiguous: bool):
        super().__init__()
        self.body, self.head, self.contiguous = nn.Linear(2, 4), nn.Linear(4, 3), contiguous

    def forward(self, x):
        out = self.head(torch.relu(self.body(x))).transpose(1, 2)
        return out.contiguous() if self.contiguous else out


def test_outputs_need_not_be_contiguous():
    found = []
    for contiguous in (True, False):
        torch.manual_seed(0)
        model = ClassesSecond(contiguous).double()
        data = [(torch.randn(n, 5, 2, dtype=torch.float64), torch.randint(3, (n, 5))) for n in (3, 2)]
        found.append(flatmin.trace(flatmin.Objective(model, nn.CrossEntropyLoss(), data)))
    assert found[1].stderr == 0.0
    assert found[1].value == pytest.approx(found[0].value, rel=1e-12)
