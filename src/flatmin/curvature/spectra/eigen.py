"""Extreme eigenvalues of the Hessian, or of another curvature operator, by Lanczos iteration (`lanczos.py`).

The residual r = |H y - theta y| of a Ritz pair is known without another product, and an eigenvalue lies within r of
theta. That it is the *largest*, or that no other one is near, cannot be proved. In a crowded spectrum (1, up to a
thousandth, and one value apart) the first Ritz values have small residuals and are not the largest; two eigenvalues
that are not told apart yet look like one between them, whose residual is small but does not fall. The iteration
therefore stops only if, for every wanted value, after at least 8 products and with
size = min(|theta|, theta_max - theta_min), since the spread does not change with a shift,

    residual <= tol size
    theta has moved by at most tol size over the last 3 products
    the residual fell by 30% or more in each of the last 4 products, or is at most a tenth of tol size

The last one costs nothing where the values stand apart, and finds most of the wrong answers where they do not
(docs/decisions/0013-stopping.md).

An eigenvalue that occurs several times, exactly, is one to a Krylov space: it holds one vector of that eigenspace, and
further copies only as rounding brings them in. Networks have such values by symmetry only: a linear model with several
outputs, a layer at zero. With `multiple=True` the search is done again, from a random vector orthogonal to what was
found, until nothing as large comes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from flatmin.checks import check_choice, check_positive, check_whole
from flatmin.curvature.function.arguments import check_vector, of_operator
from flatmin.curvature.function.objective import Objective
from flatmin.curvature.products.operators import HessianOperator, Operator
from flatmin.curvature.products.space import NUDGE, Space, filled, flatten, shaped
from flatmin.curvature.results import EigenResult
from flatmin.curvature.spectra.lanczos import Lanczos, Rows
from flatmin.noise import mix_seeds
from flatmin.notices import warn
from flatmin.vectors import Vector

MIN_PRODUCTS = 8  # before that a start that is nearly orthogonal to the wanted vector shows nothing of it
STABLE = 3  # products over which a value must stay
FALLS, FALL = 4, 0.7  # products over which its residual must fall, each time by this factor ...
TINY = 0.1  # ... unless it is so small a part of what is allowed


@of_operator
def top_eigenvalues(
    objective: Objective | Operator,
    k: int = 1,
    *,
    which: Literal["LA", "SA"] = "LA",
    tol: float = 1e-3,
    max_products: int | None = None,
    max_basis: int | None = None,
    start: Vector | Literal["gradient", "random"] = "gradient",
    vectors: bool = False,
    multiple: bool = False,
    seed: int | None = 0,
) -> EigenResult:
    """The `k` algebraically largest ("LA") or smallest ("SA") eigenvalues of the Hessian.

    Args:
        objective: what to measure: the Hessian of an Objective, or an operator (`GaussNewtonOperator(objective)`, ...).
        k: how many.
        which: "LA" or "SA".
        tol: an eigenvalue counts as found when its residual is at most `tol` times its size, and at most `tol` times
            the spread of the spectrum that was seen, its value stays within that over 3 products, and its residual is
            falling, or is at most a tenth of that.
        max_products: Hessian-vector products over the whole data, at most; 100, or 5 k if that is more, if not given.
        max_basis: vectors that are kept at a time, each one copy of the parameters; then the iteration is restarted
            from the best of them. 40, or 2 k + 20 if that is more, if not given; fewer cost more products.
        start: "gradient" (plus as much of a random vector, for eigenvectors that the gradient has no part in),
            "random", or a vector, such as `result.vectors[0]` of an earlier measurement (plus a little noise).
        vectors: whether the result holds the eigenvectors too.
        multiple: count eigenvalues that occur several times as often as they occur; else once, or as often as rounding
            shows them. One more search at least, of 8 products or more, and one for each copy that is found.
        seed: of the starting vector; `None` is really random.

    Returns:
        EigenResult with `values`, `residuals`, `errors`, `converged`. If not converged, a RuntimeWarning says so too.
        An eigenvalue lies within the residual of each value (rounding included); usually it lies within residual^2 /
        gap, which `errors` estimates. That it is the largest is what the rest of the rule is for: it cannot be proved.

    Cost: 2 to 3 gradients of the data per product; usually 8 to 25 products, never fewer than 8 (or the number of
    parameters). Memory: one copy of the parameters per product, up to `max_basis`; twice that at a restart.

    Raises:
        ValueError: k < 1 or larger than the number of parameters, `tol` not positive and finite, max_products < 1,
            max_basis < k + 3, a `start` that is no Vector of these parameters, data that gives another loss on a second
            pass, or a Hessian that is not finite.

    Source: Lanczos 1950; Paige 1980 for why full reorthogonalisation removes ghost copies; Wu, Simon 2000 for the
    restart.
    """
    operator, seed = as_operator(objective, seed)
    objective = operator.objective
    max_basis = max(40, 2 * k + 20) if max_basis is None else max_basis
    max_products = max(100, 5 * k) if max_products is None else max_products
    _check(objective, k, which, tol, max_products, max_basis)
    objective.check()
    lanczos = Lanczos(operator.product, objective.params, seed=seed, start=_start(operator, start, seed))
    search = _Search(lanczos, k, 1.0 if which == "LA" else -1.0, tol)
    converged = search.run(max_products, max_basis)
    pairs, products = search.pairs(with_vectors=vectors or multiple), lanczos.num_products
    if multiple and converged:
        pairs, converged, more = _with_copies(pairs, operator, search, max_products - products, max_basis, seed)
        products += more
    if not converged:
        worst = max(pairs, key=lambda pair: pair.residual)
        found = f", and only {len(pairs)} of {k} values were found" if len(pairs) < k else ""
        warn(
            f"top_eigenvalues is not converged after {products} products: residuals are up to {worst.residual:.2g} (of "
            f"{worst.value:.4g}){found}; others may lie between. Raise max_products or tol.",
            RuntimeWarning,
        )
    return EigenResult(
        value=pairs[0].value,
        stderr=pairs[0].residual,
        method=f"Lanczos, full reorthogonalisation{', multiples searched' if multiple else ''}; {operator.method}",
        num_products=products,
        num_samples=objective.num_samples,
        seed=seed,
        values=tuple(p.value for p in pairs),
        residuals=tuple(p.residual for p in pairs),
        errors=tuple(p.error for p in pairs),
        converged=converged,
        which=which,
        vectors=tuple(shaped(p.vector, objective.params) for p in pairs if p.vector is not None) if vectors else (),
    )


def as_operator(objective: Objective | Operator, seed: int | None) -> tuple[Operator, int]:
    """The operator itself, or the Hessian of an objective; and the seed, or a random one for `None`."""
    if isinstance(objective, Operator):
        return objective, objective.objective.members.seed(seed)
    seed = objective.members.seed(seed)
    return HessianOperator(objective, seed=seed), seed


def _check(objective: Objective, k: int, which: str, tol: float, max_products: int, max_basis: int) -> None:
    if not 1 <= check_whole("k", k) <= objective.num_params:
        raise ValueError(f"k must be between 1 and the number of parameters ({objective.num_params}), got {k}.")
    check_choice("which", which, ("LA", "SA"))
    check_positive("tol", tol)
    check_whole("max_products", max_products, 1)
    if check_whole("max_basis", max_basis) < k + 3:
        raise ValueError(f"max_basis must be at least k + 3 = {k + 3}, got {max_basis}.")


def _start(operator: Operator, start: Vector | str, seed: int) -> Tensor | None:
    if start == "random":
        return None
    if isinstance(start, str) and start != "gradient":
        raise ValueError(f"start must be 'gradient', 'random' or a Vector, got {start!r}.")
    space = Space(operator.objective.params)
    if isinstance(start, str):
        given = flatten(operator.gradient()).to(space.like)
    else:
        check_vector("start", start, space.params)
        given = flatten(Vector(filled(start, space.params))).to(space.like)
    size = space.norm(given)
    if not (math.isfinite(size) and size > 0):
        return None
    return space.nudged(given / size, 1.0 if isinstance(start, str) else NUDGE, seed)


@dataclass(frozen=True)
class _Pair:
    """A Ritz pair with its residual and the estimate of its error; the vector is flat, of norm 1."""

    value: float
    residual: float
    error: float
    vector: Tensor | None


def _with_copies(
    pairs: list[_Pair], operator: Operator, search: _Search, max_products: int, max_basis: int, seed: int
) -> tuple[list[_Pair], bool, int]:
    """The k wanted pairs among `pairs` and what lies beside them, whether they were found, and products used."""
    params, k, sign, used = operator.objective.params, len(pairs), search.sign, 0
    found = Rows(Space(params))
    for pair in pairs:
        assert pair.vector is not None
        found.append(pair.vector)
    while len(found) < operator.num_params:
        if used >= max_products:
            return pairs, False, used
        lanczos = Lanczos(operator.product, params, seed=mix_seeds(seed, len(found)), deflated=found)
        beside = _Search(lanczos, 1, sign, search.tol)
        converged = beside.run(max_products - used, max_basis)
        used += lanczos.num_products
        (new,) = beside.pairs(with_vectors=True)
        if not converged:
            return pairs, False, used
        if sign * new.value <= sign * pairs[-1].value + search.tol * abs(pairs[-1].value):
            break  # nothing larger than the last of them
        assert new.vector is not None
        found.append(new.vector)
        pairs = sorted([*pairs, new], key=lambda pair: -sign * pair.value)[:k]
    return pairs, True, used


class _Search:
    """Products until the k wanted Ritz pairs are found."""

    def __init__(self, lanczos: Lanczos, k: int, sign: float, tol: float):
        self._lanczos, self._k, self.sign, self.tol = lanczos, k, sign, tol
        self._history: list[tuple[np.ndarray, np.ndarray]] = []  # values and residuals, without rounding
        self._lowest, self._highest = math.inf, -math.inf  # of the spectrum, as far as it was seen
        self.values = self.residuals = self.errors = np.empty(0)  # the wanted end first; the latter two with rounding
        self._coordinates = np.empty((0, 0))

    def run(self, max_products: int, max_basis: int) -> bool:
        """Whether they were found."""
        while True:
            if self._lanczos.size >= max_basis:
                self._restart()
            self._lanczos.extend()
            found = self._look() or self._lanczos.complete
            if found or self._lanczos.num_products >= max_products:
                return found

    def pairs(self, *, with_vectors: bool) -> list[_Pair]:
        """What was found, the wanted end first."""
        numbers = [
            (float(v), float(r), float(e)) for v, r, e in zip(self.values, self.residuals, self.errors, strict=True)
        ]
        if not with_vectors:
            return [_Pair(*of_one, None) for of_one in numbers]
        rows = self._lanczos.vectors(self._coordinates[:, : len(self.values)])
        return [_Pair(*of_one, rows.row(i).clone()) for i, of_one in enumerate(numbers)]

    def _look(self) -> bool:
        theta, residuals, coordinates = self._lanczos.ritz()
        self._lowest, self._highest = min(self._lowest, theta[0]), max(self._highest, theta[-1])
        order = np.argsort(-self.sign * theta)
        self._coordinates = coordinates[:, order]
        values, bounds = theta[order][: self._k], residuals[order][: self._k]
        ahead = self.sign * np.sort(self.sign * self._lanczos.ahead())[::-1][: len(values)]
        self.values, self.residuals = values, bounds + self._lanczos.rounding
        self.errors = np.minimum(np.abs(ahead - values), bounds) + self._lanczos.rounding
        self._history = [*self._history[-FALLS:], (values, bounds)]
        return self._lanczos.num_products >= MIN_PRODUCTS and self._found()

    def _found(self) -> bool:
        if len(self._history) <= FALLS or any(len(values) < self._k for values, _ in self._history):
            return False
        values, bounds = (np.stack(rows) for rows in zip(*self._history, strict=True))
        floor = self._lanczos.floor
        allowed = self.tol * np.minimum(np.abs(self.values), self._highest - self._lowest)
        small = bounds[-1] <= np.maximum(allowed, floor)
        stays = np.abs(values[-1 - STABLE :] - values[-1]).max(0) <= np.maximum(allowed, 10 * floor)
        falls = (bounds[1:] <= FALL * bounds[:-1]).all(0) | (bounds[-1] <= np.maximum(TINY * allowed, floor))
        return bool((small & stays & falls).all())

    def _restart(self) -> None:
        # The wanted vectors and half of the others, from the wanted end: the nearest ones slow convergence down most.
        keep = self._k + (self._lanczos.size - self._k) // 2
        theta, _, coordinates = self._lanczos.ritz()
        order = np.argsort(-self.sign * theta)[:keep]
        self._lanczos.restart(theta[order], coordinates[:, order])
