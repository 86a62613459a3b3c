"""Where measurements used to be wrong in silence, or ended in somebody else's error; against independent truths."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flatmin
from flatmin.curvature.function.objective import Objective
from flatmin.curvature.products.factored import GaussNewtonOperator
from flatmin.curvature.products.graph import curved
from flatmin.curvature.products.operators import HessianOperator
from flatmin.curvature.products.probes import VectorProbes
from flatmin.curvature.products.seen import seen
from flatmin.curvature.products.ways import choose_way
from flatmin.vectors import Vector
from tests.curvature.nets import criterion, dense_gauss_newton, dense_hessian, make


def flat(v):
    return torch.cat([t.flatten() for t in v.present])


def random_like(objective, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Vector(torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in objective.params)


def dense_by_differences(model, objective, step=1e-5):
    """The Hessian from differences of first gradients: independent of any second derivative."""
    params, columns = list(objective.params), []
    for p in params:
        for i in range(p.numel()):
            grads = []
            for sign in (1, -1):
                with torch.no_grad():
                    p.view(-1)[i] += sign * step
                grads.append(flat(objective.gradient()))
                with torch.no_grad():
                    p.view(-1)[i] -= sign * step
            columns.append((grads[0] - grads[1]) / (2 * step))
    return torch.stack(columns)


# -- kept graphs whose weights have moved unseen ------------------------------------------------------------------


def by_fused(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()


def by_data(model):
    for p in model.parameters():
        p.data.add_(0.1)


def by_statistics(model):
    model.get_buffer("norm.running_mean").add_(0.3)


def by_data_of_a_buffer(model):
    model.get_buffer("norm.running_var").data.mul_(2.0)


def by_a_parameter_that_is_not_measured(model):
    with torch.no_grad():
        model.get_parameter("head.weight").mul_(1.5)


@pytest.mark.parametrize(
    "change", [by_fused, by_data, by_statistics, by_data_of_a_buffer, by_a_parameter_that_is_not_measured]
)
def test_graphs_are_built_anew_however_the_model_was_changed(change):
    model, x, y = make("conv")
    names = None if change is not by_a_parameter_that_is_not_measured else ["conv.weight", "shared.weight"]
    objective = flatmin.Objective(model, criterion, [(x[:16], y[:16]), (x[16:], y[16:])], params=names)
    operator, v = HessianOperator(objective), random_like(objective)
    before = operator.product(v)
    change(model)
    found, truth = operator.product(v), HessianOperator(objective, graph_memory=0).product(v)
    torch.testing.assert_close(flat(found), flat(truth), rtol=1e-10, atol=1e-12)
    assert (flat(found) - flat(before)).norm() > 1e-3 * flat(before).norm()


def test_a_tracker_follows_a_fused_optimizer_and_keeps_no_graph():
    model, x, y = make("tanh")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    tracker = flatmin.Tracker(flatmin.Objective(model, criterion, [(x, y)]), max_overhead=1, num_steps=60)
    for step in range(3):
        for _ in range(10):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        point = tracker.update(step)
        truth = torch.linalg.eigvalsh(dense_hessian(model, lambda: criterion(model(x), y)))[-1]
        assert point is not None
        assert abs(point.lambda_max.value - truth) < 1e-6
        assert not tracker._operator._kept


def test_what_is_seen_of_tensors():
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.bool):
        t = torch.ones(3, 4, dtype=dtype).T
        before = seen([t])
        assert seen([t]) == before
        t.data[0, 0] = 0
        assert seen([t]) != before
    assert seen([torch.empty(0), torch.eye(2).to_sparse()]) is not None


# -- second derivatives that are wrong in torch --------------------------------------------------------------------


def weight_normed(name):
    torch.manual_seed(0)
    norm = nn.utils.parametrizations.weight_norm
    if name == "conv":
        return nn.Sequential(norm(nn.Conv1d(2, 3, 3)), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    first = nn.Linear(4, 5)
    first = nn.utils.weight_norm(first) if name == "old" else norm(first, dim=1 if name == "columns" else 0)
    return nn.Sequential(first, nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["rows", "columns", "conv", "old"])
def test_weight_norm(name):
    model = weight_normed(name)
    x = torch.randn(12, 2, 6, dtype=torch.float64) if name == "conv" else torch.randn(12, 4, dtype=torch.float64)
    y = torch.randint(3, (12,))
    objective = flatmin.Objective(model, criterion, [(x, y)])
    truth = dense_by_differences(model, objective)
    v = random_like(objective)
    operator = HessianOperator(objective)
    assert operator.way.name == "autograd"
    torch.testing.assert_close(flat(operator.product(v)), truth @ flat(v), rtol=1e-6, atol=1e-8)
    top = flatmin.top_eigenvalues(objective, 2)
    torch.testing.assert_close(
        torch.tensor(top.values, dtype=torch.float64), torch.linalg.eigvalsh(truth).flip(0)[:2], rtol=1e-5, atol=1e-8
    )
    gauss_newton = dense_gauss_newton(model, lambda: model(x), lambda z: criterion(z, y))
    product = flat(GaussNewtonOperator(objective).product(v))
    torch.testing.assert_close(product, gauss_newton @ flat(v), rtol=1e-6, atol=1e-8)


class Crooked(torch.autograd.Function):
    """A square whose backward pass says twice what it should, times something that is no gradient of anything."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w.square().sum()

    @staticmethod
    def backward(ctx, *grads):
        (w,), (g,) = ctx.saved_tensors, grads
        return g * 2 * w + 0.5 * g * w.roll(1) * w.detach().roll(2)


