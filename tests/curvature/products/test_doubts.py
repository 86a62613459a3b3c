"""Where what autograd gives is no gradient of the loss, or its second derivative is wrong, that is said; else not."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flatmin
from flatmin.curvature.function.sharded import gradients
from flatmin.curvature.products.doubts import slope_ratio
from flatmin.curvature.products.ways import choose_way
from flatmin.vectors import Vector
from tests.curvature.nets import NETS

NO_GRADIENT = "what autograd gives is not the gradient of the loss: along it, the loss of one batch changes {} times as"


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return -grad


class Saving(torch.autograd.Function):
    """x sigmoid(x), whose backward takes the sigmoid for a constant when it is differentiated itself."""

    @staticmethod
    def forward(ctx, x):
        s = torch.sigmoid(x)
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        x, s = ctx.saved_tensors
        return grad * (s * (1 + x * (1 - s)))


class Net(nn.Module):
    def __init__(self, between=torch.tanh):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.between = nn.Linear(6, 8), nn.Linear(8, 3), between
        self.double()

    def forward(self, x):
        return self.second(self.between(self.first(x)))


def objective(model, dtype=torch.float64):
    torch.manual_seed(1)
    x, y = torch.randn(24, 6, dtype=dtype), torch.randint(3, (24,))
    return flatmin.Objective(model, nn.CrossEntropyLoss(), [(x[:12], y[:12]), (x[12:], y[12:])])


def hooked(hook):
    model = Net()
    for p in model.parameters():
        p.register_hook(hook)
    return model


def stopped():
    """Half of what reaches the output passes a detach."""
    return Net(lambda x: torch.tanh(x) + 0.9 * torch.tanh(x).detach())


FIELDS = {
    "hooks that scale": (lambda: hooked(lambda grad: 0.1 * grad), "10"),
    "hooks that clip": (lambda: hooked(lambda grad: grad.clamp(-0.01, 0.01)), ""),
    "a reversal": (lambda: Net(lambda x: Reverse.apply(torch.tanh(x))), ""),
    "a detach": (stopped, ""),
}


@pytest.mark.parametrize("name", FIELDS)
def test_what_is_no_gradient_is_said(name):
    make, ratio = FIELDS[name]
    with pytest.warns(RuntimeWarning, match=NO_GRADIENT.format(ratio or r"-?[\d.]+")):
        choose_way(objective(make()))


def test_the_ratio_is_that_of_the_directional_derivative():
    """Against the gradient of the same network without the hook, in closed form."""
    model, plain = hooked(lambda grad: grad.clamp(-0.01, 0.01)), Net()
    found, truth = (objective(m) for m in (model, plain))
    batch = next(iter(found.batches()))
    with torch.enable_grad():
        clipped = Vector(gradients(batch.evaluate().loss, found.params))
        right = Vector(gradients(next(iter(truth.batches())).evaluate().loss, truth.params))
    expected = float(right.dot(clipped)) / float(clipped.norm()) ** 2
    assert slope_ratio(lambda: batch.evaluate().loss, found.params, clipped) == pytest.approx(expected, rel=1e-5)


def test_differences_that_are_not_symmetric_are_said():
    class Counted(nn.Module):
        def __init__(self, by_frequency):
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(10, 4, scale_grad_by_freq=by_frequency)
            self.head = nn.Linear(4, 3)

        def forward(self, tokens):
            return self.head(self.table(tokens).mean(1))

    torch.manual_seed(1)
    data = [(torch.randint(10, (20, 5)), torch.randint(3, (20,)))]
    for by_frequency in (False, True):
        found = flatmin.Objective(Counted(by_frequency).double(), nn.CrossEntropyLoss(), data)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            choose_way(found, "difference")
        assert any("are not symmetric" in str(w.message) for w in said) == by_frequency


def test_a_wrong_second_derivative_of_a_smooth_network_is_said_and_differences_do_without():
    model = Net(lambda x: Saving.apply(3 * x))
    with pytest.warns(RuntimeWarning, match=r"differ by 0\.\d on one batch, though no operation with a kink was"):
        choose_way(objective(model))
    truth = flatmin.trace(objective(Net(lambda x: F.silu(3 * x))), method="hutchinson", max_products=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = flatmin.trace(objective(model), method="hutchinson", max_products=20, products="difference")
    assert found.value == pytest.approx(truth.value, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 5.0])
@pytest.mark.parametrize("name", NETS)
def test_of_honest_networks_nothing_is_said(name, scale, dtype):
    torch.manual_seed(0)
    build, draw = NETS[name]
    model = build().to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    inputs = draw(16)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    data = [(inputs, torch.randint(3, (16,)))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        way = choose_way(flatmin.Objective(model, nn.CrossEntropyLoss(), data))
    assert way.slope == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_bottom_of_the_loss_and_in_coarse_numbers_nothing_is_said(dtype):
    model = Net().to(dtype)
    found = objective(model, dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(500):
        for x, y in found.data:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose_way(found)


def test_without_a_gradient_there_is_nothing_to_say():
    flat = flatmin.Objective(Net(), None, [torch.ones(4, 6).double()], forward=lambda m, b: (0 * m(b).sum(), b))
    assert choose_way(flat).slope == 1


def test_what_autocast_rounds_is_no_other_slope():
    """The loss and the weights are fp32, and what is between them is not."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(x).float()

    found = objective(Mixed(), torch.float32)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        way = choose_way(found)
    assert way.slope == 1
    assert not [w for w in said if "single precision is too coarse" not in str(w.message)]  # which it is


@pytest.mark.parametrize(("rounding", "most"), [(1e-2, 0), (0.0, 30)])
def test_losses_that_are_coarse_say_nothing(rounding, most):
    """Of 100 losses with noise: none where that is known, and few where it is not, for two lengths must agree."""
    model = Net()
    found = objective(model)
    batch = next(iter(found.batches()))
    with torch.enable_grad():
        gradient = Vector(gradients(batch.evaluate().loss, found.params))
    wrong = 0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)

        def noisy(generator=generator):
            return batch.evaluate().loss * (1 + 5e-3 * torch.randn((), generator=generator))

        wrong += slope_ratio(noisy, found.params, gradient, rounding) != 1
    assert wrong <= most
