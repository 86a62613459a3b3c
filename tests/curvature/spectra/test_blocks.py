"""Blocks against the dense Hessian's blocks, and the published number against what it is said to be."""

import numpy as np
import pytest
import torch

import flatmin
from flatmin.curvature import GaussNewtonOperator
from tests.curvature.nets import criterion, dense_hessian, make


def setting(name):
    model, x, y = make(name)
    objective = flatmin.Objective(model, criterion, [(x[:16], y[:16]), (x[16:], y[16:])])
    return objective, dense_hessian(model, lambda: criterion(model(x), y))


def blocks(objective, hessian):
    index, start = {}, 0
    for layer, p in zip(objective.layers, objective.params, strict=True):
        index.setdefault(layer, []).extend(range(start, start + p.numel()))
        start += p.numel()
    return index, {layer: hessian[i][:, i] for layer, i in index.items()}


def test_the_eigenvalues_of_each_block():
    objective, hessian = setting("relu")
    _, truth = blocks(objective, hessian)
    found = flatmin.block_eigenvalues(objective, 2, tol=1e-6)
    assert list(found) == ["0", "2", "4"]
    for layer, result in found.items():
        assert np.allclose(result.values, torch.linalg.eigvalsh(truth[layer]).flip(0)[:2], rtol=1e-5)
    assert objective.names == tuple(n for n, _ in objective.model.named_parameters())  # the objective is as before


def test_a_block_that_is_smaller_than_k():
    model = torch.nn.Linear(1, 1, dtype=torch.float64)
    data = [(torch.randn(5, 1, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64))]
    found = flatmin.block_eigenvalues(flatmin.Objective(model, torch.nn.MSELoss(), data), 5)
    assert [len(result.values) for result in found.values()] == [1, 1]
    with pytest.raises(ValueError, match="k must be at least 1"):
        flatmin.block_eigenvalues(flatmin.Objective(model, torch.nn.MSELoss(), data), 0)


def test_the_published_number_is_no_eigenvalue():
    objective, _ = setting("relu")
    operator = GaussNewtonOperator(objective)  # positive semi-definite, as the inequalities want it
    eye = torch.eye(objective.num_params, dtype=torch.float64)
    dense = torch.stack([flat(operator.product(shape(row, objective))) for row in eye])
    index, parts = blocks(objective, dense)
    result = flatmin.layerwise_rayleigh_sum(operator, tol=1e-8, max_products=500)
    top = float(torch.linalg.eigvalsh(dense)[-1])
    tops = sum(float(torch.linalg.eigvalsh(part)[-1]) for part in parts.values())
    assert result.converged
    assert tops < result.value < 3 * top
    assert top < tops
    assert result.lower_bound == pytest.approx(result.value / 3)
    assert result.lower_bound < top
    assert sum(result.per_layer.values()) == pytest.approx(result.value)
    # A maximum over |v_l| = 1: at a stationary point (H v)_l is a multiple of v_l for every layer.
    best = max(climb(dense, index, seed) for seed in range(3))
    assert result.value == pytest.approx(best, rel=1e-5)


def climb(dense, index, seed):
    generator = torch.Generator().manual_seed(100 + seed)
    v = torch.randn(len(dense), dtype=torch.float64, generator=generator)
    for _ in range(400):
        v = dense @ v
        for i in index.values():
            v[i] = v[i] / v[i].norm()
    return float(v @ dense @ v)


def flat(v):
    return torch.cat([t.flatten() for t in v.present])


def shape(row, objective):
    from flatmin.curvature.products.space import shaped

    return shaped(row, objective.params)


def test_a_layer_that_is_not_used_and_one_step_only():
    objective, _ = setting("conv")
    with pytest.warns(RuntimeWarning, match="not converged after 2 products"):
        result = flatmin.layerwise_rayleigh_sum(objective, max_products=2)
    assert result.per_layer["unused"] == 0
    assert not result.converged
    with pytest.raises(ValueError, match="tol must be positive"):
        flatmin.layerwise_rayleigh_sum(objective, tol=0.0)
