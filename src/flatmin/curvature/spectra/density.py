"""The spectral density of the Hessian, or of another curvature operator, by stochastic Lanczos quadrature.

For a random unit vector z, the spectral measure of z is sum_i (z.v_i)^2 delta(lambda_i), whose mean over z is the
density (1/d) sum_i delta(lambda_i). m Lanczos steps from z give a measure of m points with the same moments up to
degree 2 m - 1:

    sum_j tau_j delta(theta_j),     theta_j the Ritz values, tau_j = (first coordinate of the Ritz vector)^2

The mean over probes is the estimate, their spread its error. Two things are done to the plain method:

    full reorthogonalisation      no eigenvalue comes back as a ghost copy of itself
    eigenvectors count as one     a Ritz pair that has converged is an eigenpair, and weighs 1/d exactly; later probes
                                  are drawn orthogonal to those found and stand for the d - k others. The outliers,
                                  few and large, would otherwise bring in most of the error
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import ndtr

from flatmin.checks import check_whole
from flatmin.curvature.function.arguments import of_operator
from flatmin.curvature.function.objective import Objective
from flatmin.curvature.products.operators import Operator
from flatmin.curvature.products.probes import stderr
from flatmin.curvature.products.space import Space
from flatmin.curvature.results import Estimate, Measurement
from flatmin.curvature.spectra.eigen import as_operator
from flatmin.curvature.spectra.lanczos import Lanczos, Rows
from flatmin.extras import need
from flatmin.noise import mix_seeds

RESOLVED = 0.02  # of the mass
CONVERGED = 1e-3  # residual over the spread of the spectrum below which a Ritz pair is an eigenpair


@dataclass(frozen=True, kw_only=True)
class DensityResult(Measurement):
    """The distribution of the eigenvalues; `value` is their mean, tr / d.

    Attributes:
        nodes: for each probe, where its measure has mass; ascending.
        weights: for each probe, how much; they add up to 1.
        eigenvalues: those that were found one by one, ascending. They are among the nodes, with weight 1 / num_params.
        num_params: the number of eigenvalues, d.
        zero: eigenvalues of this size and below are rounding.
    """

    nodes: tuple[tuple[float, ...], ...] = field(repr=False)
    weights: tuple[tuple[float, ...], ...] = field(repr=False)
    eigenvalues: tuple[float, ...]
    num_params: int
    zero: float

    def __str__(self) -> str:
        ends = min(x[0] for x in self.nodes), max(x[-1] for x in self.nodes)
        low, high = (0.0 if abs(end) <= self.zero else end for end in ends)
        return (
            f"{self.num_params} eigenvalues from {low:.3g} to {high:.3g}, mean {super().__str__()}, share below "
            f"{-self.resolved:.2g}: {self.negative_mass}"
        )

    def mass(self, low: float = -math.inf, high: float = math.inf) -> Estimate:
        """The share of the eigenvalues in low <= lambda < high.

        The error is that over probes, and that of the quadrature: where in its neighbourhood a node's mass lies is not
        known, so the mass below a bound is certain only up to the weights of the two nodes around it
        (Chebyshev-Markov-Stieltjes inequalities). For a bound inside the bulk that is most of the error.
        """
        shares, blurs = [], []
        for x, w in zip(map(np.array, self.nodes), map(np.array, self.weights), strict=True):
            shares.append(float(w[(x >= low) & (x < high)].sum()))
            blurs.append(float(_blur(x, w, np.array([low, high])).sum()))
        return Estimate(
            value=float(np.mean(shares)), stderr=math.hypot(stderr(np.array(shares)), float(np.mean(blurs)))
        )

    @property
    def negative_mass(self) -> Estimate:
        """The share of the eigenvalues below -`resolved`."""
        return self.mass(high=-self.resolved)

    @property
    def resolved(self) -> float:
        """How far from zero an eigenvalue must lie for its sign to be told; `zero` at least.

        Most eigenvalues of a network are next to zero, on both sides, and one node of the quadrature has the weight of
        all of them. Where it lies by chance, positive or negative, says nothing of how many are on which side. So this
        is the smallest distance, up to half of the lowest node's, at which the mass below is known to within 2% or
        a fifth of the uncertainty next to zero; more steps bring it down.
        """
        lowest = max(-min(x[0] for x in self.nodes), 0.0)
        inside = {-x for nodes in self.nodes for x in nodes if self.zero < -x < 0.5 * lowest}
        distances = np.array([self.zero, *sorted(inside)])
        distances[1:] *= 1 + 1e-6  # a little beyond the node
        blurs = np.mean(
            [_blur(np.array(x), np.array(w), -distances) for x, w in zip(self.nodes, self.weights, strict=True)], axis=0
        )
        good = np.flatnonzero(blurs <= max(RESOLVED, blurs[0] / 5))
        return float(distances[good[0]]) if len(good) else self.zero

    def quadrature(self) -> tuple[np.ndarray, np.ndarray]:
        """All nodes, ascending, and their weights in the mean over probes."""
        nodes = np.concatenate([np.array(x) for x in self.nodes])
        weights = np.concatenate([np.array(w) for w in self.weights]) / len(self.nodes)
        order = np.argsort(nodes)
        return nodes[order], weights[order]

    def density(self, grid: np.ndarray, width: float) -> tuple[np.ndarray, np.ndarray]:
        """The density on a grid, smoothed by a Gaussian of this standard deviation, and its standard error.

        The error is that over probes, and that of the quadrature: how far the curve is from the one with the mass of
        each node spread out evenly, half of the way to the nodes beside it. That is next to nothing if `width` is
        above the distance of the nodes, and most of the error below it.
        """
        pairs = [(np.array(x), np.array(w)) for x, w in zip(self.nodes, self.weights, strict=True)]
        curves = np.stack([_bump(grid[:, None] - x, width) @ w for x, w in pairs])
        spread = np.stack([_spread(grid[:, None], x, width, np.array(self.eigenvalues)) @ w for x, w in pairs])
        error = curves.std(0, ddof=1) / math.sqrt(len(curves)) if len(curves) > 1 else np.full(len(grid), np.inf)
        return curves.mean(0), np.hypot(error, (curves - spread).mean(0))

    def plot(self, ax: Any = None, *, width: float | None = None) -> Any:
        """The density on a logarithmic axis with its band of 2 standard errors, and marks at the eigenvalues found.

        Args:
            ax: where to draw; a new figure if not given.
            width: of the smoothing; 1% of the spread of the spectrum if not given.
        """
        ax = need("matplotlib.pyplot", "lab").subplots()[1] if ax is None else ax
        nodes, _ = self.quadrature()
        spread = max(nodes[-1] - nodes[0], self.zero, 1e-300)
        blur = 0.01 * spread if width is None else width
        grid = np.linspace(nodes[0] - 4 * blur, nodes[-1] + 4 * blur, 1000)
        mean, error = self.density(grid, blur)
        floor = 1e-3 / self.num_params / blur
        drawn = np.where(mean > floor, mean, np.nan)  # less than a thousandth of an eigenvalue is nothing
        ax.plot(grid, drawn, color="#0072B2", label=f"mean of {len(self.nodes)} probes")
        if len(self.nodes) > 1:
            low, high = np.maximum(drawn - 2 * error, floor), drawn + 2 * error
            ax.fill_between(grid, low, high, color="#0072B2", alpha=0.25, lw=0, label="2 standard errors")
        ax.plot(
            self.eigenvalues, [floor] * len(self.eigenvalues), "|", color="#D55E00", ms=12, label="found one by one"
        )
        ax.set_yscale("log")
        ax.set_xlabel("eigenvalue")
        ax.set_ylabel(f"density, smoothed by {blur:.2g}")
        ax.legend(frameon=False)
        return ax


@of_operator
def spectral_density(
    objective: Objective | Operator, *, num_probes: int = 10, num_steps: int = 40, seed: int | None = 0
) -> DensityResult:
    """The distribution of the eigenvalues of the Hessian, with its error.

    Args:
        objective: what to measure: the Hessian of an Objective, or an operator (`GaussNewtonOperator(objective)`,
            `FisherOperator(objective)`, ...).
        num_probes: random vectors; the error falls with the square root of their number. One more searches for
            outliers before the first.
        num_steps: Lanczos steps for each: more resolve finer structure, and find more eigenvalues one by one.
        seed: of the probes; `None` is really random.

    Returns:
        DensityResult with `mass(low, high)`, `negative_mass`, `eigenvalues`, `density(grid, width)`, `plot()`.

    Cost: (1 + num_probes) x num_steps products of 2 to 3 gradients of the data. Memory: up to 2 num_steps copies of the
    parameters.

    Raises:
        ValueError: num_probes < 1, num_steps < 2, data that gives another loss on a second pass, or a Hessian that is
            not finite.

    Source: Lin, Saad, Yang 2016; Ubaru, Chen, Saad 2017; Ghorbani, Krishnan, Xiao 2019.
    """
    check_whole("num_probes", num_probes, 1)
    check_whole("num_steps", num_steps, 2)
    operator, seed = as_operator(objective, seed)
    operator.objective.check()
    quadrature = _Quadrature(operator, num_steps)
    _, *measures = [quadrature.probe(mix_seeds(seed, i)) for i in range(1 + num_probes)]  # the first one only searches
    means = np.array([float(x @ w) for x, w in measures])
    return DensityResult(
        value=float(means.mean()),
        stderr=stderr(means),
        method=f"Lanczos quadrature, eigenvectors that were found count as one; {operator.method}",
        num_products=quadrature.num_products,
        num_samples=operator.objective.num_samples,
        seed=seed,
        nodes=tuple(tuple(map(float, x)) for x, _ in measures),
        weights=tuple(tuple(map(float, w)) for _, w in measures),
        eigenvalues=tuple(sorted(quadrature.found)),
        num_params=operator.num_params,
        zero=quadrature.zero,
    )


class _Quadrature:
    """Probe by probe; remembers the eigenvectors found so far."""

    def __init__(self, operator: Operator, num_steps: int):
        self._operator, self._num_steps = operator, num_steps
        params = operator.objective.params
        self._vectors = Rows(Space(params))
        self._low, self._high = math.inf, -math.inf
        self.found: list[float] = []
        self.num_products = 0
        self.zero = 0.0

    def probe(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The nodes and weights of one random vector: the eigenvalues found before it, 1/d each, and its own.

        What is found on the way serves the probes after it, not this one: an eigenvector of a multiple eigenvalue is
        the probe's own projection, and without it the probe would not stand for the others any more.
        """
        d, known = self._operator.num_params, np.array(self.found)
        if len(known) == d:
            return np.sort(known), np.full(d, 1 / d)
        params = self._operator.objective.params
        lanczos = Lanczos(self._operator.product, params, seed=seed, deflated=self._vectors)
        while lanczos.size < self._num_steps and not lanczos.complete:
            lanczos.extend()
        self.num_products += lanczos.num_products
        theta, residuals, coordinates = lanczos.ritz()
        self.zero = max(self.zero, lanczos.rounding)
        self._low, self._high = min(self._low, theta[0]), max(self._high, theta[-1])
        new = np.arange(len(theta)) if lanczos.complete else self._converged(theta, residuals)
        rows = lanczos.vectors(coordinates[:, new])
        for i in range(len(rows)):
            self._vectors.append(rows.row(i))
        self.found += [float(t) for t in theta[new]]
        own = (1 - len(known) / d) * coordinates[0] ** 2
        nodes, weights = np.concatenate([known, theta]), np.concatenate([np.full(len(known), 1 / d), own])
        order = np.argsort(nodes)
        return nodes[order], weights[order]

    def _converged(self, theta: np.ndarray, residuals: np.ndarray) -> np.ndarray:
        """Which pairs are eigenpairs: those farthest from the bulk first, as far as memory goes."""
        good = np.flatnonzero(residuals <= max(CONVERGED * (self._high - self._low), self.zero))
        far = np.argsort(-np.abs(theta[good] - np.median(theta)))
        return good[far][: self._num_steps - len(self.found)]


