"""The function that noisy gradient steps of a constant size descend."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flatmin.problems.analytic import Problem

NUM_NODES = 32  # exact for polynomials of degree 63


def smoothed_by_steps(
    f: Problem | Callable[[Tensor], Tensor],
    eta: float,
    noise_std: float,
    *,
    num_draws: int = 4096,
    seed: int = 0,
) -> Callable[[Tensor], Tensor]:
    """The smoothed objective of SGD with learning rate eta, F(v) = E f(v - eta e), e ~ N(0, noise_std^2 I).

    With w' = w - eta (grad f(w) + e) and the shifted iterate v = w - eta grad f(w),

        E[v' | v] = v - eta grad F(v):

    the shifted iterates do gradient descent on F, in the mean. To second order F adds eta^2 noise_std^2 / 2 times the
    trace of the Hessian, so a larger step prefers flatter minima.

    Args:
        f: a problem, or a function (dim,) -> 0-dim that torch.vmap can map.
        eta: the learning rate.
        noise_std: standard deviation of the gradient noise, in every coordinate.
        num_draws: with more than one variable, how many noises are averaged (the same for every v; in pairs e and -e,
            so that odd terms cancel). The error falls as one over its root.
        seed: of those noises.

    Returns:
        F: (dim,) -> 0-dim, differentiable. Closed form for a problem; for a function of one variable Gauss-Hermite
        quadrature, which is exact to rounding where f is smooth on the scale of eta noise_std; else a mean over draws.

    Cost: for a function that is no problem, one evaluation of f for each node (32) or draw.

    Raises:
        ValueError: for a negative or infinite eta or noise_std.

    Source: Kleinberg, Li, Yuan, "An Alternative View: When Does SGD Escape Local Minima?", ICML 2018; Nitanda, Kikuchi,
    Maeda, Wu, AISTATS 2024, arXiv:2302.09376.
    """
    for name, value in (("eta", eta), ("noise_std", noise_std)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}.")
    sigma = eta * noise_std
    if isinstance(f, Problem):
        return lambda v: f.smoothed(v, sigma)

    def smoothed(v: Tensor) -> Tensor:
        points, weights = gauss_hermite(NUM_NODES) if v.numel() == 1 else draws(v.numel(), num_draws, seed)
        return torch.vmap(f)(v - sigma * points.to(v)) @ weights.to(v)

    return smoothed


def gauss_hermite(num_nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes (n, 1) and weights (n,) with E f(z) = weights @ f(nodes) for z ~ N(0, 1) and degrees below 2 n.

    Golub and Welsch: the eigenvalues of the Jacobi matrix, and the squared first entries of its eigenvectors.
    """
    off = torch.arange(1, num_nodes, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes[:, None], vectors[0] ** 2


def draws(dim: int, num_draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Normal noises (n, dim) in pairs z and -z, and equal weights (n,)."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn((num_draws + 1) // 2, dim, generator=generator, dtype=torch.float64)
    points = torch.cat([z, -z])
    return points, torch.full((len(points),), 1 / len(points), dtype=torch.float64)
