"""Flat minima in the sense of Ahn, Jadbabaie and Sra: stationary points of the trace along the manifold of minima.

For functions of up to a few hundred variables, where the Hessian can be written down:

    Phi(x)      where gradient flow dx/dt = -grad f, started at x, ends: a minimum
    trbar       tr(Hessian f) / d, the normalised trace
    flat        the part of grad trbar that is tangent to the minima is zero. At a minimum whose Hessian has the null
                space of its tangent, that part is P grad trbar, P the projection onto the null space

x is an (eps, eps')-flat minimum if f(x) - f(Phi(x)) <= eps and |P grad trbar(Phi(x))| <= eps'; the paper's results
have eps' = sqrt(eps).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class FlatMinimum:
    """What `flat_minimum` found.

    Attributes:
        minimum: Phi(x), (dim,), float64.
        excess: f(x) - f(Phi(x)).
        normalised_trace: tr(Hessian) / dim at the minimum.
        tangential_gradient: |P grad trbar| at the minimum.
        dimension: of the null space, which is the manifold's where f is Morse-Bott.
        residual: |grad f| at the minimum: how far the flow was followed.
        is_minimum: whether no eigenvalue of the Hessian there is negative, to `null_tol`. Gradient flow can end in a
            saddle, and rests on a maximum.
    """

    minimum: Tensor
    excess: float
    normalised_trace: float
    tangential_gradient: float
    dimension: int
    residual: float
    is_minimum: bool

    def __str__(self) -> str:
        kind = "a minimum" if self.is_minimum else "a saddle or a maximum"
        return (
            f"{self.excess:.4g} above {kind} with tr(H) / d = {self.normalised_trace:.4g}, whose gradient along its "
            f"manifold (dimension {self.dimension}) is {self.tangential_gradient:.3g}"
        )

    def is_flat(self, eps: float, eps_prime: float | None = None) -> bool:
        """Whether x is an (eps, eps')-flat minimum; eps' is sqrt(eps) if not given. Never at a saddle."""
        eps_prime = math.sqrt(eps) if eps_prime is None else eps_prime
        return self.is_minimum and self.excess <= eps and self.tangential_gradient <= eps_prime


def limit_map(f: Function, x: Tensor, *, tol: float = 1e-8, max_time: float = 1e8) -> Tensor:
    """Phi(x), the end of gradient flow from x, (dim,), float64.

    Integrates `dx/dt = -grad f` with an implicit method (the Hessian is its Jacobian) until `|grad f| <= tol`.

    Args:
        f: a function of a vector (dim,), twice differentiable, in float64.
        x: the start, (dim,).
        tol: of the gradient norm at the end.
        max_time: of the flow.

    Cost: tens to hundreds of gradients and Hessians of f. Memory: dim^2.

    Raises:
        ValueError: if the flow does not come to rest within `max_time`.
    """

    def at(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=np.float64)).to(x.device)

    def slope(_: float, values: np.ndarray) -> np.ndarray:
        return -gradient(f, at(values)).cpu().numpy()

    from scipy.integrate import solve_ivp  # here, since few need it and it is slow to import

    def rest(_: float, values: np.ndarray) -> float:
        return float(gradient(f, at(values)).norm()) - tol

    rest.terminal = True  # type: ignore[attr-defined]
    start = x.detach().double().cpu().numpy()
    if rest(0.0, start) <= 0:
        return x.detach().double().clone()
    solution = solve_ivp(
        slope,
        (0.0, max_time),
        start,
        method="BDF",
        jac=lambda _, values: -hessian(f, at(values)).cpu().numpy(),
        events=rest,
        rtol=1e-10,
        atol=1e-12,
    )
    end = at(solution.y[:, -1])
    if solution.status != 1:
        raise ValueError(
            f"gradient flow did not come to rest: |grad f| = {float(gradient(f, end).norm()):.2g} after time "
            f"{solution.t[-1]:.2g} ({solution.message}). Raise tol or max_time; f may have no minimum there."
        )
    return end


def flat_minimum(f: Function, x: Tensor, *, tol: float = 1e-8, null_tol: float = 1e-5) -> FlatMinimum:
    """Follows gradient flow from x to a minimum, and says how flat that is among its neighbours.

    Args:
        f: a function of a vector (dim,), three times differentiable, in float64.
        x: a point near the minima, (dim,).
        tol: of the gradient norm at which the flow counts as at rest.
        null_tol: eigenvalues of at most this size, times that of the largest in size, span the null space.

    Cost: that of `limit_map`, and third derivatives: dim more gradients of gradients. Memory: dim^2.

    Raises:
        ValueError: if the flow does not come to rest.

    Source: Ahn, Jadbabaie, Sra, ICML 2024, section 2. That the tangential part is a projection holds where the null
    space of the Hessian is the tangent space of the minima; elsewhere the statement is about that null space.
    """
    minimum = limit_map(f, x, tol=tol)
    eigenvalues, vectors = torch.linalg.eigh(hessian(f, minimum))
    zero = null_tol * eigenvalues.abs().max()
    null = vectors[:, eigenvalues.abs() <= zero]
    slope = null.T @ _gradient_of_normalised_trace(f, minimum)
    return FlatMinimum(
        minimum=minimum,
        excess=float(f(x.detach().double())) - float(f(minimum)),
        normalised_trace=float(eigenvalues.mean()),
        tangential_gradient=float(slope.norm()),
        dimension=null.shape[1],
        residual=float(gradient(f, minimum).norm()),
        is_minimum=bool(eigenvalues[0] >= -zero),
    )


def gradient(f: Function, x: Tensor) -> Tensor:
    """The gradient of f at x, (dim,)."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(f(x), x)[0]


def hessian(f: Function, x: Tensor) -> Tensor:
    """The Hessian of f at x, (dim, dim), row by row, reverse over reverse."""
    x = x.detach().requires_grad_()
    return _rows(f, x, create_graph=False).detach()


def _rows(f: Function, x: Tensor, *, create_graph: bool) -> Tensor:
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(f(x), x, create_graph=True)
        if not slope.requires_grad:
            return x.new_zeros(len(x), len(x))
        rows = (
            torch.autograd.grad(entry, x, retain_graph=True, create_graph=create_graph, materialize_grads=True)[0]
            for entry in slope
        )
        return torch.stack(list(rows))


def _gradient_of_normalised_trace(f: Function, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    trace = _rows(f, x, create_graph=True).trace() / len(x)
    if not trace.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(trace, x, materialize_grads=True)[0].detach()
