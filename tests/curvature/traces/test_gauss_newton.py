"""tr G by per-sample norms against dense matrices, for layers of many kinds; when it is all of the Hessian's trace."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatmin
from flatmin.curvature.per_sample.norms import PerSample
from flatmin.curvature.traces import gauss_newton as module
from flatmin.curvature.traces.gauss_newton import ClassVectors, exact_trace, split_of
from flatmin.vectors import Vector
from tests.curvature.nets import NETS, criterion, dense_gauss_newton, dense_hessian, make

SAMPLES = 6


class Tokens(nn.Module):
    """Embedding with padding, class token, position embedding, scale, an encoder layer; samples second inside it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.first = nn.Parameter(torch.randn(1, 1, 4))
        self.position = nn.Parameter(torch.randn(1, 6, 4) / 3)
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, "gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.first.expand(len(tokens), -1, -1), self.embed(tokens)], 1) + self.position
        return self.head(self.layer(x * self.scale)[:, 0])


class Tied(nn.Module):
    """A table used as embedding and as output, a layer used twice side by side."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.twice = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return (self.twice(x[:, 0]) + self.twice(x[:, 1])) @ self.embed.weight.T


class Positions(nn.Module):
    """Positions that are looked up once for all samples (BERT, GPT-2), and a parameter that is cut to their number."""

    def __init__(self, how: str):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 4), nn.Embedding(8, 4)
        self.cut = nn.Parameter(torch.randn(1, 9, 4) / 3)
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.how = how

    def forward(self, tokens: Tensor) -> Tensor:
        number = tokens.shape[1]
        index = torch.arange(number) % 3 if self.how == "the same twice" else torch.arange(number)
        positions = self.positions(index.unsqueeze(0) if self.how == "one row" else index)
        if self.how == "expanded":
            positions = positions.expand(len(tokens), -1, -1)
        x = self.tokens(tokens) + positions + self.cut[:, 1 : 1 + number]
        return self.head(torch.tanh(self.layer(x)).mean(1))


class Product(nn.Module):
    """x W with W not transposed, W used twice side by side."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.bend = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).tanh() @ self.bend + (x.flip(1) @ self.weight).tanh()


