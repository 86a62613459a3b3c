"""Rules on functions with known derivatives: the perturbation itself, against hand-derived vectors."""

import math

import pytest
import torch
from torch.optim import SGD

import flatmin
from flatmin import problems
from flatmin.noise import Noise, draw_like
from flatmin.optim.nso import nso
from flatmin.optim.rule import drive, plain
from flatmin.optim.sam import sam
from flatmin.radii import Radii
from flatmin.vectors import Vector


def direction(rule, problem, x):
    found = drive(rule, [x], lambda point: Vector([problem.gradient(point[0])]))
    return found.present[0]


def noise_source(sigma, x, law="normal", seed=0):
    """A source of displacements, and the list of what it has drawn."""
    drawn: list[torch.Tensor] = []

    def draw():
        u = Noise([x], Radii([sigma]), law, seed + len(drawn))
        drawn.append(u.vector().present[0])
        return u

    return draw, drawn


def test_plain_is_the_gradient():
    problem = problems.ill_conditioned()
    assert torch.equal(direction(plain(), problem, problem.start), problem.gradient(problem.start))


@pytest.mark.parametrize("rho", [0.05, 1.0])
def test_sam_evaluates_at_rho_g_over_norm(rho):
    problem = problems.hyperbola()
    x = torch.tensor([1.0, 3.0], dtype=torch.float64)
    # g = -2 (1 - 3) (3, 1) = (12, 4), |g| = 4 sqrt(10)
    there = x + rho * torch.tensor([3.0, 1.0], dtype=torch.float64) / math.sqrt(10)
    torch.testing.assert_close(direction(sam(Radii([rho])), problem, x), problem.gradient(there))


def test_sam_uses_one_norm_over_all_parameters():
    def gradient(point):
        return Vector([point[0], 2 * point[1]])

    w = [torch.tensor([3.0]), torch.tensor([2.0])]  # gradients 3 and 4: norm 5
    found = drive(sam(Radii([0.5, 0.5])), w, gradient)
    torch.testing.assert_close(torch.cat(found.present), torch.tensor([3.3, 2 * 2.4]))
    only_first = drive(sam(Radii([0.5, 0.0])), w, gradient)  # norm over what is moved: 3
    torch.testing.assert_close(torch.cat(only_first.present), torch.tensor([3.5, 4.0]))


def test_sam_at_a_stationary_point_stays():
    problem = problems.quartic()
    assert direction(sam(Radii([0.1])), problem, torch.zeros(1).double()) == 0


@pytest.mark.parametrize("make", [problems.ill_conditioned, problems.rank_deficient])
@pytest.mark.parametrize("k", [1, 3])
def test_two_point_noise_is_exact_on_a_quadratic_for_every_draw(make, k):
    # The gradient A x + b is affine, so the average over +u and -u is the gradient whatever u is.
    problem = make()
    draw, drawn = noise_source(0.7, problem.start)
    found = direction(nso(draw, k, True, 0.0), problem, problem.start)
    torch.testing.assert_close(found, problem.gradient(problem.start), rtol=1e-13, atol=1e-13)
    assert len(drawn) == k


