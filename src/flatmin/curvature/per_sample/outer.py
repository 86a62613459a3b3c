"""Sums over positions of outer products, sample by sample, and their norms."""

from __future__ import annotations

import torch
from torch import Tensor


def outer(delta: Tensor, a: Tensor) -> Tensor:
    """sum_t delta_cnt a_nt': (classes, samples, outputs, inputs)."""
    classes, samples, positions, outputs = delta.shape
    left = delta.permute(1, 0, 3, 2).reshape(samples, classes * outputs, positions)
    return (left @ a).view(samples, classes, outputs, -1).transpose(0, 1)


def root(a: Tensor) -> Tensor:
    """S (samples, positions, fewest) with S S' = a a': the covariance between positions of V a for random V."""
    if a.shape[1] >= a.shape[2]:
        return a
    wide = a.to(torch.promote_types(a.dtype, torch.float32)).transpose(1, 2)
    return torch.linalg.qr(wide, mode="r")[1].transpose(1, 2).to(a.dtype)


def outer_norms(delta: Tensor, a: Tensor) -> Tensor:
    """|sum_t delta_cnt a_nt'|^2: (classes, samples), float64; the cheaper of two ways."""
    classes, _, positions, outputs = delta.shape
    inputs = a.shape[2]
    if positions == 1:
        return squared(delta.flatten(2)) * squared(a.flatten(1))
    if positions * (classes * outputs + inputs) < classes * outputs * inputs:
        products = (delta @ delta.transpose(2, 3)).mul_(a @ a.transpose(1, 2))
        return products.sum((2, 3), dtype=torch.float64)
    return squared(outer(delta, a).flatten(2))


def squared(rows: Tensor) -> Tensor:
    """The squared norm along the last dimension, float64 (a norm is one pass over the memory, a sum of squares two)."""
    return torch.linalg.vector_norm(rows, dim=-1).double().square()
