"""Eigenvalues against the dense spectrum; residual bounds that hold; loud when not converged."""

import numpy as np
import pytest
import torch

import flatmin
from flatmin import problems
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
