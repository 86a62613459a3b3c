"""The flat-minimum check of a model: closed forms on (1 - xy)^2, dense third derivatives on a net."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

import flatmin
from flatmin import problems
from flatmin.curvature.manifold import _gradient_of_normalised_trace, gradient, hessian
from tests.curvature.nets import criterion, dense_hessian, make


class Product(nn.Module):
    """x y z: two linear layers of one unit, as functions of data z."""

    def __init__(self, x, y):
        super().__init__()
        self.first, self.second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.double()
        with torch.no_grad():
            self.first.weight.fill_(x)
            self.second.weight.fill_(y)

    def forward(self, z):
        return self.second(self.first(z))


def hyperbola(x, y):
    ones = torch.ones(6, 1, dtype=torch.float64)
    return flatmin.Objective(Product(x, y), nn.MSELoss(), [(ones[:4], ones[:4]), (ones[4:], ones[4:])])


@pytest.mark.parametrize("a", [1.0, 1.3, 2.0])
def test_a_model_small_enough_gets_the_statement_itself(a):
    found = flatmin.flat_minimum(*flatmin.model_function(hyperbola(a, 1 / a)))
    assert found.normalised_trace == pytest.approx(a**2 + a**-2)
    assert found.tangential_gradient == pytest.approx(abs(2 * a - 2 * a**-3) / math.sqrt(1 + a**-4), abs=1e-10)
    assert found.is_flat(1e-6) == (a == 1.0)


def test_what_is_printed_says_what_the_numbers_are():
    objective = hyperbola(1.0, 1.0)
    assert repr(objective) == "Objective(Product, MSELoss, 2 parameters)"
    found = flatmin.flat_minimum(*flatmin.model_function(objective))
    assert str(found).startswith(
        "0 above a minimum with tr(H) / d = 2, whose gradient along its manifold (dimension 1)"
    )
    assert str(replace(found, is_minimum=False)).startswith("0 above a saddle or a maximum with")
    estimate = flatmin.flat_minimum_estimate(objective, num_probes=3, num_eigenvectors=1)
    trace, slope = estimate.normalised_trace, estimate.trace_gradient
    assert str(estimate).startswith(f"tr(H) / d = {trace} at loss 0, |gradient| 0; its gradient {slope}, along")
    density = str(flatmin.spectral_density(objective, num_probes=2, num_steps=3))
    assert density.startswith("2 eigenvalues from 0 to 4, mean 2, share below -")


def test_the_loss_as_a_function_of_a_vector():
    model, x, y = make("attention")
    objective = flatmin.Objective(model, criterion, [(x[:16], y[:16]), (x[16:], y[16:])])
    before = dict(model.named_parameters())
    f, w = flatmin.model_function(objective)
    assert float(f(w)) == pytest.approx(objective.loss(), rel=1e-12)
    torch.testing.assert_close(hessian(f, w), dense_hessian(model, lambda: criterion(model(x), y)))
    assert all(p is before[name] for name, p in model.named_parameters())
    with pytest.raises(ValueError, match=r"'embed.weight' is torch.float32: call model.double"):
        flatmin.model_function(flatmin.Objective(model.float(), criterion, [(x, y)]))


class Hoarder(nn.Module):
    """Keeps a list of its weights and never looks them up again."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3).double()
        self.kept = [self.layer.weight]

    def forward(self, x):
        return nn.functional.linear(x, self.kept[0], self.layer.bias)


def test_a_model_that_keeps_its_weights_elsewhere_is_refused():
    data = [(torch.randn(4, 2, dtype=torch.float64), torch.randint(3, (4,)))]
    objective = flatmin.Objective(Hoarder(), criterion, data)
    with pytest.raises(
        ValueError, match=r"does not look its parameters up.*flat_minimum_estimate\(objective\) needs none"
    ):
        flatmin.model_function(objective)


class Distances(nn.Module):
    """Torch knows the first derivative of these, and no second one."""

    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))

    def forward(self, x):
        return torch.cdist(x, self.centres, p=1.5)


class Slope(torch.autograd.Function):
    """4 x^3 u."""

    @staticmethod
    def forward(ctx, x, u):
        ctx.save_for_backward(x, u)
        return 4 * x**3 * u

    @staticmethod
    @once_differentiable
    def backward(ctx, v):  # type: ignore[override]
        x, u = ctx.saved_tensors
        return 12 * x**2 * u * v, 4 * x**3 * v


