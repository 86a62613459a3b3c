"""Extreme eigenvalues of the Hessian by Lanczos iteration with full reorthogonalisation.

After m products the Hessian is projected onto the Krylov space of m vectors q_1 .. q_m:

    H Q = Q T + beta_m q_{m+1} e_m^T,    T tridiagonal (m, m)

An eigenpair (theta, s) of T gives the Ritz pair (theta, Q s), whose residual |H Q s - theta Q s| is beta_m |s_m|
exactly, without another product. So an eigenvalue lies within the residual of theta; that it is the *largest* cannot
be proved. In a crowded spectrum (1, up to a thousandth, and one value apart) the first Ritz values have small residuals
and are not the largest. The iteration therefore stops only if

    residual <= tol |theta|   and   residual <= tol (theta_max - theta_min)      the spread does not change with a shift
    theta has moved by at most tol (theta_max - theta_min) over the last 3 products, after at least 8
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from flatmin.curvature.objective import Objective
from flatmin.curvature.products import METHOD, hessian_product
from flatmin.curvature.results import EigenResult
from flatmin.noise import draw_like
from flatmin.vectors import Vector

MIN_PRODUCTS = 8  # before that a start that is nearly orthogonal to the wanted vector shows nothing of it
STABLE = 3  # products over which a value must stay


def top_eigenvalues(
    objective: Objective,
    k: int = 1,
    *,
    which: Literal["LA", "SA"] = "LA",
    tol: float = 1e-3,
    max_products: int = 100,
    seed: int = 0,
) -> EigenResult:
    """The `k` algebraically largest ("LA") or smallest ("SA") eigenvalues of the Hessian.

    Args:
        objective: what to measure.
        k: how many.
        which: "LA" or "SA".
        tol: an eigenvalue counts as found when its residual is at most `tol` times its size, and at most `tol` times
            the spread of the spectrum that was seen, and its value stays within that over 3 products.
        max_products: Hessian-vector products over the whole data, at most.
        seed: of the starting vector.

    Returns:
        EigenResult with `values`, `residuals`, `converged`. If not converged, a RuntimeWarning says so too. An
        eigenvalue lies within the residual of each value (rounding included), and usually within residual^2 / gap.
        That it is the largest is what the stability is for: it cannot be proved.

    Cost: about 3 gradients of the data per product; usually 8 to 20 products, never fewer than 8 (or the number of
    parameters). Memory: one copy of the parameters per product.

    Raises:
        ValueError: k < 1 or larger than the number of parameters, `tol` not positive and finite, max_products < 1, data
            that gives another loss on a second pass, or a Hessian that is not finite.

    Source: Lanczos 1950; Paige 1980 for why full reorthogonalisation removes ghost copies.
    """
    if not 1 <= k <= objective.num_params:
        raise ValueError(f"k must be between 1 and the number of parameters ({objective.num_params}), got {k}.")
    if which not in ("LA", "SA"):
        raise ValueError(f"which must be 'LA' (largest) or 'SA' (smallest), got {which!r}.")
    if not (math.isfinite(tol) and tol > 0):
        raise ValueError(f"tol must be positive and finite, got {tol}.")
    if max_products < 1:
        raise ValueError(f"max_products must be at least 1, got {max_products}.")
    objective.check()
    lanczos = _Lanczos(objective, seed)
    values, residuals, converged = lanczos.run(k, 1.0 if which == "LA" else -1.0, tol, max_products)
    if not converged:
        warnings.warn(
            f"top_eigenvalues is not converged after {lanczos.size} products: residuals {residuals.tolist()} for "
            f"values {values.tolist()}. Raise max_products or tol.",
            RuntimeWarning,
            stacklevel=2,
        )
    return EigenResult(
        value=float(values[0]),
        stderr=float(residuals[0]),
        method=f"Lanczos, full reorthogonalisation; {METHOD}",
        num_products=lanczos.size,
        num_samples=objective.num_samples,
        seed=seed,
        values=tuple(float(v) for v in values),
        residuals=tuple(float(r) for r in residuals),
        converged=converged,
        which=which,
    )


class _Lanczos:
    """The growing Krylov basis and its tridiagonal projection."""

    def __init__(self, objective: Objective, seed: int):
        self._objective = objective
        self._generator = torch.Generator(objective.params[0].device).manual_seed(seed)
        self._basis: list[Tensor] = []  # orthonormal rows, (num_params,) each
        self._alpha: list[float] = []
        self._beta: list[float] = []
        self._next = self._random()
        self.complete = False

    @property
    def size(self) -> int:
        return len(self._basis)

    @property
    def floor(self) -> float:
        """Below this an eigenvalue is rounding: machine precision times the largest one seen."""
        scale = max((abs(a) for a in self._alpha), default=0.0)
        return torch.finfo(self._next.dtype).eps * max(scale, max(self._beta, default=0.0))

    @property
    def rounding(self) -> float:
        """What rounding may add to a residual: that of sums over all parameters."""
        return self.floor * math.sqrt(self._next.numel())

    def run(self, k: int, sign: float, tol: float, max_products: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Products until the k wanted Ritz pairs are found: values, residuals (with rounding), converged."""
        history: list[np.ndarray] = []
        while True:
            self.extend()
            theta, bounds = self.ritz(sign)
            history = [*history[-STABLE:], theta[:k]]
            found = self.complete or (self.size >= MIN_PRODUCTS and self._found(k, theta, bounds, history, tol))
            if found or self.size >= max_products:
                return theta[:k], bounds[:k] + self.rounding, found

    def _found(self, k: int, theta: np.ndarray, bounds: np.ndarray, history: list[np.ndarray], tol: float) -> bool:
        if any(len(values) < k for values in history) or len(history) <= STABLE:
            return False
        spread, values = np.ptp(theta), theta[:k]
        small = bounds[:k] <= np.maximum(tol * np.minimum(np.abs(values), spread), self.floor)
        moved = max(float(np.abs(earlier - values).max()) for earlier in history[:-1])
        return bool(small.all() and moved <= max(tol * spread, 10 * self.floor))

    def extend(self) -> None:
        """One product: q_{m+1}, alpha_m, beta_m."""
        q = self._next
        self._basis.append(q)
        w = self._product(q)
        self._alpha.append(_dot(q, w))
        w = self._orthogonal(w)
        beta = math.sqrt(_dot(w, w))
        if len(self._basis) == q.numel():
            beta = 0.0
            self.complete = True
        elif beta <= 10 * self.floor:  # an invariant subspace: go on in its complement
            beta = 0.0
            w = self._random()
        self._beta.append(beta)
        if not self.complete:
            self._next = w / math.sqrt(_dot(w, w))

    def ritz(self, sign: float) -> tuple[np.ndarray, np.ndarray]:
        """All Ritz values, the wanted end first, and their residuals."""
        theta, s = eigh_tridiagonal(np.array(self._alpha), np.array(self._beta[:-1]))
        order = np.argsort(-sign * theta)
        return theta[order], np.abs(self._beta[-1] * s[-1, order])

    def _product(self, q: Tensor) -> Tensor:
        params = self._objective.params
        parts = q.split([p.numel() for p in params])
        v = Vector(part.view_as(p).to(p.dtype) for part, p in zip(parts, params, strict=True))
        return torch.cat([t.flatten().to(q.dtype) for t in hessian_product(self._objective, v).present])

    def _orthogonal(self, w: Tensor) -> Tensor:
        for _ in range(2):  # twice is enough (Kahan)
            for q in self._basis:
                w = w - _dot(q, w) * q
        return w

    def _random(self) -> Tensor:
        params = self._objective.params
        dtype = torch.promote_types(params[0].dtype, torch.float32)
        like = torch.empty(self._objective.num_params, dtype=dtype, device=params[0].device)
        w = self._orthogonal(draw_like(like, "normal", self._generator))
        return w / math.sqrt(_dot(w, w))


def _dot(a: Tensor, b: Tensor) -> float:
    """Added up in double: in single precision a sum over a million entries loses three more digits."""
    return float((a * b).sum(dtype=torch.float64))
