"""Quadratics, a cubic, x^4 and the hyperbola (1 - xy)^2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Problem:
    """A function with everything about it known.

    Attributes:
        name: what it is called.
        value: x (dim,) -> f(x), a 0-dim tensor.
        gradient: x (dim,) -> (dim,).
        hessian: x (dim,) -> (dim, dim).
        smoothed: (x, sigma) -> E f(x + u), u ~ N(0, sigma^2 I).
        start: where an optimizer begins, (dim,), float64.

    Cost: a call of each evaluates its closed form: no gradient of `value` is taken.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], Tensor]
    hessian: Callable[[Tensor], Tensor]
    smoothed: Callable[[Tensor, float], Tensor]
    start: Tensor

    @property
    def dim(self) -> int:
        """The number of variables."""
        return self.start.numel()

    def trace(self, x: Tensor) -> Tensor:
        """The trace of the Hessian at x."""
        return self.hessian(x).trace()

    def spectrum(self, x: Tensor) -> Tensor:
        """All eigenvalues of the Hessian at x, ascending, (dim,)."""
        return torch.linalg.eigvalsh(self.hessian(x))

    def module(self, at: Tensor | None = None) -> Point:
        """A module with one parameter `x` (starting `at`, or at `start`) whose output is f(x)."""
        return Point(self, self.start if at is None else at)


class Point(nn.Module):
    """A point on a problem; calling it (with or without arguments) gives the value there."""

    def __init__(self, problem: Problem, at: Tensor):
        super().__init__()
        self.problem = problem
        self.x = nn.Parameter(at.clone())

    def forward(self, *_: object) -> Tensor:
        """f(x)."""
        return self.problem.value(self.x)


def quadratic(a: Tensor, b: Tensor | None = None, name: str = "quadratic") -> Problem:
    """f(x) = x^T A x / 2 + b^T x; the Hessian is A everywhere. Smoothed: f + sigma^2 tr(A) / 2.

    Args:
        a: A, (dim, dim), symmetric (which is not checked).
        b: (dim,); zero if not given.
        name: of the problem.
    """
    b = torch.zeros_like(a[0]) if b is None else b
    dim = a.shape[0]

    def value(x: Tensor) -> Tensor:
        return 0.5 * x @ a.to(x) @ x + b.to(x) @ x

    return Problem(
        name=name,
        value=value,
        gradient=lambda x: a.to(x) @ x + b.to(x),
        hessian=lambda x: a.to(x),
        smoothed=lambda x, sigma: value(x) + 0.5 * sigma**2 * a.to(x).trace(),
        start=torch.linspace(1.0, 2.0, dim, dtype=torch.float64),
    )


def ill_conditioned(dim: int = 8, condition: float = 1e4, seed: int = 0) -> Problem:
    """A quadratic x^T A x / 2 in a random basis; its eigenvalues fall geometrically from 1 to 1 / condition.

    Args:
        dim: the number of variables.
        condition: largest eigenvalue over the smallest.
        seed: of the basis.
    """
    eigenvalues = torch.logspace(0, -1, dim, base=condition, dtype=torch.float64)
    return quadratic(_rotated(eigenvalues, seed), name="ill-conditioned quadratic")


def rank_deficient(dim: int = 8, rank: int = 3, seed: int = 0) -> Problem:
    """A quadratic x^T A x / 2 with eigenvalues rank, ..., 2, 1 and dim - rank zeros: a flat manifold of minima.

    Args:
        dim: the number of variables.
        rank: the number of directions across the minima.
        seed: of the basis.
    """
    eigenvalues = torch.zeros(dim, dtype=torch.float64)
    eigenvalues[:rank] = torch.arange(rank, 0, -1)
    return quadratic(_rotated(eigenvalues, seed), name="rank-deficient quadratic")


def quartic() -> Problem:
    """f(x) = x^4: gradient 4 x^3, Hessian 12 x^2, smoothed x^4 + 6 sigma^2 x^2 + 3 sigma^4."""
    return Problem(
        name="x^4",
        value=lambda x: (x**4).sum(),
        gradient=lambda x: 4 * x**3,
        hessian=lambda x: torch.diag(12 * x**2),
        smoothed=lambda x, sigma: (x**4 + 6 * sigma**2 * x**2 + 3 * sigma**4).sum(),
        start=torch.tensor([1.5], dtype=torch.float64),
    )


def cubic(m: float = 0.3) -> Problem:
    """f(x) = x^2 / 2 + m x^3 / 6: the simplest minimum, at 0, whose Hessian 1 + m x changes.

    Smoothed: f + sigma^2 (1 + m x) / 2, minimal at (sqrt(1 - m^2 sigma^2) - 1) / m, on the flatter side. Below -2 / m
    the function falls without end, so keep to the basin of 0.

    Args:
        m: the change of the Hessian, not 0.
    """

    def value(x: Tensor) -> Tensor:
        return (0.5 * x**2 + m / 6 * x**3).sum()

    return Problem(
        name="x^2 / 2 + m x^3 / 6",
        value=value,
        gradient=lambda x: x + 0.5 * m * x**2,
        hessian=lambda x: torch.diag(1 + m * x),
        smoothed=lambda x, sigma: value(x) + 0.5 * sigma**2 * (1 + m * x).sum(),
        start=torch.tensor([1.0], dtype=torch.float64),
    )


def hyperbola() -> Problem:
    """f(x, y) = (1 - xy)^2: a curve of minima xy = 1 whose trace 2 (x^2 + y^2) is least at +-(1, 1).

    Smoothed: f + sigma^2 (x^2 + y^2) + sigma^4, minimal on x = y with x^2 = 1 - sigma^2. The start (4, 1/4) is a
    sharp minimum: trace 32.125.

    Source: a flat manifold of minima as in Ahn, Jadbabaie, Sra 2024.
    """

    def gradient(x: Tensor) -> Tensor:
        return -2 * (1 - x[0] * x[1]) * x.flip(0)

    def hessian(x: Tensor) -> Tensor:
        off = 4 * x[0] * x[1] - 2
        return torch.stack([torch.stack([2 * x[1] ** 2, off]), torch.stack([off, 2 * x[0] ** 2])])

    def value(x: Tensor) -> Tensor:
        return (1 - x[0] * x[1]) ** 2

    return Problem(
        name="(1 - xy)^2",
        value=value,
        gradient=gradient,
        hessian=hessian,
        smoothed=lambda x, sigma: value(x) + sigma**2 * (x**2).sum() + sigma**4,
        start=torch.tensor([4.0, 0.25], dtype=torch.float64),
    )


def _rotated(eigenvalues: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator, dtype=torch.float64))
    return (q * eigenvalues) @ q.T