class Quartic(torch.autograd.Function):
    """x^4, whose second derivative is right and whose third one is lost."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**4

    @staticmethod
    def backward(ctx, u):  # type: ignore[override]
        return Slope.apply(*ctx.saved_tensors, u)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 1.3, dtype=torch.float64))

    def forward(self, x):
        return x * Quartic.apply(self.weight)


@pytest.mark.parametrize(("model", "reason"), [(Distances, "_cdist_backward"), (Twice, "once_differentiable")])
def test_a_model_without_a_third_derivative_is_refused(model, reason):
    data = [(torch.randn(4, 2 if model is Distances else 3, dtype=torch.float64), torch.randint(3, (4,)))]
    objective = flatmin.Objective(model(), criterion, data)
    with pytest.raises(ValueError, match=rf"three times\. What trace\(objective\).*{reason}"):
        flatmin.flat_minimum_estimate(objective, num_eigenvectors=0)


def test_estimates_on_the_hyperbola():
    a = 1.3
    # Rademacher probes are noisy here because the Hessian is not diagonal.
    found = flatmin.flat_minimum_estimate(hyperbola(a, 1 / a), num_probes=100, num_eigenvectors=1)
    whole, tangential = 2 * math.hypot(a, 1 / a), abs(2 * a - 2 * a**-3) / math.sqrt(1 + a**-4)
    assert abs(found.normalised_trace.value - (a**2 + a**-2)) < 4 * found.normalised_trace.stderr
    assert abs(found.trace_gradient.value - whole) < 4 * found.trace_gradient.stderr
    assert abs(found.tangential_gradient.value - tangential) < 4 * found.tangential_gradient.stderr + 1e-9
    assert found.tangential_gradient.value < 0.8 * found.trace_gradient.value
    assert found.loss < 1e-20
    assert found.gradient_norm < 1e-10


def test_at_the_flat_minimum_the_tangential_part_vanishes():
    found = flatmin.flat_minimum_estimate(hyperbola(1.0, 1.0), num_probes=50, num_eigenvectors=1)
    assert found.tangential_gradient.value < 1e-9
    assert found.is_flat(1e-6) is True
    assert flatmin.flat_minimum_estimate(hyperbola(1.3, 1 / 1.3), num_eigenvectors=1).is_flat(1e-6) is None
    assert flatmin.flat_minimum_estimate(hyperbola(2.0, 2.0), num_eigenvectors=1).is_flat(0.1, 1e9) is None


def test_unbiased_on_a_net_with_its_error():
    model, x, y = make("tanh")
    objective = flatmin.Objective(model, criterion, [(x[:16], y[:16]), (x[16:], y[16:])])
    f, w = flatmin.model_function(objective)
    slope = _gradient_of_normalised_trace(f, w)
    _, vectors = torch.linalg.eigh(hessian(f, w))
    top = vectors[:, -3:]
    truth = (float(slope.norm()), float((slope - top @ top.T @ slope).norm()))
    results = [
        flatmin.flat_minimum_estimate(objective, num_probes=12, num_eigenvectors=3, seed=seed) for seed in range(16)
    ]
    for name, expected in zip(("trace_gradient", "tangential_gradient"), truth, strict=True):
        parts = [getattr(r, name) for r in results]
        squares = np.array([p.value**2 for p in parts])
        assert abs(squares.mean() - expected**2) < 3.5 * squares.std(ddof=1) / 4
        # A plain norm of the mean of 12 draws would be too large by far more than that.
        assert np.mean([p.stderr for p in parts]) == pytest.approx(np.std([p.value for p in parts], ddof=1), rel=0.6)
    assert results[0].gradient_norm == pytest.approx(float(gradient(f, w).norm()))


def test_a_quadratic_has_no_slope_of_the_trace():
    model = problems.ill_conditioned(6, 10.0).module()
    objective = flatmin.Objective(model, None, [torch.zeros(1)], forward=lambda m, b: (m(), b))
    found = flatmin.flat_minimum_estimate(objective, num_eigenvectors=0)
    assert found.trace_gradient.value == found.tangential_gradient.value == 0
    for options in ({"num_probes": 2}, {"num_eigenvectors": 7}):
        with pytest.raises(ValueError, match="must be"):
            flatmin.flat_minimum_estimate(objective, **options)


def test_a_tied_weight_is_one_variable_under_all_its_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
            self.a.weight = self.c.weight = nn.Parameter(torch.tensor([[2.0, 1.0]]))

        def forward(self, x):
            return self.a(x) * self.c(x)

    model = Tied().double()
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    objective = flatmin.Objective(model, nn.MSELoss(), [(x, model(x).detach())])  # where every gradient is zero
    f, w = flatmin.model_function(objective)
    assert float(hessian(f, w).trace()) == pytest.approx(flatmin.trace(objective, method="hutchinson").value, rel=0.3)
    truth = 2 * torch.autograd.functional.jacobian(lambda v: (x @ v) ** 2, w).square().sum() / 3
    assert float(hessian(f, w).trace()) == pytest.approx(float(truth), rel=1e-9)
    moved = ((x @ (w + 0.1)) ** 2 - (x @ w) ** 2).square().mean()
    assert float(f(w + 0.1)) == pytest.approx(float(moved), rel=1e-9)
    assert model.a.weight is model.c.weight
