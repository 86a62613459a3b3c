"""Low-rank matrix sensing: a problem where the flat minima are the ones that generalise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flatmin.problems.analytic import Problem


@dataclass(frozen=True)
class MatrixSensing(Problem):
    """f(U) = 1/(4m) sum_i (<A_i, U U^T> - y_i)^2, with y_i = <A_i, X> for a matrix X of low rank.

    Attributes:
        truth: X, (d, d), symmetric, positive semidefinite, of low rank.
        fresh: measurement matrices that f does not see, (m, d, d).
    """

    truth: Tensor
    fresh: Tensor

    def matrix(self, x: Tensor) -> Tensor:
        """U U^T, (d, d), for x the rows of U one after the other, (d * d,)."""
        u = x.view(len(self.truth), -1)
        return u @ u.T

    def recovery_error(self, x: Tensor) -> Tensor:
        """|U U^T - X|_F^2 / |X|_F^2."""
        truth = self.truth.to(x)
        return (self.matrix(x) - truth).square().sum() / truth.square().sum()

    def validation_error(self, x: Tensor) -> Tensor:
        """The mean squared residual of fresh measurements over their mean square."""
        rows = self.fresh.to(x).flatten(1)
        expected = rows @ self.truth.to(x).flatten()
        return (rows @ self.matrix(x).flatten() - expected).square().mean() / expected.square().mean()


def matrix_sensing(dim: int = 30, rank: int = 2, num_measurements: int | None = None, seed: int = 0) -> MatrixSensing:
    """Recovers a d x d matrix X of rank r from m measurements, with U of full width d.

    X = U_0 U_0^T with U_0 standard normal (d, r); A_i = (B + B^T) / 2, B standard normal; U starts standard normal.
    By default m is half of the d (d + 1) / 2 unknowns: minima of f are many, and most do not recover X. The trace of
    the Hessian at a minimum is (2/m) sum_i |A_i U|_F^2, about d |U|_F^2 = d tr(U U^T): flat minima have a small
    nuclear norm, and with enough random measurements those recover X (Ding et al.).

    Gradient: (1/m) sum_i r_i A_i U. Smoothed, with a_i = tr A_i:

        f + 1/(4m) sum_i [4 s^2 |A_i U|^2 + 2 r_i d s^2 a_i + d^2 s^4 a_i^2 + 2 d s^4 |A_i|^2],    s = sigma

    Args:
        dim: d.
        rank: r, of X.
        num_measurements: m; d (d + 1) / 4, rounded down, if not given.
        seed: of X, the measurements and the start.

    Memory: 2 m d^2 numbers in float64, for the measurements and as many fresh ones.

    Source: the setting of the NSO paper's experiment (d = 100, r = 5, m = 2500, learning rate 0.0025, sigma 0.08); that
    flat minima recover X: Ding, Drusvyatskiy, Fazel, Harchaoui 2022, arXiv:2203.03756.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    m = dim * (dim + 1) // 4 if num_measurements is None else num_measurements
    factor = normal(dim, rank)
    truth = factor @ factor.T
    a, fresh = ((b + b.transpose(1, 2)) / 2 for b in (normal(m, dim, dim), normal(m, dim, dim)))
    y = a.flatten(1) @ truth.flatten()

    def parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, u = a.to(x).flatten(1), x.view(dim, dim)
        return rows, u, rows @ (u @ u.T).flatten() - y.to(x)

    def value(x: Tensor) -> Tensor:
        return parts(x)[2].square().sum() / (4 * m)

    def gradient(x: Tensor) -> Tensor:
        rows, u, residuals = parts(x)
        return ((residuals @ rows).view(dim, dim) @ u).flatten() / m

    def hessian(x: Tensor) -> Tensor:
        rows, u, residuals = parts(x)
        first = torch.kron((residuals @ rows).view(dim, dim), torch.eye(dim).to(x))
        moved = (a.to(x) @ u).flatten(1)
        return (first + 2 * moved.T @ moved) / m

    def smoothed(x: Tensor, sigma: float) -> Tensor:
        rows, u, residuals = parts(x)
        variance, traces = sigma**2, rows.view(m, dim, dim).diagonal(dim1=1, dim2=2).sum(1)
        moved = (a.to(x) @ u).square().sum((1, 2))
        extra = 4 * variance * moved + 2 * dim * variance * residuals * traces
        extra = extra + (dim * variance * traces) ** 2 + 2 * dim * variance**2 * rows.square().sum(1)
        return value(x) + extra.sum() / (4 * m)

    return MatrixSensing(
        name=f"matrix sensing, d = {dim}, rank {rank}",
        value=value,
        gradient=gradient,
        hessian=hessian,
        smoothed=smoothed,
        start=normal(dim * dim),
        truth=truth,
        fresh=fresh,
    )
