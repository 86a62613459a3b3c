"""The closed forms against autograd, and the smoothed values against a large sample."""

import math

import pytest
import torch

import flatmin
from flatmin import problems

ALL = [
    problems.quadratic(torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double(), torch.tensor([1.0, -1.0]).double()),
    problems.ill_conditioned(),
    problems.rank_deficient(),
    problems.cubic(),
    problems.quartic(),
    problems.hyperbola(),
    problems.matrix_sensing(4, 1),
]
each_problem = pytest.mark.parametrize("problem", ALL, ids=lambda p: p.name)


@each_problem
def test_gradient_and_hessian_agree_with_autograd(problem):
    x = (problem.start + 0.3).requires_grad_()
    (gradient,) = torch.autograd.grad(problem.value(x), x)
    torch.testing.assert_close(problem.gradient(x.detach()), gradient)
    hessian = torch.autograd.functional.hessian(problem.value, x.detach())
    torch.testing.assert_close(problem.hessian(x.detach()), hessian)
    torch.testing.assert_close(problem.trace(x.detach()), problem.spectrum(x.detach()).sum())


@each_problem
def test_the_smoothed_value(problem):
    n, sigma = 200_000, 0.3
    u = sigma * torch.randn(n, problem.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = problem.start
    values = torch.vmap(problem.value)(x + u)
    assert abs(values.mean() - problem.smoothed(x, sigma)) < 4 * values.std() / n**0.5


def test_spectra():
    spectrum = problems.rank_deficient(8, 3).spectrum(torch.zeros(8).double())
    torch.testing.assert_close(spectrum, torch.tensor([0.0, 0, 0, 0, 0, 1, 2, 3]).double())
    spectrum = problems.ill_conditioned(6, 1e4).spectrum(torch.zeros(6).double())
    torch.testing.assert_close(spectrum[-1] / spectrum[0], torch.tensor(1e4).double(), rtol=1e-8, atol=0)


def test_the_hyperbola_starts_at_a_sharp_minimum():
    problem = problems.hyperbola()
    assert problem.value(problem.start) == 0
    assert problem.trace(problem.start) == 2 * (16 + 1 / 16)


def test_matrix_sensing_is_underdetermined_and_its_truth_is_a_minimum():
    problem = problems.matrix_sensing(12, 2)
    values, vectors = torch.linalg.eigh(problem.truth)
    root = (vectors * values.clamp(min=0).sqrt()).flatten()
    assert problem.value(root) < 1e-20
    assert problem.recovery_error(root) < 1e-20
    assert problem.validation_error(root) < 1e-20
    assert (problem.spectrum(root) > -1e-9).all()
    assert 2 * (problem.fresh.shape[0] - 1) < 12 * 13 / 2
    # The trace at a minimum: (2/m) sum |A_i U|^2, about d |U|^2 for Gaussian measurements.
    expected = 12 * root.square().sum()
    assert 0.7 < problem.trace(root) / expected < 1.6


def sense(problem, steps, **options):
    model = problem.module(problem.start)  # in double: the measurements are, and need no conversion
    base = torch.optim.SGD(model.parameters(), lr=0.0025)
    optimizer = flatmin.NSO(base, sigma=0.08, **options)

    for _ in range(steps):
        for _probe in optimizer.probes():
            gradient = problem.gradient(model.x.detach())
            model.x.grad = gradient if model.x.grad is None else model.x.grad.add_(gradient)
        optimizer.step()
    return float(problem.validation_error(model.x.detach()))


@pytest.mark.slow
def test_the_published_order_on_matrix_sensing():
    # Gradient descent interpolates and does not recover the matrix; noise does; two points better than one.
    problem = problems.matrix_sensing()
    steps = 7000
    descent = sense(problem, steps, clean_weight=1.0)
    one_point, two_point = sense(problem, steps, antithetic=False), sense(problem, steps)
    assert two_point < 0.5 * one_point
    assert one_point < 0.02 * descent


@pytest.mark.parametrize("problem", [problems.cubic(), problems.quartic()], ids=lambda p: p.name)
def test_smoothing_by_quadrature_equals_the_closed_form(problem):
    eta, noise_std = 0.4, 0.5
    v = problem.start.clone().requires_grad_()
    closed = problems.smoothed_by_steps(problem, eta, noise_std)(v)
    computed = problems.smoothed_by_steps(problem.value, eta, noise_std)(v)
    torch.testing.assert_close(computed, closed, rtol=1e-13, atol=0)
    torch.testing.assert_close(closed, problem.smoothed(v, eta * noise_std), rtol=0, atol=0)
    slopes = [torch.autograd.grad(value, v)[0] for value in (computed, closed)]
    torch.testing.assert_close(*slopes, rtol=1e-13, atol=0)


def test_quadrature_is_exact_beyond_polynomials():
    v = torch.tensor([0.7], dtype=torch.float64)
    smoothed = problems.smoothed_by_steps(lambda x: x.cos().sum(), 0.5, 0.8)(v)
    closed = math.exp(-0.5 * 0.4**2) * math.cos(0.7)  # E cos(v + u) = exp(-sigma^2 / 2) cos v
    assert abs(smoothed - closed) < 1e-14


def test_smoothing_by_draws():
    problem, eta, noise_std, n = problems.hyperbola(), 0.5, 0.6, 100_000
    v = torch.tensor([1.5, 0.5], dtype=torch.float64)
    smoothed = problems.smoothed_by_steps(problem.value, eta, noise_std, num_draws=n, seed=1)
    u = eta * noise_std * torch.randn(n, 2, dtype=torch.float64)
    error = torch.vmap(problem.value)(v + u).std() / n**0.5  # of plain draws; that of pairs is smaller here
    assert abs(smoothed(v) - problem.smoothed(v, eta * noise_std)) < 4 * error
    assert smoothed(v) == smoothed(v)


def test_the_minimum_of_the_smoothed_cubic():
    m, sigma = 0.3, 0.5
    v = torch.tensor([((1 - m**2 * sigma**2) ** 0.5 - 1) / m], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(problems.smoothed_by_steps(problems.cubic(m), 1.0, sigma)(v), v)
    assert abs(slope) < 1e-15


@pytest.mark.parametrize("arguments", [(-0.1, 1.0), (0.1, -1.0), (float("inf"), 1.0)])
def test_wrong_steps_are_refused(arguments):
    with pytest.raises(ValueError, match="must be a finite number >= 0"):
        problems.smoothed_by_steps(problems.cubic(), *arguments)