def test_a_second_derivative_that_is_not_symmetric_is_not_used():
    model = nn.Linear(3, 1, bias=False).double()
    objective = flatmin.Objective(
        model,
        None,
        [torch.zeros(1)],
        forward=lambda m, batch: (Crooked.apply(m.get_parameter("weight").view(-1)), batch),
    )
    way = choose_way(objective)
    assert way.name == "difference"
    assert "second derivative of an operation is not symmetric" in way.text
    with pytest.raises(ValueError, match="not symmetric"):
        choose_way(objective, "autograd")


def test_kinks_are_no_asymmetry_and_are_named():
    model, x, y = make("relu")
    way = choose_way(flatmin.Objective(model.float(), criterion, [(x.float(), y)]))
    assert way.name == "autograd"
    assert way.cross_check is None or way.cross_check <= 0.1 or "see kinks too: they differ by" in way.text


def test_the_modulus_of_complex_numbers_is_not_piecewise_linear():
    class Modulus(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
            self.head = nn.Linear(4, 3).double()

        def forward(self, x):
            return self.head((x.to(torch.complex128) @ (self.w * (1 + 2j)) + 1j * x).abs())

    truths, found = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        model, x, y = Modulus(), torch.randn(10, 4, dtype=torch.float64), torch.randint(3, (10,))
        objective = flatmin.Objective(model, criterion, [(x, y)])
        result = flatmin.trace(objective, rtol=0.01, seed=seed)
        assert curved(model(x), list(model.parameters())) == {0}
        assert "equal to the Hessian's" not in result.method
        truths.append(float(dense_hessian(model, lambda m=model, x=x, y=y: criterion(m(x), y)).trace()))
        found.append((result.value, result.stderr))
    for truth, (value, error) in zip(truths, found, strict=True):
        assert abs(value - truth) < 4 * error + 1e-9


# -- errors of others ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["hutch++", "xtrace", "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "mixed"])
def test_half_precision_and_mixtures(method, dtype):
    model, x, y = make("tanh")
    truth = float(dense_hessian(model, lambda: criterion(model(x), y)).trace())
    if dtype == "mixed":
        model = nn.Sequential(*[part.float() if i == 0 else part for i, part in enumerate(model.children())])
        forward = lambda m, b: (m[1:](m[0](b[0].float()).double()), b[1])  # noqa: E731
    else:
        model, x, forward = model.to(dtype), x.to(dtype), None
    objective = flatmin.Objective(model, criterion, [(x, y)], forward=forward)
    result = flatmin.trace(objective, method=method, max_products=40)
    assert abs(result.value - truth) < 4 * result.stderr + (1e-5 if dtype == "mixed" else 0.05) * truth


def test_a_loss_that_cannot_be_differentiated_twice_by_the_outputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    x, y = torch.randn(6, 2, 3, dtype=torch.float64), torch.randint(1, 4, (2, 2))

    def ctc(outputs, targets):
        lengths = torch.full((2,), 6), torch.full((2,), 2)
        return F.ctc_loss(outputs.log_softmax(2), targets, *lengths)

    objective = flatmin.Objective(model, ctc, [(x, y)])
    result = flatmin.trace(objective, max_products=60)
    truth = float(dense_by_differences(model, objective).trace())
    assert abs(result.value - truth) < 4 * result.stderr


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
@pytest.mark.parametrize("rtol", [None, 1e-9])
def test_the_time_is_a_limit_for_every_method(method, rtol, monkeypatch):
    """By a clock that goes on by one second with each product."""
    model, x, y = make("attention")
    now = [0.0]
    monkeypatch.setattr("flatmin.curvature.products.probes.time.monotonic", lambda: now[0])
    product, draw = HessianOperator.product, VectorProbes.draw

    def counted(self, v):
        now[0] += 1
        return product(self, v)

    def drawn(self, first, size):
        now[0] += size
        return draw(self, first, size)

    monkeypatch.setattr(HessianOperator, "product", counted)
    monkeypatch.setattr("flatmin.curvature.products.probes.VectorProbes.draw", drawn)
    objective = flatmin.Objective(model, criterion, [(x, y)])
    used = []
    for seconds in (60, 100):
        begin = now[0]
        result = flatmin.trace(objective, method=method, rtol=rtol, max_seconds=seconds)
        used.append(now[0] - begin)
        assert used[-1] <= 1.1 * seconds
        assert math.isfinite(result.stderr)
    assert used[1] > used[0] > 20


def test_padding_is_treated_alike_with_gradients_and_without():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 1), "head": nn.Linear(8, 3)}).eval()
    x, y = torch.randn(6, 5, 8), torch.randint(3, (6,))
    padding = torch.arange(5) >= torch.tensor([5, 4, 3, 5, 2, 4])[:, None]

    def forward(model, batch):
        return model["head"](model["encoder"](batch[0], src_key_padding_mask=padding).mean(1)), batch[1]

    objective = flatmin.Objective(model, criterion, [(x, y)], forward=forward)
    assert objective.loss() == pytest.approx(objective.loss_and_gradient()[0], rel=1e-6)
    assert torch.backends.mha.get_fastpath_enabled()


