"""The variance of NSO's directions against the theory, with full gradients and the dense Hessian."""

import math

import pytest
import torch
from torch.optim import SGD

import flatmin
from tests.curvature.nets import criterion, dense_hessian, make

DRAWS = 1000


def variance(sigma, **options):
    """E|G - E G|^2 over the noise, and its standard error."""
    model, x, y = make("tanh")
    optimizer = flatmin.NSO(SGD(model.parameters(), lr=0.0), sigma=sigma, **options)
    directions = []
    for _ in range(DRAWS):
        for _ in optimizer.probes():
            criterion(model(x), y).backward()
        directions.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        optimizer.step()
    deviations = torch.stack(directions)
    squares = (deviations - deviations.mean(0)).square().sum(1)
    return float(squares.mean()), float(squares.std() / math.sqrt(DRAWS))


@pytest.mark.slow
@pytest.mark.parametrize("law", ["normal", "rademacher"])
def test_one_point_has_the_variance_of_hessian_times_noise_and_two_points_do_not(law):
    model, x, y = make("tanh")
    frobenius = float(dense_hessian(model, lambda: criterion(model(x), y)).square().sum())
    sigma = 1e-3
    one, error = variance(sigma, antithetic=False, law=law)
    assert abs(one - sigma**2 * frobenius) < 4 * error
    two, _ = variance(sigma, law=law)
    wider, _ = variance(10 * sigma, law=law)
    assert two < 1e-4 * one
    assert wider / two == pytest.approx(1e4, rel=0.3)  # of order sigma^4


@pytest.mark.slow
def test_k_pairs_divide_the_variance_by_k():
    sigma = 0.05
    one, one_error = variance(sigma)
    four, four_error = variance(sigma, num_perturbations=4)
    assert abs(one / 4 - four) < 4 * math.hypot(one_error / 4, four_error)
