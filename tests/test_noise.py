"""The laws' moments in units of their standard errors, and that a draw can be replayed."""

import math
from typing import get_args

import pytest
import torch

from flatmin.noise import Law, Noise, draw_like, mix_seeds
from flatmin.radii import Radii

LAWS = get_args(Law)
KURTOSIS = {"normal": 3.0, "uniform": 1.8, "laplace": 6.0, "rademacher": 1.0, "binomial": 2.5}  # E z^4, textbook values
SIXTH = {"normal": 15.0, "uniform": 27 / 7, "laplace": 90.0, "rademacher": 1.0, "binomial": 8.5}


@pytest.mark.parametrize("law", LAWS)
def test_moments(law):
    n = 1_000_000
    z = draw_like(torch.empty(n, dtype=torch.float64), law, torch.Generator().manual_seed(1))
    k4 = KURTOSIS[law]
    eighth = {"normal": 105.0, "uniform": 9.0, "laplace": 2520.0, "rademacher": 1.0, "binomial": 32.5}[law]
    for power, expected, variance in [
        (1, 0.0, 1.0),
        (2, 1.0, k4 - 1.0),
        (3, 0.0, SIXTH[law]),
        (4, k4, eighth - k4**2),
    ]:
        stderr = max((variance / n) ** 0.5, 1e-12)
        assert abs(z.pow(power).mean() - expected) < 4 * stderr, f"moment {power}"
    lagged = (z[1:] * z[:-1]).mean()  # independent entries
    assert abs(lagged) < 4 / n**0.5


@pytest.mark.parametrize("shape", [(64, 20_000), (639, 2_001)])  # whole words of bits, and a part of the last one
def test_random_signs_are_independent_at_every_distance(shape):
    z = draw_like(torch.empty(shape), "rademacher", torch.Generator().manual_seed(2)).double()
    n = z.numel()
    assert z.unique().tolist() == [-1, 1]
    spectrum = torch.fft.rfft(z.flatten() - z.mean())
    correlations = torch.fft.irfft(spectrum.abs() ** 2, n)[1 : n // 2] / n
    # The largest of m standard normal numbers in size, and the mean of their squares.
    assert correlations.abs().max() * n**0.5 < (2 * math.log(n)) ** 0.5 + 1
    assert abs((correlations**2).mean() * n - 1) < 4 * (2 / len(correlations)) ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_random_signs_of_every_type_have_that_size(dtype):
    z = draw_like(torch.empty(33, 5, dtype=dtype), "rademacher", torch.Generator().manual_seed(2), scale=0.1)
    sizes = torch.view_as_real(z).abs() if z.is_complex() else z.abs()
    assert torch.equal(sizes, torch.full_like(sizes, 0.1))
    assert draw_like(torch.empty(0, 3), "rademacher", torch.Generator()).shape == (0, 3)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("keep", [True, False])
def test_the_other_sign_is_the_same_draw(law, keep):
    like = [torch.zeros(50), torch.zeros(7, 3), torch.zeros(4)]
    noise = Noise(like, Radii([0.5, 0.1, 0.0]), law, seed=9, keep=keep)
    there, back = [t.clone() for t in like], [t.clone() for t in like]
    noise.add_to(there)
    (-noise).add_to(back)
    assert all(torch.equal(a, -b) for a, b in zip(there, back, strict=True))
    assert there[0].abs().max() > 0
    assert torch.equal(there[2], like[2])
    noise.add_to(there, sign=-1.0)
    assert all(torch.equal(a, b) for a, b in zip(there, like, strict=True))
    torch.testing.assert_close(noise.vector().tensors[1], -back[1])


def test_a_draw_depends_on_its_seed_only():
    like = [torch.zeros(20)]
    a, b, c = (Noise(like, Radii([1.0]), "normal", seed).vector().present[0] for seed in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_sigma_is_the_standard_deviation():
    z = Noise([torch.zeros(200_000)], Radii([0.02]), "normal", seed=1).vector().present[0]
    assert abs(z.std() / 0.02 - 1) < 4 / (2 * 200_000) ** 0.5


def test_seeds_do_not_collide():
    seeds = {mix_seeds(seed, step, draw) for seed in range(20) for step in range(50) for draw in range(20)}
    assert len(seeds) == 20_000
    assert mix_seeds(1, 2) != mix_seeds(2, 1)
    assert all(0 <= s < 2**63 for s in seeds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("law", LAWS)
def test_a_draw_has_the_dtype_of_the_parameter(dtype, law):
    z = draw_like(torch.zeros(1000, dtype=dtype), law, torch.Generator().manual_seed(0))
    assert z.dtype == dtype
    assert z.isfinite().all()


def test_neighbours_that_are_drawn_together_have_a_sigma_of_their_own():
    like = [torch.zeros(5), torch.zeros(2, 3), torch.zeros(4)]
    same = Noise(like, Radii([1.0, 1.0, 1.0]), "normal", seed=3).vector().present
    own = Noise(like, Radii([1.0, 0.5, 2.0]), "normal", seed=3).vector().present
    for sigma, a, b in zip([1.0, 0.5, 2.0], same, own, strict=True):
        torch.testing.assert_close(sigma * a, b)


@pytest.mark.parametrize("law", LAWS)
def test_a_complex_number_is_two_real_ones_each_with_that_standard_deviation(law):
    n, sigma = 200 * 200, 0.1
    (u,) = Noise([torch.zeros(200, 200, dtype=torch.complex128)], Radii([sigma]), law, seed=3).vector().present
    for part in (u.real, u.imag):
        stderr = ((KURTOSIS[law] - 1) / n) ** 0.5 + 1e-12
        assert abs(float(part.square().mean()) / sigma**2 - 1) < 4 * stderr
        assert abs(float(part.mean())) < 4 * sigma / n**0.5
    assert abs(float((u.real * u.imag).mean())) < 4 * sigma**2 / n**0.5
