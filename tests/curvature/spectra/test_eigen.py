"""Eigenvalues against the dense spectrum; residual bounds that hold; loud when not converged."""

import warnings

import numpy as np
import pytest
import torch

import flatmin
from benchmarks.spectra import simulated, unit
from benchmarks.stopping import NOW, follow
from flatmin import problems
from flatmin.curvature.spectra.eigen import _Search
from flatmin.curvature.spectra.lanczos import Lanczos
from flatmin.vectors import Vector
from tests.curvature.nets import NETS, criterion, dense_hessian, make


def setting(name):
    model, x, y = make(name)
    objective = flatmin.Objective(model, criterion, [(x[:16], y[:16]), (x[16:], y[16:])])
    return objective, torch.linalg.eigvalsh(dense_hessian(model, lambda: criterion(model(x), y))).numpy()


@pytest.mark.parametrize("name", list(NETS))
@pytest.mark.parametrize("which", ["LA", "SA"])
@pytest.mark.parametrize("k", [1, 5])
def test_values_residuals_and_tolerance_over_seeds(name, which, k):
    objective, spectrum = setting(name)
    truth = spectrum[::-1][:k] if which == "LA" else spectrum[:k]
    for seed in range(10):
        result = flatmin.top_eigenvalues(objective, k, which=which, seed=seed, max_products=objective.num_params)
        assert result.converged
        errors = np.abs(np.array(result.values) - truth)
        assert (errors <= np.array(result.residuals) + 1e-12).all()
        assert (np.array(result.residuals) <= 1e-3 * np.abs(truth) * (1 + 1e-3) + 1e-12).all()


def test_one_norm_over_all_layers():
    # Normalising layer by layer (as the papers' code does) would give up to (number of layers) times lambda_max.
    objective, spectrum = setting("relu")
    assert flatmin.top_eigenvalues(objective, tol=1e-6).value == pytest.approx(spectrum[-1], rel=1e-6)


def test_few_products_are_needed():
    objective, _ = setting("tanh")
    counts = [flatmin.top_eigenvalues(objective, seed=seed).num_products for seed in range(10)]
    assert np.median(counts) <= 15


@pytest.mark.parametrize("k", [1, 3])
def test_not_converged_is_loud(k):
    objective, _ = setting("conv")
    with pytest.warns(RuntimeWarning, match=f"not converged after {k + 1} products.*Raise max_products"):
        result = flatmin.top_eigenvalues(objective, k, max_products=k + 1, tol=1e-9)
    assert not result.converged


def objective_of(problem):
    return flatmin.Objective(problem.module(), None, [torch.zeros(1)], forward=lambda m, b: (m(), b))


def test_ill_conditioned():
    problem = problems.ill_conditioned(12, 1e6)
    result = flatmin.top_eigenvalues(objective_of(problem), 12)
    torch.testing.assert_close(
        torch.tensor(result.values), problem.spectrum(problem.start).flip(0).float(), rtol=1e-6, atol=1e-9
    )


def test_an_invariant_subspace_is_left():
    # Three eigenvalues and a null space: Lanczos breaks down after 4 steps and must go on to find the zeros.
    problem = problems.rank_deficient(10, 3)
    result = flatmin.top_eigenvalues(objective_of(problem), 5)
    assert np.allclose(result.values, [3, 2, 1, 0, 0], atol=1e-9)


def test_single_precision():
    model, x, y = make("relu")
    spectrum = torch.linalg.eigvalsh(dense_hessian(model, lambda: criterion(model(x), y)))
    objective = flatmin.Objective(model.float(), criterion, [(x.float(), y)])
    assert flatmin.top_eigenvalues(objective).value == pytest.approx(float(spectrum[-1]), rel=1e-4)


def test_bad_arguments():
    objective, _ = setting("relu")
    for k in (0, 10_000):
        with pytest.raises(ValueError, match="k must be between 1 and the number of parameters"):
            flatmin.top_eigenvalues(objective, k)
    with pytest.raises(ValueError, match="which must be"):
        flatmin.top_eigenvalues(objective, which="LM")  # type: ignore[arg-type]


def test_a_linear_loss_has_only_zeros():
    model = torch.nn.Linear(2, 1)
    objective = flatmin.Objective(model, None, [torch.ones(4, 2)], forward=lambda m, b: (m(b).mean(), b))
    assert flatmin.top_eigenvalues(objective, 2).values == (0.0, 0.0)


class Diagonal(torch.nn.Module):
    """h x^2 / 2 entry by entry: the Hessian is diag(h)."""

    def __init__(self, h):
        super().__init__()
        self.h, self.x = h, torch.nn.Parameter(torch.zeros_like(h))

    def forward(self):
        return 0.5 * (self.h * self.x**2).sum()