def _bump(distance: np.ndarray, width: float | np.ndarray) -> np.ndarray:
    """The density of a normal variable of standard deviation `width` at these distances from its mean."""
    return np.exp(-0.5 * (distance / width) ** 2) / (width * math.sqrt(2 * math.pi))


def _spread(grid: np.ndarray, nodes: np.ndarray, width: float, known: np.ndarray) -> np.ndarray:
    """As `_bump` of the distances, with the mass of each node even between the middles to those beside it.

    That of an eigenvalue that is `known` is where it is, and the outermost nodes have nothing beyond.
    """
    middles = (nodes[1:] + nodes[:-1]) / 2
    low, high = np.append(nodes[:1], middles), np.append(middles, nodes[-1:])
    size = np.where(np.isin(nodes, known), 0.0, high - low)
    narrow = size <= 1e-3 * width
    even = (ndtr((grid - low) / width) - ndtr((grid - high) / width)) / np.where(narrow, 1.0, size)
    return np.where(narrow, _bump(grid - nodes, width), even)


def _blur(nodes: np.ndarray, weights: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The standard deviation of the mass below each bound, uniform between what the two nodes around it allow."""
    above = np.searchsorted(nodes, bounds)
    inside = (above > 0) & (above < len(nodes))
    last = len(nodes) - 1
    around = weights[np.clip(above - 1, 0, last)] + weights[np.clip(above, 0, last)]
    return np.where(inside, around, 0.0) / math.sqrt(12)
