"""Which of two models is flatter, at the same training loss.

The curvature of cross-entropy vanishes as the loss does, so a model that was trained longer looks flatter wherever it
is. Two models are therefore compared where their losses are equal: each is given by measurements along its training,
between which log trace is interpolated linearly in log loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import ndtr

from flatmin.curvature.report import FlatnessReport
from flatmin.curvature.results import Estimate, Measurement
from flatmin.curvature.tracker import TrackPoint

CLOSE = 0.02  # relative difference of losses that counts as none
Measured = FlatnessReport | TrackPoint


@dataclass(frozen=True, kw_only=True)
class MatchedComparison:
    """Two models at one training loss.

    Attributes:
        loss: at which they are compared.
        first: trace of the first model there.
        second: trace of the second model there.
        ratio: second / first.
        p_value: of the difference of the logarithms, by the errors of the traces alone (not of another training run).
    """

    loss: float
    first: Estimate
    second: Estimate
    ratio: Estimate
    p_value: float

    @property
    def flatter(self) -> str | None:
        """The flatter one, "first" or "second", if the difference is beyond its error (p < 0.05); else `None`."""
        if not self.p_value < 0.05:
            return None
        return "second" if self.ratio.value < 1 else "first"

    def __str__(self) -> str:
        verdict = {"first": "the first is flatter", "second": "the second is flatter", None: "no difference is seen"}
        return (
            f"At training loss {self.loss:.4g}: trace {self.first} and {self.second}, ratio {self.ratio}: "
            f"{verdict[self.flatter]} (p = {self.p_value:.2g}, by the errors of these two measurements)."
        )


def compare_at_matched_loss(
    first: Measured | Sequence[Measured], second: Measured | Sequence[Measured], *, loss: float | None = None
) -> MatchedComparison:
    """Compares the Hessian traces of two models at the same loss on the same data.

    Args:
        first: reports of `measure`, or points of a `Tracker`, along the training of one model; or a single one.
        second: the same for the other model.
        loss: where to compare; the lowest loss that both have reached if not given.

    Returns:
        MatchedComparison; `print` it.

    Raises:
        ValueError: if the losses of the two never meet (or that loss is outside), or a trace there is not positive.

    Example:
        flatmin.compare_at_matched_loss(sgd_tracker.points, nso_tracker.points)
    """
    curves = [_curve(first), _curve(second)]
    wanted = max(curve[0][0] for curve in curves) if loss is None else loss
    for name, curve in zip(("first", "second"), curves, strict=True):
        if not curve[0][0] * (1 - CLOSE) <= wanted <= curve[-1][0] * (1 + CLOSE):
            raise ValueError(
                f"the losses do not match: the {name} model was measured at losses {curve[0][0]:.4g} .. "
                f"{curve[-1][0]:.4g}, which leaves no comparison at {wanted:.4g}. A trace falls because the loss does, "
                "so give measurements along both trainings that reach the same loss."
            )
    (a, a_error), (b, b_error) = [_at(curve, wanted) for curve in curves]
    error = math.hypot(a_error, b_error)
    z = abs(b - a) / error if error > 0 else math.inf if b != a else 0.0
    return MatchedComparison(
        loss=wanted,
        first=Estimate(value=math.exp(a), stderr=math.exp(a) * a_error),
        second=Estimate(value=math.exp(b), stderr=math.exp(b) * b_error),
        ratio=Estimate(value=math.exp(b - a), stderr=math.exp(b - a) * error),
        p_value=float(2 * ndtr(-z)),
    )


def _curve(measured: Measured | Sequence[Measured]) -> list[tuple[float, Estimate]]:
    """Loss and trace of each, by ascending loss."""
    measured = getattr(measured, "points", measured)  # of a Tracker
    items: Sequence[Any] = measured if isinstance(measured, Sequence) else [measured]
    if not items:
        raise ValueError("there are no measurements to compare.")
    points = [
        (item.loss.value if isinstance(item.loss, Measurement) else item.loss, item.trace.value, item.trace.stderr)
        for item in items
    ]
    for loss, trace, _ in points:
        if not (loss > 0 and trace > 0):
            raise ValueError(f"logarithms need a positive loss and trace, got {loss:.4g} and {trace:.4g}.")
    return [(loss, Estimate(value=trace, stderr=error)) for loss, trace, error in sorted(points)]


def _at(curve: list[tuple[float, Estimate]], loss: float) -> tuple[float, float]:
    """The logarithm of the trace at this loss and its standard error; at an end, that of the end."""
    if loss <= curve[0][0] or loss >= curve[-1][0]:
        end = curve[0][1] if loss <= curve[0][0] else curve[-1][1]
        return math.log(end.value), end.stderr / end.value
    upper = next(i for i, point in enumerate(curve) if point[0] >= loss)
    (low, a), (high, b) = curve[upper - 1], curve[upper]
    share = (math.log(loss) - math.log(low)) / (math.log(high) - math.log(low))
    mean = (1 - share) * math.log(a.value) + share * math.log(b.value)
    return mean, math.hypot((1 - share) * a.stderr / a.value, share * b.stderr / b.value)