class Residual(nn.Module):
    """relu(x + f(x)), with batch norm and pooling."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(F.leaky_relu(x + self.norm(self.conv(x))), 2).flatten(1))


def net(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


IMAGES, LINES = torch.randn(SAMPLES, 2, 5, 5), torch.randn(SAMPLES, 2, 9)
LAYERS = {
    "grouped, strided, dilated convolution": (
        lambda: net(nn.Conv2d(2, 4, 2, stride=2, padding=1, dilation=2, groups=2), nn.Flatten(), nn.Linear(36, 3)),
        IMAGES,
    ),
    "one-dimensional convolution": (
        lambda: net(nn.Conv1d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)),
        LINES,
    ),
    "few positions": (
        lambda: net(nn.Conv2d(2, 4, 4, groups=2), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Flatten()),
        torch.randn(SAMPLES, 2, 5, 5),
    ),
    "many positions": (
        lambda: net(nn.Linear(9, 40), nn.Tanh(), nn.Linear(40, 2), nn.Flatten(), nn.Linear(4, 3)),
        LINES,
    ),
    "batch norm": (Residual, IMAGES),
    "group norm": (
        lambda: net(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(36, 3)),
        IMAGES,
    ),
    "no bias, three dimensions": (
        lambda: net(nn.Linear(9, 4, bias=False), nn.LayerNorm(4), nn.Flatten(), nn.Linear(8, 3)),
        LINES,
    ),
    "tokens": (Tokens, torch.randint(0, 7, (SAMPLES, 5))),
    **{
        f"positions, {how}": (lambda how=how: Positions(how), torch.randint(0, 7, (SAMPLES, 5)))
        for how in ("one row", "no row", "expanded", "the same twice")
    },
    "as many positions as samples": (lambda: Positions("no row"), torch.randint(0, 7, (SAMPLES, SAMPLES))),
    "tied": (Tied, torch.randint(0, 5, (SAMPLES, 2))),
    "plain product": (Product, torch.randn(SAMPLES, 4)),
}


def build(layers: str):
    torch.manual_seed(0)
    make_model, x = LAYERS[layers]
    model = make_model().double().eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    x = x.double() if x.is_floating_point() else x
    return model, x, torch.randint(3, (SAMPLES,))


def traces_by_param(model: nn.Module, matrix: Tensor) -> Tensor:
    found, start = [], 0
    for p in model.parameters():
        found.append(matrix.diagonal()[start : start + p.numel()].sum())
        start += p.numel()
    return torch.stack(found)


@pytest.mark.parametrize("layers", list(LAYERS))
def test_exact_for_every_parameter(layers):
    model, x, y = build(layers)
    objective = flatmin.Objective(model, criterion, [(x[:4], y[:4]), (x[4:], y[4:])])
    truth = dense_gauss_newton(model, lambda: model(x), lambda z: criterion(z, y))
    split = split_of(objective)
    assert split.exact, split.reason
    torch.testing.assert_close(exact_trace(objective, split), traces_by_param(model, truth), rtol=1e-10, atol=1e-12)


def test_a_first_batch_of_one_sample_does_not_say_where_the_samples_are():
    model, x, y = build("tokens")  # inside the encoder layer they come second
    objective = flatmin.Objective(model, criterion, [(x[:1], y[:1]), (x[1:], y[1:])])
    truth = dense_gauss_newton(model, lambda: model(x), lambda z: criterion(z, y))
    traces = exact_trace(objective, split_of(objective))
    torch.testing.assert_close(traces, traces_by_param(model, truth), rtol=1e-10, atol=1e-12)


def test_a_trace_that_is_not_finite_is_refused():
    model, x, y = net(nn.Linear(4, 3), nn.Softplus()), torch.randn(6, 4), torch.zeros(6, dtype=torch.long)
    objective = flatmin.Objective(model, lambda z, y: F.mse_loss(z, F.one_hot(y, 3).float()), [(x, y)])
    split = split_of(objective)
    with torch.no_grad():
        x[0] = 1e30  # its gradient overflows when it is squared
        model.get_parameter("0.weight").zero_()
    with pytest.raises(ValueError, match=r"not finite.*'0\.weight'"):
        exact_trace(objective, split)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("where", ["in the criterion", "left by the forward pass"])
def test_a_loss_that_is_more_than_one_of_the_outputs_is_not_split(activation, where):
    model = net(nn.Linear(4, 5), activation(), nn.Linear(5, 3)).double()
    x, y = torch.randn(12, 4).double(), torch.randint(3, (12,))
    left = []
    model.get_submodule("1").register_forward_hook(lambda _module, _args, hidden: left.append(hidden.square().mean()))

    def penalised(z, y):
        penalty = sum(p.square().sum() for p in model.parameters()) if where == "in the criterion" else left[-1]
        return F.cross_entropy(z, y) + 0.1 * penalty

    objective = flatmin.Objective(model, penalised, [(x, y)])
    truth = dense_hessian(model, lambda: penalised(model(x), y)).trace().item()
    found = flatmin.trace(objective, max_products=100)
    assert "not only through the outputs" in found.method
    assert 0 < abs(found.value - truth) < 4 * found.stderr
    with pytest.raises(ValueError, match="not only through the outputs"):
        flatmin.trace(objective, method="gauss-newton")
    with pytest.raises(ValueError, match="not only through the outputs"):
        flatmin.GaussNewtonOperator(objective).product(Vector(objective.params))


LOSSES = {
    "class weights, smoothing": nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0]).double(), label_smoothing=0.1),
    "ignored": nn.CrossEntropyLoss(ignore_index=1),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "regression": lambda z, y: F.mse_loss(z, F.one_hot(y, 3).double()),
    "multi-label": lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 3).double()),
    "of the norm": lambda z, y: (z.square().sum(1) + 1).log().mean() + z[:, 0].mean(),
}


@pytest.mark.parametrize("loss", list(LOSSES))
def test_exact_for_losses_of_many_kinds(loss):
    model, x, y = build("batch norm")
    objective = flatmin.Objective(model, LOSSES[loss], [(x, y)])
    scale = len(x) if loss == "sum" else 1
    truth = dense_gauss_newton(model, lambda: model(x), lambda z: LOSSES[loss](z, y) / scale)
    traces = exact_trace(objective, split_of(objective))
    torch.testing.assert_close(traces, traces_by_param(model, truth), rtol=1e-10, atol=1e-12)


def test_a_criterion_that_takes_probabilities_only():
    model, x, y = build("batch norm")
    model, loss = net(model, nn.Sigmoid()), lambda z, y: F.binary_cross_entropy(z, F.one_hot(y, 3).double())
    objective = flatmin.Objective(model, loss, [(x, y)])
    truth = dense_gauss_newton(model, lambda: model(x), lambda z: loss(z, y)).trace()
    assert float(exact_trace(objective, split_of(objective)).sum()) == pytest.approx(float(truth), rel=1e-10)


def test_a_confident_prediction_does_not_spoil_the_factors():
    model, x, y = make("relu")
    with torch.no_grad():
        model.get_parameter("4.weight").mul_(30.0)  # probabilities of nearly 0 and 1
    objective = flatmin.Objective(model, criterion, [(x, y)])
    truth = dense_gauss_newton(model, lambda: model(x), lambda z: criterion(z, y)).trace()
    assert float(exact_trace(objective, split_of(objective)).sum()) == pytest.approx(float(truth), rel=1e-8, abs=0)


PIECEWISE = {
    "relu": lambda: net(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.Hardtanh(), nn.Linear(8, 3)),
    "smooth": lambda: net(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)),
    "functional": lambda: Functional(F.relu),
    "functional, smooth": lambda: Functional(F.softplus),
    "twice in a row": lambda: Repeated(),
    "side by side": lambda: Siamese(),
    "divided": lambda: Divided(),
    "multiplied": lambda: Multiplied(),
}


class Functional(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.one, self.two, self.activation = nn.Linear(5, 5), nn.Linear(5, 3), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.activation(self.one(x)))


class Repeated(Functional):
    def __init__(self):
        super().__init__(F.relu)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.activation(self.one(self.activation(self.one(x)))))


class Siamese(Repeated):
    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.activation(self.one(x)) - self.activation(self.one(x.flip(1))))


class Divided(Repeated):
    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.activation(self.one(x))) / (3 + self.one.bias.sum())


class Multiplied(Repeated):
    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.activation(self.one(x)) * self.one.bias)


@pytest.mark.parametrize("kind", list(PIECEWISE))
def test_nets_whose_trace_is_that_of_gauss_newton_are_recognised(kind):
    torch.manual_seed(0)
    model, x, y = PIECEWISE[kind]().double(), torch.randn(8, 5).double(), torch.randint(3, (8,))
    hessian = dense_hessian(model, lambda: criterion(model(x), y))
    gauss_newton = dense_gauss_newton(model, lambda: model(x), lambda z: criterion(z, y))
    equal = math.isclose(float(hessian.trace()), float(gauss_newton.trace()), rel_tol=1e-9)
    assert split_of(flatmin.Objective(model, criterion, [(x, y)])).piecewise_linear == equal


def test_what_the_recorded_operations_claim_is_verified(monkeypatch):
    monkeypatch.setattr(module, "curved", lambda *_: set())
    model, x, y = make("tanh")
    split = split_of(flatmin.Objective(model, criterion, [(x, y)]))
    assert not split.piecewise_linear
    assert set(split.curved) <= {"0.weight", "0.bias", "2.weight", "2.bias"}


def draws(objective, split, count=400) -> Tensor:
    return ClassVectors(objective, split, 0).draw(0, count)


@pytest.mark.parametrize("loss", [criterion, LOSSES["regression"], LOSSES["of the norm"]])
@pytest.mark.parametrize("norms", [True, False])
def test_random_class_vectors_are_unbiased_for_every_parameter(loss, norms):
    model, x, y = build("batch norm")
    objective = flatmin.Objective(model, loss, [(x[:4], y[:4]), (x[4:], y[4:])])
    truth = traces_by_param(model, dense_gauss_newton(model, lambda: model(x), lambda z: loss(z, y)))
    split = split_of(objective)
    if not norms:
        split = module.Split(num_vectors=0, kind=split.kind, layouts=None, reason="none", curved=(), checked=())
    found = draws(objective, split)
    assert ((found.mean(0) - truth).abs() <= 4 * found.std(0) / math.sqrt(len(found)) + 1e-12).all()


def test_a_language_model_with_many_classes_at_many_positions():
    torch.manual_seed(0)
    model = net(nn.Embedding(40, 6), nn.Linear(6, 40)).double()
    tokens = torch.randint(40, (8, 5))
    loss = lambda z, y: F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten())  # noqa: E731
    objective = flatmin.Objective(model, loss, [(tokens, tokens)])
    truth = float(dense_hessian(model, lambda: loss(model(tokens), tokens)).trace())
    result = flatmin.trace(objective, rtol=0.02)
    assert "Gauss-Newton by random class vectors; equal to the Hessian's" in result.method
    assert result.num_products == 0
    assert abs(result.value - truth) < 4 * result.stderr
    assert result.stderr <= 0.02 * result.value


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(0)) - self.layer(x).mean(0)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)), "a parameter enters by"),
        (Mixing(), "the samples of a batch are mixed"),
        (net(nn.Linear(5, 70)), "more than 64 outputs"),
    ],
)
def test_what_cannot_be_exact_says_why(model, reason):
    objective = flatmin.Objective(model, criterion, [(torch.randn(6, 5), torch.randint(3, (6,)))])
    split = split_of(objective)
    assert not split.exact
    assert reason in split.reason


@pytest.mark.parametrize("name", list(NETS))
def test_single_precision(name):
    model, x, y = make(name)
    objective = flatmin.Objective(model, criterion, [(x, y)])
    truth = float(exact_trace(objective, split_of(objective)).sum())
    x = x.float() if x.is_floating_point() else x
    single = flatmin.Objective(model.float(), criterion, [(x, y)])
    assert float(exact_trace(single, split_of(single)).sum()) == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_norms_of_one_sample_alone_are_those_of_all(groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=groups), nn.Flatten())
    outputs = model(torch.randn(5, 4, 3, 3))
    (use, _) = PerSample(outputs, list(model.parameters())).uses
    delta = torch.randn(2, 5, 6, 3, 3)
    assert torch.equal(use.norms_alone(delta, 2), use.norms(delta))  # the others have some too: nothing is left out
    one = torch.zeros_like(delta)
    one[:, 2] = delta[:, 2]
    found = use.norms_alone(one, 2)
    assert torch.allclose(found, use.norms(one))
    assert found[:, 2].min() > 0
    assert not found[:, [0, 1, 3, 4]].any()
