"""Extreme eigenvalues of the Hessian by Lanczos iteration with full reorthogonalisation.

After m products the Hessian is projected onto the Krylov space of m vectors q_1 .. q_m:

    H Q = Q T + beta_m q_{m+1} e_m^T,    T tridiagonal (m, m)

An eigenpair (theta, s) of T gives the Ritz pair (theta, Q s), whose residual |H Q s - theta Q s| is beta_m |s_m|
exactly, without another product. The iteration stops on that bound, not on a change between steps.
"""

from __future__ import annotations

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
        tol: an eigenvalue counts as found when its residual is at most `tol` times its size. Its error is then
            at most the residual, and usually about residual^2 / gap.
        max_products: Hessian-vector products over the whole data, at most.
        seed: of the starting vector.

    Returns:
        EigenResult with `values`, `residuals`, `converged`. If not converged, a RuntimeWarning says so too.

    Cost: about 3 gradients of the data per product; usually 6 to 20 products. Memory: one copy of the parameters per
    product.

    Raises:
        ValueError: k < 1 or larger than the number of parameters, or data that gives another loss on a second pass.

    Source: Lanczos 1950; Paige 1980 for why full reorthogonalisation removes ghost copies.
    """
    if not 1 <= k <= objective.num_params:
        raise ValueError(f"k must be between 1 and the number of parameters ({objective.num_params}), got {k}.")
    if which not in ("LA", "SA"):
        raise ValueError(f"which must be 'LA' (largest) or 'SA' (smallest), got {which!r}.")
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

    def run(self, k: int, sign: float, tol: float, max_products: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Products until the k wanted Ritz pairs are found twice in a row: values, residuals, converged."""
        previous = np.full(k, np.nan)
        while True:
            self.extend()
            values, residuals = self.ritz(sign, k)
            found = len(values) == k and bool((residuals <= tol * np.maximum(np.abs(values), self.floor)).all())
            if self.complete or (found and np.allclose(previous, values, rtol=tol, atol=self.floor)):
                return values, residuals, True
            if self.size >= max_products:
                return values, residuals, found
            previous = values if len(values) == k else previous

    def extend(self) -> None:
        """One product: q_{m+1}, alpha_m, beta_m."""
        q = self._next
        self._basis.append(q)
        w = self._product(q)
        self._alpha.append(float(q @ w))
        w = self._orthogonal(w)
        beta = float(w.norm())
        if len(self._basis) == q.numel():
            beta = 0.0
            self.complete = True
        elif beta <= 10 * self.floor:  # an invariant subspace: go on in its complement
            beta = 0.0
            w = self._random()
        self._beta.append(beta)
        if not self.complete:
            self._next = w / w.norm()

    def ritz(self, sign: float, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k Ritz values at the wanted end, and their residuals."""
        theta, s = eigh_tridiagonal(np.array(self._alpha), np.array(self._beta[:-1]))
        order = np.argsort(-sign * theta)[:k]
        return theta[order], np.abs(self._beta[-1] * s[-1, order])

    def _product(self, q: Tensor) -> Tensor:
        params = self._objective.params
        parts = q.split([p.numel() for p in params])
        v = Vector(part.view_as(p).to(p.dtype) for part, p in zip(parts, params, strict=True))
        return torch.cat([t.flatten().to(q.dtype) for t in hessian_product(self._objective, v).present])

    def _orthogonal(self, w: Tensor) -> Tensor:
        for _ in range(2):  # twice is enough (Kahan)
            for q in self._basis:
                w = w - (q @ w) * q
        return w

    def _random(self) -> Tensor:
        params = self._objective.params
        dtype = torch.promote_types(params[0].dtype, torch.float32)
        like = torch.empty(self._objective.num_params, dtype=dtype, device=params[0].device)
        w = self._orthogonal(draw_like(like, "normal", self._generator))
        return w / w.norm()
