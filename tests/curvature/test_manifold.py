"""Flat minima along the manifold of minima, against closed forms on (1 - xy)^2 and quadratics."""

import math

import pytest
import torch
from torch.optim import SGD

import flatmin
from flatmin import problems
from flatmin.curvature.manifold import flat_minimum, gradient, hessian, limit_map


def point(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("start", [(3.0, 1.0), (0.2, 2.0), (-1.5, -0.3), (4.0, 0.25)])
def test_the_limit_map_of_the_hyperbola(start):
    # Gradient flow of (1 - xy)^2 keeps x^2 - y^2; with xy = 1 at the end, x^2 = c / 2 + sqrt(c^2 / 4 + 1).
    c = start[0] ** 2 - start[1] ** 2
    x = math.copysign(math.sqrt(c / 2 + math.sqrt(c**2 / 4 + 1)), start[0])
    torch.testing.assert_close(limit_map(problems.hyperbola().value, point(*start)), point(x, 1 / x), rtol=0, atol=1e-7)


def test_the_limit_map_of_a_quadratic_with_a_null_space_is_a_projection():
    problem = problems.rank_deficient(6, 2)
    x = torch.linspace(-1, 2, 6).double()
    eigenvalues, vectors = torch.linalg.eigh(problem.hessian(x))
    null = vectors[:, eigenvalues < 1e-9]
    torch.testing.assert_close(limit_map(problem.value, x), null @ null.T @ x, rtol=0, atol=1e-7)
    found = flat_minimum(problem.value, x)
    assert found.dimension == 4
    assert found.normalised_trace == pytest.approx(0.5)
    assert found.tangential_gradient == 0  # the Hessian is the same everywhere
    assert found.excess == pytest.approx(float(problem.value(x)), rel=1e-9)


@pytest.mark.parametrize("a", [1.0, 1.3, 4.0])
def test_the_tangential_gradient_along_the_hyperbola(a):
    # trbar = x^2 + y^2 with gradient (2a, 2/a) at (a, 1/a), tangent (1, -1/a^2) normalised.
    found = flat_minimum(problems.hyperbola().value, point(a, 1 / a))
    assert found.normalised_trace == pytest.approx(a**2 + a**-2)
    assert found.tangential_gradient == pytest.approx(abs(2 * a - 2 * a**-3) / math.sqrt(1 + a**-4), abs=1e-12)
    assert found.dimension == 1
    assert found.is_flat(1e-6) == (a == 1.0)


def test_excess_and_slope_must_both_be_small():
    found = flat_minimum(problems.hyperbola().value, point(1.2, 1.2))
    assert found.tangential_gradient < 1e-6
    assert found.excess == pytest.approx((1 - 1.44) ** 2, rel=1e-6)
    assert not found.is_flat(0.1)
    assert found.is_flat(0.2)


def test_rsp_ends_at_an_approximate_flat_minimum_and_gradient_descent_does_not():
    problem, ends = problems.hyperbola(), {}
    for name, rho in (("descent", 0.0), ("rsp", 0.2)):
        model = problem.module()
        optimizer = flatmin.RSP(SGD(model.parameters(), lr=0.05), rho=rho, threshold=0.5)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model()
            loss.backward()
            return loss

        for _ in range(3000):
            optimizer.step(closure)
        ends[name] = flat_minimum(problem.value, model.x.detach())
    assert ends["rsp"].is_flat(0.05)
    assert ends["rsp"].normalised_trace < 2.05
    assert not ends["descent"].is_flat(0.05)
    assert ends["descent"].normalised_trace > 16


def test_derivatives_and_a_flow_without_rest():
    problem = problems.matrix_sensing(4, 1)
    x = problem.start
    torch.testing.assert_close(gradient(problem.value, x), problem.gradient(x))
    torch.testing.assert_close(hessian(problem.value, x), problem.hessian(x))
    with pytest.raises(ValueError, match=r"did not come to rest: .* f may have no minimum there"):
        limit_map(lambda x: x.sum(), point(1.0, 2.0), max_time=10.0)


@pytest.mark.parametrize(
    ("function", "start", "is_minimum", "dimension"),
    [
        (lambda x: (1 - x[0] * x[1]) ** 2, [0.01, -0.01], False, 0),  # flows into the saddle at the origin
        (lambda x: -x.square().sum(), [0.0, 0.0], False, 0),  # rests on a maximum
        (lambda x: x[0] ** 2 - 1e-3 * x[1] ** 2, [1.0, 0.0], False, 0),
        (lambda x: x[0] ** 2 + 0 * x[1], [1.0, 2.0], True, 1),
    ],
)
def test_a_saddle_is_no_minimum(function, start, is_minimum, dimension):
    found = flatmin.flat_minimum(function, torch.tensor(start, dtype=torch.float64))
    assert (found.is_minimum, found.dimension) == (is_minimum, dimension)
    assert found.is_flat(1e3) is is_minimum
