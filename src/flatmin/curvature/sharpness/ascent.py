"""How much the loss can rise in a ball around the weights: max L(w + d) - L(w) over |A^-1 d| <= rho.

Projected gradient ascent in the coordinates e = d / A of the ball, from several starts:

    e <- project(e + t * A grad L(w + A e) / |...|),     t doubled after a rise, quartered after a fall (undone)

What it finds is a point of the ball, so the result is a *lower bound* of the maximum. For a convex loss each step is no
worse than the linearisation promises; for a quadratic it is a power iteration that ends at the maximum of all or at the
one local maximum that there can be beside it. In general there is no certificate: look at whether the starts agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flatmin.checks import check_positive, check_whole
from flatmin.curvature.function.arguments import of_objective
from flatmin.curvature.function.objective import Objective
from flatmin.curvature.results import Measurement
from flatmin.curvature.sharpness.far import displaced_by
from flatmin.curvature.sharpness.metrics import Metric, ToWeights, ball
from flatmin.noise import Noise, mix_seeds
from flatmin.place import Place
from flatmin.radii import Radii
from flatmin.vectors import Vector

SMALLEST = 1e-4  # of rho: a step that moves less ends the ascent


@dataclass(frozen=True, kw_only=True)
class AscentResult(Measurement):
    """The largest rise of the loss that was found in a ball: a lower bound of the largest there is.

    `stderr` is not a number (nan): ascent has no standard error. The spread of `starts` is what there is to judge by.

    Attributes:
        rho: radius of the ball.
        metric: of the ball.
        clean_loss: L(w).
        one_step: the rise at SAM's point rho A (A g) / |A g|, where the ascent started; nan where the gradient is zero.
        starts: the rise that each start ended with, the gradient's first.
        num_gradients: gradients of the whole data that it took.
    """

    rho: float
    metric: Metric
    clean_loss: float
    one_step: float
    starts: tuple[float, ...]
    num_gradients: int

    def __str__(self) -> str:
        return f">= {self.value:.4g}"


@of_objective
def ascent_sharpness(
    objective: Objective,
    rho: float,
    metric: Metric = "euclidean",
    *,
    num_steps: int = 20,
    num_starts: int = 3,
    seed: int | None = 0,
) -> AscentResult:
    """The worst rise of the loss in a ball, max L(w + d) - L(w) over |A^-1 d| <= rho, found by ascent: a lower bound.

    Args:
        objective: what to measure.
        rho: radius of the ball, in the units of the metric: of the weights ("euclidean", "monge"), or relative to them
            ("adaptive", "filter").
        metric: "euclidean", "adaptive", "filter" or "monge" (`flatmin.curvature.sharpness.metrics`). "adaptive" stays
            the same when units of a ReLU network are rescaled, "filter" when layers are.
        num_steps: gradients after the first, for each start, at most.
        num_starts: the first is SAM's point, the others are random directions.
        seed: of the random starts; `None` is really random.

    Returns:
        AscentResult with `value` (never negative: d = 0 is in the ball; less what rounding may have added to the
        difference of the two losses, so that it stays a lower bound in 16 bits), `starts`, `one_step`.

    Cost: at most 1 + num_starts (1 + num_steps) gradients of the data, and 2 losses to see that it stays the same.
    Memory: eight copies of the parameters; two more for "adaptive" and "monge", one for "filter".

    Raises:
        ValueError: rho that is not positive, num_steps or num_starts below 1, an unknown metric, data that gives
            another loss on a second pass, or a loss that is not finite in the ball.

    Source: Foret et al. 2021 (SAM's inner maximum); Kwon et al. 2021 (adaptive); Jacobsen, Arvanitidis 2025 (Monge).
    """
    seed = objective.members.seed(seed)
    check_positive("rho", rho)
    for name, value in (("num_steps", num_steps), ("num_starts", num_starts)):
        check_whole(name, value, 1)
    objective.check()
    clean, ascent, first = _at_home(objective, metric, rho)
    rises, one_step = [], math.nan
    for start in range(num_starts):
        from_gradient = first is not None
        e = ascent.random(mix_seeds(seed, start)) if first is None else first
        first = None  # later starts are random, and it is a copy of the parameters
        begin, end = ascent.climb(e, num_steps)
        rises.append(end - clean)
        if from_gradient:
            one_step = begin - clean
    return AscentResult(
        value=max(0.0, max(rises) - objective.rounding * (abs(clean) + abs(clean + max(rises)))),
        stderr=math.nan,
        method=f"projected gradient ascent in the {metric} ball; a lower bound",
        num_samples=objective.num_samples,
        seed=seed,
        rho=rho,
        metric=metric,
        clean_loss=clean,
        one_step=one_step,
        starts=tuple(rises),
        num_gradients=1 + ascent.num_gradients,
    )


def _at_home(objective: Objective, metric: Metric, rho: float) -> tuple[float, _Ascent, Vector | None]:
    """The loss, what evaluates it in the ball, and SAM's point; the gradient itself is not kept."""
    clean, gradient = objective.loss_and_gradient()
    ascent = _Ascent(objective, ball(objective, metric, lambda: gradient), rho)
    return clean, ascent, ascent.on_sphere(ascent.to_weights(gradient))


class _Ascent:
    """Evaluates the loss in the ball, in the coordinates e with d = A e, |e| <= rho."""

    def __init__(self, objective: Objective, to_weights: ToWeights, rho: float):
        self._objective, self.to_weights, self._rho = objective, to_weights, rho
        self._ones = Radii([1.0] * len(objective.params))
        self.num_gradients = 0

    def on_sphere(self, direction: Vector) -> Vector | None:
        """The point of the sphere in this direction; `None` for a zero direction."""
        size = float(direction.norm())
        return direction * (self._rho / size) if size > 0 else None

    def random(self, seed: int) -> Vector:
        """A point uniform on the sphere."""
        point = self.on_sphere(Noise(self._objective.params, self._ones, "normal", seed, keep=False).vector())
        assert point is not None
        return point

    def climb(self, e: Vector, num_steps: int) -> tuple[float, float]:
        """The losses at the start e and at the best point found from there."""
        with self._objective.displaced() as place:
            begin, slope = self._evaluate(place, e)
            value, step = begin, 2 * self._rho
            for _ in range(num_steps):
                candidate = self._uphill(e, slope, step)
                if candidate is None:
                    break
                if float((candidate - e).norm()) <= SMALLEST * self._rho:
                    break
                there, slope_there = self._evaluate(place, candidate)
                if there > value:
                    e, value, slope, step = candidate, there, slope_there, min(2 * step, 8 * self._rho)
                else:
                    step /= 4
                del candidate, slope_there  # each is a copy of the parameters
        return begin, value

    def _uphill(self, e: Vector, slope: Vector, step: float) -> Vector | None:
        """The point of the ball that is nearest to a step of this length uphill from e; `None` on level ground."""
        size = float(slope.norm())
        return self._project((slope * (step / size)).add_(e)) if size > 0 else None

    def _evaluate(self, place: Place, e: Vector) -> tuple[float, Vector]:
        """The loss at w + A e, and its gradient by e."""
        place.move(self.to_weights(e))
        self.num_gradients += 1
        with displaced_by("radius"):
            value, gradient = self._objective.loss_and_gradient()
        return value, self.to_weights(gradient)

    def _project(self, e: Vector) -> Vector:
        size = float(e.norm())
        return e if size <= self._rho else e * (self._rho / size)
