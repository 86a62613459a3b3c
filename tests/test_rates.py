"""E|grad F|^2 against kT: never above the upper bound, falling as 1 / sqrt(kT), and never below the lower bound."""

import math

import numpy as np
import pytest
import torch
from torch.optim import SGD

import flatmin
from flatmin import problems

RUNS, DIM, SIGMA, NOISE = 400, 5, 0.5, 2.0
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(60)


def smoothed_gradient(w):
    """Of F = E sum_i log cosh(w_i + u_i), u ~ N(0, sigma^2): E tanh(w + u), by quadrature."""
    nodes, weights = torch.from_numpy(NODES), torch.from_numpy(WEIGHTS) / math.sqrt(2 * math.pi)
    return (torch.tanh(w[..., None] + SIGMA * nodes) * weights).sum(-1)


def smoothed_value(w):
    nodes, weights = torch.from_numpy(NODES), torch.from_numpy(WEIGHTS) / math.sqrt(2 * math.pi)
    return (torch.cosh(w[..., None] + SIGMA * nodes).log() * weights).sum((-1, -2))


def mean_squared_gradient(num_steps, k, antithetic=True):
    """The mean over t of |grad F(W_t)|^2 for independent runs, one a row: mean and standard error, and the bound."""
    start = torch.full((RUNS, DIM), 1.0, dtype=torch.float64)
    facts = {
        "smoothness": 1.0,
        "gap": float(smoothed_value(start[0]) - smoothed_value(0 * start[0])),
        "noise_var": DIM * NOISE**2,
        "perturbation": 0.0 if antithetic else DIM * SIGMA**2,
    }
    w = torch.nn.Parameter(start)
    base = SGD([w], lr=problems.best_step(num_steps, k, **facts))
    optimizer = flatmin.NSO(base, sigma=SIGMA, num_perturbations=k, antithetic=antithetic)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(RUNS, dtype=torch.float64)
    for _ in range(num_steps):
        total += smoothed_gradient(w.detach()).square().sum(1)
        sample = torch.zeros(())
        for number, _probe in enumerate(optimizer.probes()):
            if number % 2 == 0 or not antithetic:  # the two points of a pair share their sample
                sample = NOISE * torch.randn(RUNS, DIM, generator=generator, dtype=torch.float64)
            (torch.cosh(w).log() + sample * w).sum().backward()
        optimizer.step()
    means = total / num_steps
    return float(means.mean()), float(means.std() / RUNS**0.5), problems.rate_bound(num_steps, k, **facts)


@pytest.mark.slow
def test_the_rate_of_nso():
    budgets = [50, 200, 800]
    found = {n: mean_squared_gradient(n, 1) for n in budgets}
    for mean, error, bound in found.values():
        assert mean + 3 * error < bound
    slope = np.polyfit(np.log(budgets), np.log([found[n][0] for n in budgets]), 1)[0]
    assert -0.65 < slope < -0.4
    # k = 4 perturbations in 200 steps do what one does in 800: only the product counts, up to terms of order 1 / T.
    fewer, error, _ = mean_squared_gradient(200, 4)
    long, other, _ = found[800]
    assert abs(fewer - long) < 0.15 * long + 3 * math.hypot(error, other)
    assert fewer < 0.7 * found[200][0]


def test_one_point_noise_is_within_its_bound_which_has_the_perturbation_in_it():
    mean, error, bound = mean_squared_gradient(100, 2, antithetic=False)
    assert mean + 3 * error < bound


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("num_steps", [16, 1000])
@pytest.mark.parametrize("noise_var", [0.01, 1.0])
def test_no_step_size_beats_the_lower_bound_and_the_best_one_nearly_reaches_it(k, num_steps, noise_var):
    floor = 0.5 * math.sqrt(noise_var / (k * num_steps))
    least = []
    for step in np.logspace(-4, 0, 60):
        problem = problems.hard_quadratic(step, num_steps, k, noise_var=noise_var)
        least.append(float(problem.expected_squared_gradient(num_steps).min()))
        assert float(problem.value(problem.start)) == pytest.approx(1.0)  # D^2
        assert problem.spectrum(problem.start)[-1] <= 1.0  # C
    assert min(least) >= floor
    if num_steps > 100:  # where 1 / C is no hindrance
        assert min(least) < 4 * floor


@pytest.mark.parametrize("num_steps", [4, 50])
def test_the_flat_direction_keeps_what_the_proof_says_at_every_step_size(num_steps):
    for step in np.logspace(-6, 0, 30):
        problem = problems.hard_quadratic(step, num_steps)
        flat, least = float(problem.spectrum(problem.start)[0]), 0.5 * min(1 / (4 * step * num_steps), 0.5)
        assert (flat * float(problem.start[0]) * (1 - step * flat) ** num_steps) ** 2 >= least
        assert flat < 1.0 or least >= 0.5 / math.sqrt(num_steps)  # where mu = C that alone is the bound


def test_the_closed_form_is_what_nso_does():
    step, num_steps, k, runs = 0.2, 12, 3, 20_000
    problem = problems.hard_quadratic(step, num_steps, k, noise_var=0.5)
    curvature = problem.hessian(problem.start).diagonal()
    w = torch.nn.Parameter(problem.start.repeat(runs, 1))
    optimizer = flatmin.NSO(SGD([w], lr=step), sigma=0.7, num_perturbations=k)
    generator = torch.Generator().manual_seed(0)
    expected = problem.expected_squared_gradient(num_steps)
    for t in range(num_steps + 1):
        squares = (curvature * w.detach()).square().sum(1)
        assert abs(float(squares.mean() - expected[t])) <= 4 * float(squares.std()) / runs**0.5 + 1e-12
        sample = torch.zeros(())
        for number, _probe in enumerate(optimizer.probes()):
            if number % 2 == 0:
                sample = math.sqrt(0.5) * torch.randn(runs, generator=generator, dtype=torch.float64)
            ((0.5 * curvature * w.square()).sum() + (sample * w[:, 1]).sum()).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 1.5, "num_steps": 10}, "step must be in"),
        ({"step": 0.5, "num_steps": 2}, "the bound needs num_steps >= 4"),
        ({"step": 0.5, "num_steps": 9, "gap": 0.1}, "the bound needs num_steps >= 4 and noise_var"),
    ],
)
def test_outside_its_range_it_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        problems.hard_quadratic(**options)


def test_the_best_step_without_noise():
    assert problems.best_step(10, smoothness=4.0, gap=1.0, noise_var=0.0) == 0.25
