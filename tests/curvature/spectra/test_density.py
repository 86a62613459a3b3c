"""The density of eigenvalues against dense spectra, by Wasserstein-1 distance; no ghosts; multiplicities are kept."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

import flatmin
from flatmin.curvature import FisherOperator, GaussNewtonOperator
from flatmin.curvature.products.space import flatten, shaped
from tests.curvature.nets import NETS, criterion, dense_hessian, make
from tests.curvature.spectra.test_eigen import objective_with


def distance(result, spectrum):
    """Wasserstein-1 to the truth, in units of the mean size of an eigenvalue."""
    nodes, weights = result.quadrature()
    return wasserstein_distance(nodes, spectrum, weights) / np.abs(spectrum).mean()


def setting(name):
    model, x, y = make(name)
    objective = flatmin.Objective(model, criterion, [(x[:16], y[:16]), (x[16:], y[16:])])
    return objective, torch.linalg.eigvalsh(dense_hessian(model, lambda: criterion(model(x), y))).numpy()


@pytest.mark.parametrize("name", list(NETS))
def test_near_the_dense_spectrum(name):
    objective, spectrum = setting(name)
    result = flatmin.spectral_density(objective, num_probes=8, num_steps=20)
    assert distance(result, spectrum) < 0.15
    assert result.num_products == 9 * 20
    assert sum(result.quadrature()[1]) == pytest.approx(1)
    assert abs(result.value - spectrum.mean()) < 4 * result.stderr
    share = float((spectrum < -result.resolved).mean())
    assert abs(result.negative_mass.value - share) < 3 * result.negative_mass.stderr
    for value in result.eigenvalues:
        assert np.abs(spectrum - value).min() < 1e-3 * np.ptp(spectrum)


def test_outliers_count_once_and_are_no_ghosts():
    # 80 steps in single precision: without reorthogonalisation the largest would come back several times.
    h = torch.cat([torch.tensor([100.0, 90.0, -50.0]), torch.linspace(0, 1, 997)]).float()
    result = flatmin.spectral_density(objective_with(h), num_probes=4, num_steps=80)
    assert [v for v in result.eigenvalues if abs(v) > 2] == pytest.approx([-50, 90, 100], rel=1e-4)
    assert result.mass(low=2).value == pytest.approx(2 / 1000, rel=1e-6)
    assert result.mass(high=-2).value == pytest.approx(1 / 1000, rel=1e-6)
    assert distance(result, h.double().numpy()) < 0.05


@pytest.mark.parametrize("shares", [(300, 400, 300), (600, 300, 100), (999, 0, 1)])
def test_multiple_eigenvalues_keep_their_weight(shares):
    h = torch.repeat_interleave(torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64), torch.tensor(shares))
    results = [flatmin.spectral_density(objective_with(h), num_probes=6, num_steps=6, seed=s) for s in range(20)]
    for value, share in zip((-1.0, 0.5, 3.0), shares, strict=True):
        found = np.array([r.mass(value - 0.1, value + 0.1).value for r in results])
        assert abs(found.mean() - share / 1000) <= 3 * found.std() / np.sqrt(20) + 1e-12


def test_unbiased_and_its_error_is_the_spread_over_seeds():
    spectrum = (torch.arange(1, 401, dtype=torch.float64) ** -1.0).numpy()
    objective = objective_with(torch.from_numpy(spectrum))
    results = [flatmin.spectral_density(objective, num_probes=5, num_steps=6, seed=seed) for seed in range(30)]
    values = np.array([r.value for r in results])
    assert abs(values.mean() - spectrum.mean()) < 3 * values.std() / np.sqrt(30)
    assert np.sqrt(np.mean([r.stderr**2 for r in results])) == pytest.approx(values.std(), rel=0.4)


def test_exact_when_the_steps_reach_the_dimension():
    h = torch.tensor([3.0, -1.0, 0.0, 0.0, 2.0, 2.0], dtype=torch.float64)
    result = flatmin.spectral_density(objective_with(h), num_probes=2, num_steps=10)
    assert np.allclose(result.eigenvalues, sorted(h), atol=1e-12)
    assert distance(result, h.numpy()) < 1e-12
    assert result.stderr < 1e-12
    assert result.num_products == 6
    assert result.negative_mass.value == pytest.approx(1 / 6)


def test_the_mass_below_a_bound_in_the_bulk_is_honest_about_the_nodes():
    # On a smooth spectrum all probes have nearly the same few nodes, so their spread alone would be far too small.
    objective = objective_with(torch.linspace(0, 1, 2000, dtype=torch.float64))
    z, spread = [], []
    for bound in (0.21, 0.37, 0.5, 0.62, 0.8):
        result = flatmin.spectral_density(objective, num_probes=8, num_steps=6)
        mass = result.mass(high=bound)
        z.append((mass.value - bound) / mass.stderr)
        probes = zip(result.nodes, result.weights, strict=True)
        shares = [sum(w for x, w in zip(*probe, strict=True) if x < bound) for probe in probes]
        spread.append((mass.value - bound) / (np.std(shares, ddof=1) / np.sqrt(8)))
    assert np.abs(z).max() < 2.5
    assert np.abs(spread).max() > 4


def test_the_identity():
    result = flatmin.spectral_density(objective_with(torch.full((500,), 3.0)), num_probes=3, num_steps=10)
    assert result.value == pytest.approx(3.0, rel=1e-5)
    assert result.mass(2.99, 3.01).value == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("build", [GaussNewtonOperator, lambda o: FisherOperator(o, "empirical"), FisherOperator])
def test_other_operators(build):
    objective, _ = setting("tanh")
    operator = build(objective)
    eye = torch.eye(objective.num_params, dtype=torch.float64)
    dense = torch.stack([flatten(operator.product(shaped(row, objective.params))) for row in eye])
    result = flatmin.spectral_density(operator, num_probes=6, num_steps=20)
    assert distance(result, torch.linalg.eigvalsh(dense).numpy()) < 0.1
    assert result.mass(high=-1e-6).value == 0  # positive semi-definite
    assert operator.name in result.method


def test_smoothing_and_the_picture():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    objective, spectrum = setting("relu")
    result = flatmin.spectral_density(objective, num_probes=3, num_steps=10)
    grid = np.linspace(spectrum[0] - 1, spectrum[-1] + 1, 4000)
    mean, error = result.density(grid, 0.05)
    assert np.trapezoid(mean, grid) == pytest.approx(1, abs=1e-6)
    assert (error >= 0).all()
    axes = result.plot()
    assert axes.get_yscale() == "log"
    assert len(axes.collections) == 1  # the band
    matplotlib.pyplot.close(axes.figure)


@pytest.mark.parametrize("width", [0.01, 0.1])  # of the spread; a picture has the first
@pytest.mark.parametrize("kind", ["smooth", "heaped"])
def test_two_standard_errors_of_the_density_cover_it(kind, width):
    """Also where the smoothing is finer than the nodes lie, which are much the same for all probes."""
    heap = 1e-3 * np.linspace(-1, 1, 220) ** 3
    spectrum = np.linspace(-1, 1, 300) if kind == "smooth" else np.concatenate([heap, np.linspace(-0.3, 5, 80) ** 3])
    objective, width = objective_with(torch.from_numpy(spectrum)), width * np.ptp(spectrum)
    grid = np.linspace(spectrum.min(), spectrum.max(), 60)
    truth = np.exp(-0.5 * ((grid[:, None] - spectrum) / width) ** 2).mean(1) / (width * np.sqrt(2 * np.pi))
    covered = []
    for seed in range(8):
        result = flatmin.spectral_density(objective, num_probes=6, num_steps=8, seed=seed)
        mean, error = result.density(grid, width)
        covered.append((np.abs(mean - truth) <= 2 * error)[truth > 0.01 / len(spectrum) / width])
    assert np.mean(covered) > 0.87  # 90% for six probes, by Student's t


def test_plain_data_and_bad_arguments():
    objective, _ = setting("relu")
    result = flatmin.spectral_density(objective, num_probes=1, num_steps=3)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["weights"][0] == list(result.weights[0])
    assert result.to_dict()["stderr"] is None  # one probe has no spread
    wrong: dict[str, Any] = {
        "num_probes must be at least 1": {"num_probes": 0},
        "num_steps must be at least 2": {"num_steps": 1},
    }
    wrong["num_probes must be a whole number, got 2.5"] = {"num_probes": 2.5}
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            flatmin.spectral_density(objective, **options)


def test_negative_mass_is_of_eigenvalues_whose_sign_can_be_told():
    """As in networks: most eigenvalues in a heap around zero, of either sign, and some on each side of it."""
    generator = torch.Generator().manual_seed(0)
    heap = 1e-5 * torch.randn(1700, generator=generator, dtype=torch.float64)
    sides = torch.cat([-torch.rand(100, generator=generator), torch.rand(200, generator=generator) ** 3 * 5])
    spectrum = torch.cat([heap, sides.double()])
    z, errors = [], []
    for seed in range(12):
        result = flatmin.spectral_density(objective_with(spectrum), num_probes=5, num_steps=20, seed=seed)
        found, truth = result.negative_mass, float((spectrum < -result.resolved).double().mean())
        assert result.zero < result.resolved < 0.5
        z.append((found.value - truth) / found.stderr)
        errors.append(found.stderr)
    assert max(map(abs, z)) < 3
    assert np.median(errors) < 0.06  # next to zero it would be 0.25