def test_rounding_counts_when_a_result_says_that_it_is_converged():
    model, x, y = make("tanh")
    objective = flatmin.Objective(model.float(), criterion, [(x.float(), y)])
    assert flatmin.noise_stability(objective, 0.1).converged
    result = flatmin.noise_stability(objective, 1e-5)
    assert result.stderr > 0.05 * abs(result.value)
    assert not result.converged


def test_a_kept_measurement_goes_on_with_a_loader_that_shuffles(tmp_path):
    model, x, y = make("tanh", 60)
    loader = DataLoader(TensorDataset(x.float(), y), batch_size=7, shuffle=True)
    path = tmp_path / "deep" / "kept.json"
    reports = []
    for seed in range(5):
        torch.manual_seed(seed)
        reports.append(flatmin.measure(model.float(), criterion, loader, rtol=0.2, store=path).to_dict())
    assert all(report["trace"] == reports[0]["trace"] for report in reports)
    with torch.no_grad():
        model.get_parameter("3.bias").add_(1e-3)
    with pytest.raises(ValueError, match=r"weights.* differ"):
        flatmin.measure(model, criterion, loader, rtol=0.2, store=path)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: ({"loss": m(b[0]).sum()}, b[1]), r"without a criterion the model must return its loss.*dict"),
        (lambda m, b: (m(b[0]), b[1]), r"without a criterion the model must return its loss.*\(24, 3\)"),
    ],
)
def test_a_model_that_returns_no_loss_is_not_told_about_a_criterion(loss, message):
    model, x, y = make("tanh")
    with pytest.raises(ValueError, match=message):
        flatmin.Objective(model, None, [(x, y)], forward=loss).loss()


@pytest.mark.filterwarnings("ignore:what autograd gives is not the gradient")  # as it is, where rows are shortened
def test_a_table_that_forward_shortens_is_left_as_it_was():
    torch.manual_seed(0)
    table = nn.Embedding(7, 4, max_norm=0.5)
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(8, 3)).double()
    x, y = torch.randint(7, (12, 2)), torch.randint(3, (12,))
    before = table.weight.detach().clone()
    assert before.norm(dim=1).max() > 1
    objective = flatmin.Objective(model, criterion, [(x, y)])
    for measure in (
        Objective.loss,
        Objective.gradient,
        flatmin.trace,
        flatmin.top_eigenvalues,
        lambda o: flatmin.noise_stability(o, 0.01),
        lambda o: flatmin.ascent_sharpness(o, 0.01),
    ):
        measure(objective)
        assert torch.equal(table.weight, before)


