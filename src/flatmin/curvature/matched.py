"""Which of two models is flatter, at the same training loss.

The curvature of cross-entropy vanishes as the loss does, so a model that was trained longer looks flatter wherever it
is. Two models are therefore compared where their losses are equal: each is given by measurements along its training, in
its order, between which log trace is interpolated linearly in log loss. A loss that was passed several times, before
and after a spike say, counts as it was passed last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

from scipy.special import stdtr

from flatmin.curvature.report import FlatnessReport
from flatmin.curvature.results import Estimate
from flatmin.curvature.tracker import Tracker, TrackPoint
from flatmin.notices import warn

ONE_POINT = (
    "a Tracker with a single point, of its first update: it says nothing of what came of the training. Give it more "
    "time (max_overhead=; 1.0 measures at every update), or end the training with tracker.update(force=True)."
)
CLOSE = 0.02  # relative difference of losses that counts as none
Measured = FlatnessReport | TrackPoint
Curve = Tracker | Measured | Sequence[Measured]


@dataclass(frozen=True, kw_only=True)
class MatchedComparison:
    """Two models at one training loss.

    Attributes:
        loss: at which they are compared.
        first: trace of the first model there.
        second: trace of the second model there.
        ratio: second / first.
        p_value: of the difference of the logarithms, by the errors of the traces alone (not of another training run);
            Student's t, with the degrees of freedom that the probes leave (Welch).
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


def compare_at_matched_loss(first: Curve, second: Curve, *, loss: float | None = None) -> MatchedComparison:
    """Compares the Hessian traces of two models at the same loss on the same data.

    Args:
        first: a `Tracker`, its points, or reports of `measure`, along the training of one model, in its order; or a
            single one.
        second: the same for the other model.
        loss: where to compare; the lowest loss that both have reached if not given.

    Returns:
        MatchedComparison; `print` it.

    Cost: none: the measurements are there.

    Warns (UserWarning): for a Tracker that has measured once only.

    Raises:
        ValueError: if the losses of the two never meet (or that loss is outside), a trace there is not positive or has
            no error, or for anything else than measurements.

    Example:
        flatmin.compare_at_matched_loss(sgd_tracker, nso_tracker)
    """
    curves = [_curve(first), _curve(second)]
    wanted = max(min(point.loss for point in curve) for curve in curves) if loss is None else loss
    for name, curve in zip(("first", "second"), curves, strict=True):
        low, high = min(point.loss for point in curve), max(point.loss for point in curve)
        if not low * (1 - CLOSE) <= wanted <= high * (1 + CLOSE):
            raise ValueError(
                f"the losses do not match: the {name} model was measured at losses {low:.4g} .. {high:.4g}, which "
                f"leaves no comparison at {wanted:.4g}. A trace falls because the loss does, so give measurements "
                "along both trainings that reach the same loss."
            )
    a, b = [_at(curve, wanted) for curve in curves]
    error = math.hypot(a.error, b.error)
    gap = abs(b.log_trace - a.log_trace)
    ratio = math.exp(b.log_trace - a.log_trace)
    return MatchedComparison(
        loss=wanted,
        first=a.estimate(),
        second=b.estimate(),
        ratio=Estimate(value=ratio, stderr=ratio * error),
        p_value=float(2 * stdtr(_freedom([*a.parts, *b.parts]), -gap / error)) if error > 0 else float(gap == 0.0),
    )


class _Point(NamedTuple):
    """One measurement: the trace with its error, whose degrees of freedom are `freedom`."""

    loss: float
    trace: Estimate
    freedom: float


class _Matched(NamedTuple):
    """The logarithm of a trace at a loss: a weighted sum of measured ones, each with its error and its freedom."""

    log_trace: float
    parts: list[tuple[float, float]]

    @property
    def error(self) -> float:
        return math.hypot(*[error for error, _ in self.parts])

    def estimate(self) -> Estimate:
        value = math.exp(self.log_trace)
        return Estimate(value=value, stderr=value * self.error)


def _freedom(parts: list[tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of errors (Welch and Satterthwaite)."""
    largest = max(error for error, _ in parts)
    shares = [((error / largest) ** 2, freedom) for error, freedom in parts]
    return sum(share for share, _ in shares) ** 2 / sum(share**2 / freedom for share, freedom in shares)


def _curve(measured: Curve) -> list[_Point]:
    """Loss and trace of each, in the order of training."""
    if isinstance(measured, Tracker):
        measured = measured.points
        if len(measured) == 1:
            warn(ONE_POINT)
    items: Sequence[Any] = measured if isinstance(measured, Sequence) else [measured]
    if not items:
        raise ValueError("there are no measurements to compare.")
    return [_point(item) for item in items]


def _point(item: Any) -> _Point:
    if isinstance(item, TrackPoint):
        return _Point(item.loss, item.trace, max(item.num_probes - 1, 1))
    if not isinstance(item, FlatnessReport):
        raise ValueError(
            f"a model is given by a Tracker, its points, or reports of flatmin.measure, got {type(item).__name__}."
        )
    trace = item.trace
    return _Point(item.loss.value, Estimate(value=trace.value, stderr=trace.stderr), max(len(trace.samples) - 1, 1))


def _at(curve: list[_Point], loss: float) -> _Matched:
    """At this loss, where training passed it for the last time; at an end, that of the end."""
    low, high = min(curve, key=lambda p: p.loss), max(curve, key=lambda p: p.loss)
    loss = min(max(loss, low.loss), high.loss)
    after = None
    for number, point in reversed(list(enumerate(curve))):
        if point.loss == loss:
            same = list(takewhile(lambda other: other.loss == loss, reversed(curve[: number + 1])))
            return _mean(_with_logarithms(same), [1 / len(same)] * len(same))
        if after is not None and min(point.loss, after.loss) < loss < max(point.loss, after.loss):
            pair = _with_logarithms([point, after])
            share = math.log(loss / point.loss) / math.log(after.loss / point.loss)
            return _mean(pair, [1 - share, share])
        after = point
    raise AssertionError("a loss between two others is passed on the way")


def _with_logarithms(points: list[_Point]) -> list[_Point]:
    """Returns `points` if each loss and each trace has a logarithm, and each trace an error."""
    for loss, trace, _ in points:
        if not (loss > 0 and trace.value > 0 and math.isfinite(trace.stderr)):
            raise ValueError(
                f"logarithms need a positive loss and trace with an error, got {loss:.4g} and {trace}. Measure with "
                "more probes, or compare at another loss."
            )
    return points


def _mean(points: Sequence[_Point], weights: Sequence[float]) -> _Matched:
    logs = [weight * math.log(trace.value) for weight, (_, trace, _) in zip(weights, points, strict=True)]
    parts = [
        (weight * trace.stderr / trace.value, freedom)
        for weight, (_, trace, freedom) in zip(weights, points, strict=True)
    ]
    return _Matched(math.fsum(logs), parts)