def objective_with(h):
    return flatmin.Objective(Diagonal(h), None, [torch.zeros(1)], forward=lambda m, b: (m(), b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_a_value_outside_a_crowd_is_found(dtype, seed):
    # All but one eigenvalue are 1 to within 0.25%, so after two products the residual is below a thousandth of it.
    h = 1 + 5e-4 * torch.randn(300_000, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    h[7] = 1.02
    for sign in (1.0, -1.0):
        result = flatmin.top_eigenvalues(objective_with(sign * h), which="LA" if sign > 0 else "SA", seed=seed)
        assert result.converged
        assert abs(result.value - sign * 1.02) <= min(result.residuals[0], 1e-4)


def test_adding_a_constant_to_the_spectrum_changes_nothing():
    spectrum = torch.linspace(0, 1, 300, dtype=torch.float64) ** 2
    plain, shifted = (flatmin.top_eigenvalues(objective_with(spectrum + shift)) for shift in (0.0, 1000.0))
    assert shifted.value == pytest.approx(plain.value + 1000, abs=1e-3)
    assert shifted.num_products == plain.num_products


def test_a_multiple_of_the_identity():
    result = flatmin.top_eigenvalues(objective_with(torch.full((50,), 3.0)), 2)
    assert result.converged
    assert np.allclose(result.values, 3.0, atol=2 * max(result.residuals))


@pytest.mark.parametrize("tol", [1e-3, 1e-7])
def test_residuals_are_bounds_in_single_precision(tol):
    model, x, y = make("relu")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.float())  # the same point in both precisions
    x = x.float().double()
    truth = torch.linalg.eigvalsh(dense_hessian(model, lambda: criterion(model(x), y))).numpy()[::-1][:3]
    objective = flatmin.Objective(model.float(), criterion, [(x.float(), y)])
    for seed in range(10):
        result = flatmin.top_eigenvalues(objective, 3, tol=tol, seed=seed)
        assert (np.abs(np.array(result.values) - truth) <= result.residuals).all()
        assert max(result.residuals) <= 2 * tol * truth[0] + 1e-4 * truth[0]


@pytest.mark.parametrize("tol", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_tolerance(tol):
    with pytest.raises(ValueError, match=r"tol must be (positive|a finite number)"):
        flatmin.top_eigenvalues(setting("relu")[0], tol=tol)


def test_no_products():
    with pytest.raises(ValueError, match="max_products must be at least 1, got 0"):
        flatmin.top_eigenvalues(setting("relu")[0], max_products=0)


@pytest.mark.parametrize("which", ["LA", "SA"])
def test_eigenvectors(which):
    model, x, y = make("tanh")
    objective = flatmin.Objective(model, criterion, [(x[:16], y[:16]), (x[16:], y[16:])])
    hessian = dense_hessian(model, lambda: criterion(model(x), y))
    result = flatmin.top_eigenvalues(objective, 4, which=which, vectors=True)
    rows = torch.stack([torch.cat([t.flatten() for t in v.present]) for v in result.vectors])
    torch.testing.assert_close(rows @ rows.T, torch.eye(4, dtype=rows.dtype))
    for row, value, residual in zip(rows, result.values, result.residuals, strict=True):
        assert float((hessian @ row - value * row).norm()) == pytest.approx(residual, rel=1e-3, abs=1e-10)
    assert "vectors" not in result.to_dict()
    assert flatmin.top_eigenvalues(objective, 4, which=which).vectors == ()


@pytest.mark.parametrize("max_basis", [13, 16, 24])
@pytest.mark.parametrize("which", ["LA", "SA"])
def test_restarts_with_little_memory(max_basis, which):
    spectrum = torch.linspace(0, 1, 300, dtype=torch.float64) ** 2 * (1 if which == "LA" else -1)
    truth = spectrum.flip(0)
    result = flatmin.top_eigenvalues(
        objective_with(spectrum), 10, which=which, max_basis=max_basis, max_products=3000, tol=1e-6, vectors=True
    )
    assert result.converged
    assert result.num_products > 2 * max_basis  # restarted, more than once
    assert np.allclose(result.values, truth[:10], atol=1e-6)
    rows = torch.stack([v.tensors[0] for v in result.vectors])  # type: ignore[misc]
    torch.testing.assert_close(rows @ rows.T, torch.eye(10, dtype=rows.dtype), atol=1e-8, rtol=0)
    for row, value, residual in zip(rows, result.values, result.residuals, strict=True):
        assert float((spectrum * row - value * row).norm()) <= residual * (1 + 1e-6) + 1e-12
    with pytest.raises(ValueError, match="max_basis must be at least k"):
        flatmin.top_eigenvalues(objective_with(spectrum), 10, max_basis=12)


def test_starts():
    objective, spectrum = setting("relu")
    random = flatmin.top_eigenvalues(objective, 5, start="random", vectors=True)
    assert random.values == pytest.approx(spectrum[::-1][:5], rel=1e-3)
    warm = flatmin.top_eigenvalues(objective, start=random.vectors[0])
    assert warm.num_products == 8  # the fewest that there are
    assert warm.value == pytest.approx(spectrum[-1], rel=1e-5)
    with pytest.warns(RuntimeWarning, match="not converged after 1 products"):
        short = flatmin.top_eigenvalues(objective, start=random.vectors[0], max_products=1)
    assert short.value == pytest.approx(spectrum[-1], rel=1e-3)
    with pytest.raises(ValueError, match="start must be"):
        flatmin.top_eigenvalues(objective, start="zero")  # type: ignore[arg-type]


def test_an_eigenvector_that_the_gradient_has_no_part_in_is_found():
    h = torch.linspace(0.1, 1, 40, dtype=torch.float64)
    h[3] = 5.0
    objective = objective_with(h)
    with torch.no_grad():
        objective.params[0][10:] = 1.0  # so that the gradient is zero where the largest eigenvalue is
    assert float(objective.gradient().tensors[0][3]) == 0  # type: ignore[index]
    assert flatmin.top_eigenvalues(objective).value == pytest.approx(5.0, rel=1e-6)


def test_from_the_gradient_five_values_take_at_most_twenty_products():
    for name in ("relu", "tanh"):
        objective, spectrum = setting(name)
        results = [flatmin.top_eigenvalues(objective, 5, seed=seed) for seed in range(20)]
        assert np.quantile([r.num_products for r in results], 0.95) <= 20
        assert all(np.allclose(r.values, spectrum[::-1][:5], rtol=1e-3) for r in results)


def test_any_operator():
    from flatmin.curvature import FisherOperator, GaussNewtonOperator
    from flatmin.curvature.products.space import flatten, shaped

    objective, _ = setting("attention")
    for operator in (GaussNewtonOperator(objective), FisherOperator(objective, "empirical")):
        eye = torch.eye(objective.num_params, dtype=torch.float64)
        dense = torch.stack([flatten(operator.product(shaped(row, objective.params))) for row in eye])
        result = flatmin.top_eigenvalues(operator, 3, tol=1e-6)
        assert np.allclose(result.values, torch.linalg.eigvalsh(dense).flip(0)[:3], rtol=1e-5)
        assert operator.name in result.method


def test_no_ghosts():
    # Without reorthogonalisation the largest of these would come back many times within 80 products.
    h = torch.cat([torch.tensor([100.0, 50.0]), torch.linspace(0, 1, 400)]).float()
    result = flatmin.top_eigenvalues(objective_with(h), 3, tol=1e-3, max_products=200)
    assert np.allclose(result.values, [100, 50, 1], rtol=2e-3)


def spectrum_of(kind, n, rng):
    """Eigenvalues: power laws, a decay, or a bulk with eight values apart, some of them nearly equal."""
    i = np.arange(1, n + 1.0)
    if kind in ("1 / i", "1 / i^2"):
        return i ** -float(len(kind) - 4 or 1)
    if kind == "decay":
        return np.exp(-i * 10 ** rng.uniform(-2, -0.3))
    if kind == "clusters":
        return np.concatenate([c + 10 ** rng.uniform(-4, -1.5) * rng.standard_normal(n // 6) for c in rng.random(6)])
    bulk = 0.1 + 0.3 * (2 * rng.beta(1.5, 1.5, n) - 1)
    apart = np.sort(rng.uniform(0.5, 1.5, 8))[::-1]
    if kind == "pairs":
        apart[1::2] = apart[::2] * (1 - 10 ** rng.uniform(-4, -1, 4))
    if kind == "fifth and sixth":
        apart[5] = apart[4] * (1 - 10 ** rng.uniform(-4, -1))
    bulk[:8] = apart
    return bulk + 10 if kind == "shifted" else bulk


def outcomes(kind, k, seeds):
    """Relative errors, worst of k, and whether each search says that it is converged; from random starts."""
    found = []
    for seed in seeds:
        h = spectrum_of(kind, (60, 240)[seed % 2], np.random.default_rng(seed))
        truth = np.sort(h)[::-1][:k]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            result = flatmin.top_eigenvalues(
                objective_with(torch.tensor(h)), k, start="random", seed=seed, max_products=60
            )
        found.append((np.max(np.abs(np.array(result.values) - truth) / np.abs(truth)), result.converged))
    errors, converged = map(np.array, zip(*found, strict=True))
    return errors, converged


@pytest.mark.parametrize("kind", ["1 / i", "1 / i^2", "decay", "outliers", "pairs", "fifth and sixth", "shifted"])
@pytest.mark.parametrize("k", [1, 5])
def test_spectra_of_many_kinds(kind, k):
    errors, converged = outcomes(kind, k, range(10))
    assert converged.all()
    assert (errors <= 1e-3).all()


@pytest.mark.parametrize("k", [2, 5])
def test_a_crowded_spectrum_is_never_wrong_and_converged(k):
    # Eigenvalues that are not told apart yet: small residuals that do not fall.
    errors, converged = outcomes("clusters", k, range(20))
    assert not (converged & (errors > 1e-3)).any()


@pytest.mark.parametrize("k", [1, 5])
def test_the_benchmark_of_rules_stops_where_the_search_does(k):
    stopped = 0
    for seed, (_, spectrum, gradient, chance) in enumerate(simulated(15, seed=7)):
        start, products = unit(gradient) + chance, 60
        diagonal = torch.tensor(spectrum)
        lanczos = Lanczos(
            lambda v, d=diagonal: Vector(d * part for part in v.present),
            [diagonal],
            seed=seed,
            start=torch.tensor(start),
        )
        search = _Search(lanczos, k, 1.0, 1e-3)
        converged = search.run(products, products + 1)
        stop = follow(spectrum, start, products, seed).first(k).stop(NOW)
        assert converged == (stop is not None)
        if stop is not None:
            stopped += 1
            assert stop[0] == lanczos.num_products
            assert np.allclose(stop[1], search.values, rtol=1e-12)
    assert stopped > 8


@pytest.mark.parametrize("which", ["LA", "SA"])
def test_errors_are_of_the_right_size(which):
    ratios = []
    for name in ("relu", "tanh"):
        objective, spectrum = setting(name)
        truth = spectrum[::-1][:3] if which == "LA" else spectrum[:3]
        for seed in range(3):
            result = flatmin.top_eigenvalues(objective, 3, which=which, tol=0.02, seed=seed)
            true = np.abs(np.array(result.values) - truth)
            seen = true > 1e-9  # the others are exact to rounding
            ratios += list(np.array(result.errors)[seen] / true[seen])
    assert len(ratios) >= 5
    assert min(ratios) > 0.3
    assert max(ratios) < 2  # the residuals are hundreds of times larger


def several_outputs(kind):
    torch.manual_seed(0)
    x = torch.randn(60, 6, dtype=torch.float64)
    model = torch.nn.Linear(6, 4).double()
    if kind == "regression":
        return model, torch.nn.MSELoss(), x, torch.randn(60, 4, dtype=torch.float64)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    return model, criterion, x, torch.randint(4, (60,))


@pytest.mark.parametrize("kind", ["regression", "softmax at zero"])
@pytest.mark.parametrize("which", ["LA", "SA"])
@pytest.mark.parametrize("k", [2, 5, 9])
def test_eigenvalues_that_occur_several_times_are_counted_on_request(kind, which, k):
    model, loss, x, y = several_outputs(kind)
    truth = torch.linalg.eigvalsh(dense_hessian(model, lambda: loss(model(x), y)))
    truth = truth.flip(0)[:k] if which == "LA" else truth[:k]
    objective = flatmin.Objective(model, loss, [(x, y)])
    result = flatmin.top_eigenvalues(objective, k, which=which, multiple=True, vectors=True, max_products=400)
    assert result.converged
    np.testing.assert_allclose(result.values, truth, rtol=1e-3, atol=1e-12)
    assert all(abs(v - t) <= r + 1e-12 for v, t, r in zip(result.values, truth.tolist(), result.residuals, strict=True))
    rows = torch.stack([torch.cat([t.flatten() for t in v.present]) for v in result.vectors])
    torch.testing.assert_close(rows @ rows.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-6)


def test_single_values_are_not_counted_twice():
    model, x, y = make("tanh")
    objective = flatmin.Objective(model, criterion, [(x, y)])
    once, again = (flatmin.top_eigenvalues(objective, 3, multiple=multiple) for multiple in (False, True))
    assert again.values == once.values
    assert again.num_products >= once.num_products + 8
    with pytest.warns(RuntimeWarning, match="not converged"):
        assert not flatmin.top_eigenvalues(objective, 3, multiple=True, max_products=once.num_products + 2).converged


def test_many_values_have_as_many_products_as_they_need():
    h = torch.diag(torch.linspace(-1.0, 2.0, 150, dtype=torch.float64))
    result = flatmin.top_eigenvalues(objective_with(h), 60)
    assert result.converged
    assert result.values == pytest.approx(h.diagonal().flip(0)[:60].tolist(), abs=1e-3)