@pytest.mark.parametrize("forward", [lambda m, b: m(b[0]), lambda m, b: m(b[0]).sum(), lambda m, b: {"a": 1, "b": 2}])
def test_what_forward_returns_is_not_unpacked_by_chance(forward):
    model, x, y = make("relu")
    with pytest.raises(ValueError, match=r"forward must return \(outputs, targets\), got"):
        flatmin.Objective(model, criterion, [(x[:2], y[:2])], forward=forward).loss()


class Once(torch.autograd.Function):
    """x^2, whose second derivative raises without a word."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, slope):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return OnceBackward.apply(x, slope)


class OnceBackward(torch.autograd.Function):
    """Its first derivative."""

    @staticmethod
    def forward(ctx, x, slope):
        return 2 * x * slope

    @staticmethod
    def backward(ctx, slope):  # type: ignore[override]
        raise NotImplementedError


def test_an_error_that_says_nothing_is_a_reason_too():
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), torch.randn(8, 3).double(), torch.randn(8, 2).double()
    objective = flatmin.Objective(model, lambda out, y: Once.apply(out - y).mean(), [(x, y)])  # type: ignore[union-attr]
    assert "double backward failed: NotImplementedError" in choose_way(objective).text
    truth = float(dense_hessian(model, lambda: (model(x) - y).square().mean()).trace())
    found = flatmin.trace(objective, max_products=40)
    assert abs(found.value - truth) < 4 * found.stderr + 1e-6


def test_differences_at_a_kink_are_warned_of():
    """At a hinge a difference of slopes is 1 / (2 length), whatever the length."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    objective = flatmin.Objective(model, lambda z, y: (z - y).relu().mean(), [(torch.ones(4, 1), torch.ones(4, 1))])
    with pytest.warns(RuntimeWarning, match="the loss has kinks near the weights, or single precision is too coarse"):
        choose_way(objective, "difference")


@pytest.mark.parametrize("seed", range(4))
def test_probes_for_a_subspace_that_was_too_small_are_counted(seed, monkeypatch):
    counts = {"products": 0}
    product, draw = HessianOperator.product, VectorProbes.draw

    def counted(self, v):
        counts["products"] += 1
        return product(self, v)

    def drawn(self, first, size):
        counts["products"] += size
        return draw(self, first, size)

    monkeypatch.setattr(HessianOperator, "product", counted)
    monkeypatch.setattr(VectorProbes, "draw", drawn)
    model, x, y = make("attention")
    objective = flatmin.Objective(model, criterion, [(x, y)])
    for limit in (60, 2000):
        counts["products"] = 0
        result = flatmin.trace(objective, method="hutch++", rtol=0.002, max_products=limit, seed=seed)
        assert result.num_products == counts["products"] <= limit


def test_a_measurement_stands_for_its_number():
    model, x, y = make("relu")
    result = flatmin.trace(flatmin.Objective(model, criterion, [(x, y)]))
    assert float(result) == result.value
    assert f"{result:.3f}" == f"{result.value:.3f}"
    assert f"{result}" == str(result)


def test_a_criterion_with_a_state_is_left_as_it_was_and_named_where_it_changes_the_loss():
    class Logging(nn.CrossEntropyLoss):
        mean: torch.Tensor

        def __init__(self, centred):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
            self.centred = centred

        def forward(self, input, target):
            self.mean.lerp_(input.detach().mean(0), 0.1)
            return super().forward(input - self.mean if self.centred else input, target)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = [(torch.randn(12, 6, dtype=torch.float64), torch.randint(3, (12,))) for _ in range(2)]
    logging = Logging(centred=False)
    flatmin.measure(model, logging, data)
    assert torch.equal(logging.mean, torch.zeros(3))
    centred = Logging(centred=True)
    with pytest.raises(ValueError, match="or Logging may have a state or be random"):
        flatmin.measure(model, centred, data)
    assert torch.equal(centred.mean, torch.zeros(3))
