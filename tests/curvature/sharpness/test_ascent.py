"""The largest rise in a ball, against the closed form for quadratics (the secular equation)."""

import copy
import math

import pytest
import torch
from scipy.optimize import brentq
from torch import nn

import flatmin
from flatmin.vectors import Vector
from tests.curvature.nets import criterion, make


class Quadratic(torch.nn.Module):
    """g.x + x^T H x / 2 about zero; the weights are zero, or what makes the metrics differ."""

    def __init__(self, h, g, x):
        super().__init__()
        self.h, self.g, self.x = h, g, torch.nn.Parameter(x)

    def forward(self):
        return self.g @ self.x + 0.5 * self.x @ self.h @ self.x


def largest_rise(h, g, rho):
    """max g.d + d^T h d / 2 over |d| <= rho, on the sphere: (lam - h) d = g with |d| = rho, lam above the spectrum."""
    eigenvalues, vectors = torch.linalg.eigh(h)
    c = vectors.T @ g

    def excess(lam):
        return float(((c / (lam - eigenvalues)) ** 2).sum()) - rho**2

    top = float(eigenvalues[-1])
    lam = brentq(excess, top + 1e-9, top + 1e6)
    d = vectors @ (c / (lam - eigenvalues))
    return float(g @ d + 0.5 * d @ h @ d)


def setting(seed, indefinite):
    torch.manual_seed(seed)
    b = torch.randn(8, 8, dtype=torch.float64)
    h = b @ b.T / 8 - (0.5 if indefinite else 0.0) * torch.eye(8, dtype=torch.float64)
    model = Quadratic(h, torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64))
    objective = flatmin.Objective(model, None, [torch.zeros(1)], forward=lambda m, b: (m(), b))
    return objective, h, model.g + h @ model.x.detach(), model.x.detach()


@pytest.mark.parametrize("metric", ["euclidean", "adaptive", "filter", "monge"])
@pytest.mark.parametrize("rho", [0.05, 2.0])
@pytest.mark.parametrize("indefinite", [False, True])
def test_a_quadratic_reaches_the_maximum(metric, rho, indefinite):
    for seed in range(6):
        objective, h, g, x = setting(seed, indefinite)
        if metric == "monge":
            values, vectors = torch.linalg.eigh(torch.eye(8, dtype=g.dtype) + torch.outer(g, g))
            a = vectors @ torch.diag(values**-0.5) @ vectors.T
        else:
            a = torch.diag({"adaptive": x.abs(), "filter": x.norm().expand(8)}.get(metric, torch.ones_like(x)))
        truth = largest_rise(a @ h @ a, a @ g, rho)
        result = flatmin.ascent_sharpness(objective, rho, metric, num_steps=40)
        assert result.value <= truth * (1 + 1e-9)  # a lower bound
        assert result.value == pytest.approx(truth, rel=2e-3)
        rounding = 1e-14 * (1 + result.value)  # which the value is less
        assert result.one_step <= result.starts[0] <= result.value + rounding


def test_at_a_minimum_it_is_the_largest_eigenvalue():
    h = torch.diag(torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64))
    zeros = torch.zeros(3, dtype=torch.float64)
    model = Quadratic(h, zeros, zeros.clone())
    objective = flatmin.Objective(model, None, [torch.zeros(1)], forward=lambda m, b: (m(), b))
    result = flatmin.ascent_sharpness(objective, 0.5, num_steps=40)
    assert result.value == pytest.approx(0.5 * 3.0 * 0.5**2, rel=1e-4)
    assert math.isnan(result.one_step)
    assert result.to_dict()["stderr"] is None
    assert str(result) == ">= 0.375"


def test_at_a_maximum_nothing_rises():
    h = -torch.eye(3, dtype=torch.float64)
    zeros = torch.zeros(3, dtype=torch.float64)
    model = Quadratic(h, zeros, zeros.clone())
    objective = flatmin.Objective(model, None, [torch.zeros(1)], forward=lambda m, b: (m(), b))
    result = flatmin.ascent_sharpness(objective, 0.5)
    assert result.value == 0.0
    assert max(result.starts) < 0


def test_a_maximum_inside_the_ball_is_not_jumped_over():
    top = torch.tensor([0.3, -0.1, 0.2], dtype=torch.float64)

    class Hill(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.x = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self):
            return 5 - ((self.x - top) ** 2).sum()

    objective = flatmin.Objective(Hill(), None, [torch.zeros(1)], forward=lambda m, b: (m(), b))
    for rho in (0.5, 1.0, 3.0):
        result = flatmin.ascent_sharpness(objective, rho)
        assert result.value == pytest.approx(float((top**2).sum()), rel=0.01)


def test_more_than_one_step_and_more_than_the_mean():
    model, x, y = make("relu")
    objective = flatmin.Objective(model, criterion, [(x[:16], y[:16]), (x[16:], y[16:])])
    result = flatmin.ascent_sharpness(objective, 0.5)
    assert result.value > 1.05 * result.one_step
    assert result.one_step > flatmin.average_sharpness(objective, 0.5).value
    assert result.num_gradients <= 1 + 3 * 21
    # The point found is in the ball, so no random point of it may be above by luck alone.
    direction = Vector(torch.randn_like(p) for p in objective.params)
    with torch.no_grad():
        (direction * (0.5 / direction.norm())).add_to(objective.params)
    assert objective.loss() - result.clean_loss < result.value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_rise_that_rounding_makes_is_none(dtype):
    """Near a minimum, in 16 bits: the value must not exceed what a search in double precision finds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(64, 6), torch.randint(3, (64,))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=1e-3)
    for _ in range(1000):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model, x = model.to(dtype), x.to(dtype)
    exact = copy.deepcopy(model).double()
    for rho in (1e-5, 1e-3, 1e-2, 0.2):
        found = flatmin.ascent_sharpness(flatmin.Objective(model, nn.CrossEntropyLoss(), [(x, y)]), rho).value
        objective = flatmin.Objective(exact, nn.CrossEntropyLoss(), [(x.double(), y)])
        assert 0 <= found <= 1.01 * flatmin.ascent_sharpness(objective, rho).value
    assert found > 0