def test_one_point_noise_is_off_by_hessian_times_u():
    problem = problems.ill_conditioned()
    draw, drawn = noise_source(0.7, problem.start)
    found = direction(nso(draw, 1, False, 0.0), problem, problem.start)
    expected = problem.gradient(problem.start) + problem.hessian(problem.start) @ drawn[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("law", ["normal", "uniform", "laplace", "rademacher"])
def test_two_point_noise_on_the_quartic_is_4x3_plus_12xu2(law):
    problem, x = problems.quartic(), torch.tensor([1.5], dtype=torch.float64)
    draw, drawn = noise_source(0.3, x, law)
    found = direction(nso(draw, 1, True, 0.0), problem, x)
    torch.testing.assert_close(found, 4 * x**3 + 12 * x * drawn[0] ** 2)


def test_the_clean_weight_mixes_in_the_gradient_at_the_weights():
    problem, x = problems.quartic(), torch.tensor([1.5], dtype=torch.float64)
    draw, drawn = noise_source(0.3, x)
    found = direction(nso(draw, 2, True, 0.25), problem, x)
    noisy = sum(4 * x**3 + 12 * x * u**2 for u in drawn) / 2
    torch.testing.assert_close(found, 0.25 * 4 * x**3 + 0.75 * noisy)


def test_the_expectation_is_the_gradient_of_the_smoothed_loss():
    problem = problems.hyperbola()
    x, sigma, n = torch.tensor([1.4, 0.3], dtype=torch.float64), 0.3, 4000
    (expected,) = torch.autograd.grad(problem.smoothed(y := x.clone().requires_grad_(), sigma), y)
    draws = torch.stack([direction(nso(noise_source(sigma, x, seed=i)[0], 1, True, 0.0), problem, x) for i in range(n)])
    stderr = draws.std(0) / n**0.5
    assert ((draws.mean(0) - expected).abs() < 4 * stderr).all()
    assert ((problem.gradient(x) - expected).abs() > 20 * stderr).any()  # what is tested is visible


def count(**options):
    model = problems.quartic().module()
    optimizer = flatmin.NSO(SGD(model.parameters(), lr=0.01), **options)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        calls.append(float(model.x.detach()))
        return loss

    optimizer.step(closure)
    return calls, optimizer


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, 2),  # the published code runs 3
        ({"num_perturbations": 3}, 6),
        ({"antithetic": False}, 1),
        ({"antithetic": False, "num_perturbations": 4}, 4),
        ({"clean_weight": 0.5}, 3),
        ({"clean_weight": 1.0}, 1),
        ({"sigma": 0.0, "num_perturbations": 3}, 1),
    ],
)
def test_number_of_passes(options, passes):
    calls, optimizer = count(**options)
    assert len(calls) == passes
    if options.get("sigma", 1) > 0:
        assert optimizer.gradients_per_step == passes
    assert (1.5 in calls) == (options.get("clean_weight", 0) > 0 or options.get("sigma") == 0)


def test_nso_reaches_the_flattest_minimum_of_the_smoothed_hyperbola():
    # Minimisers of the smoothed loss: x = y, x^2 = 1 - sigma^2. From (4, 1/4), a minimum of trace 32.
    problem, sigma = problems.hyperbola(), 0.2
    model = problem.module()
    optimizer = flatmin.NSO(SGD(model.parameters(), lr=0.02), sigma=sigma)

    def closure():
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        return loss

    tail = []
    for step in range(6000):
        optimizer.step(closure)
        if step >= 4000:
            tail.append(model.x.detach().clone())
    mean = torch.stack(tail).mean(0)
    assert (mean - math.sqrt(1 - sigma**2)).abs().max() < 0.03
    assert problem.trace(mean) < 4.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_perturbations": 0}, "num_perturbations must be at least 1"),
        ({"clean_weight": 1.5}, r"clean_weight, the share of .*, must be in \[0, 1\], got 1\.5"),
        ({"law": "cauchy"}, "no variance"),
        ({"law": "gauss"}, "unknown noise law 'gauss'. Known laws: normal, uniform, laplace, rademacher"),
        ({"restore": "copy"}, "restore must be"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        count(**options)


def test_seed_none_is_really_random_and_saved():
    (a, first), (b, _) = count(seed=None), count(seed=None)
    assert a != b
    resumed = flatmin.NSO(SGD(problems.quartic().module().parameters(), lr=0.1), seed=None)
    resumed.load_state_dict(first.state_dict())
    assert resumed.param_groups[0]["seed"] == first.param_groups[0]["seed"]


def test_entries_of_a_rademacher_displacement_have_size_sigma():
    z = draw_like(torch.zeros(100), "rademacher", torch.Generator().manual_seed(0))
    assert torch.equal(z.abs(), torch.ones(100))
    assert 20 < (z > 0).sum() < 80


def test_an_unknown_method_is_told_the_nearest():
    from flatmin.optim import get_method

    with pytest.raises(ValueError, match=r"unknown method 'nos'\. Did you mean 'nso'\? Known: base, "):
        get_method("nos")
    with pytest.raises(ValueError, match="takes no options"):
        get_method("base").build(SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1), rho=0.1)
