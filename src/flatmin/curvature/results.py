"""Measurements: frozen, and each with its error.

`stderr` is the error of the *computation* on the data given (random probes, unfinished iterations). It does not cover
the choice of the data: another sample of the same population has another loss and another Hessian.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scipy.special import stdtrit

from flatmin.extras import need
from flatmin.files import plain
from flatmin.vectors import Vector


class _Number:
    """What has a `value` and can stand for it: `float(found)`, `f"{found:.3g}"`."""

    value: float

    def __float__(self) -> float:
        return float(self.value)

    def __format__(self, spec: str) -> str:
        return format(float(self), spec) if spec else str(self)


@dataclass(frozen=True, kw_only=True)
class Measurement(_Number):
    """One number with its error: `float(found)` is the number, `str(found)` says both.

    Attributes:
        value: the measured quantity.
        stderr: one standard error of the computation; 0 if exact.
        method: what was computed.
        num_products: Hessian-vector products over the whole data that it took.
        num_samples: samples in the data.
        seed: of the probes.
    """

    value: float
    stderr: float
    method: str
    num_products: int = 0
    num_samples: int = 0
    seed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts; `None` for a number that is not finite (JSON has none)."""
        return plain(dataclasses.asdict(self))

    def __str__(self) -> str:
        return format_estimate(self.value, self.stderr)


@dataclass(frozen=True, kw_only=True)
class Estimate(_Number):
    """A part of a measurement: a value and its standard error."""

    value: float
    stderr: float

    def __str__(self) -> str:
        return format_estimate(self.value, self.stderr)


@dataclass(frozen=True, kw_only=True)
class TraceResult(Measurement):
    """The trace of the Hessian, in all and per layer.

    Attributes:
        per_layer: module name -> its part of the trace, from the same probes; the parts add up to `value`.
        samples: the estimates of the single probes, whose mean is `value`; none if it is exact.
        num_gradients: what it cost, in gradients of the data (counted, not timed).
        num_params: size of the Hessian; `value / num_params` is the mean eigenvalue.
        converged: whether the requested relative error was reached.
    """

    per_layer: Mapping[str, Estimate] = field(default_factory=dict)
    samples: tuple[float, ...] = field(default=(), repr=False)
    num_gradients: float = 0.0
    num_params: int = 0
    converged: bool = True

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """A confidence interval for the trace (Student's t over the probes); a point if it is exact."""
        if not self.samples:
            return (self.value, self.value)
        return student_interval(self.value, self.stderr, len(self.samples), level)

    def plot(self, ax: Any = None) -> Any:
        """Bars: the trace of each layer with one standard error. Returns the matplotlib Axes."""
        ax = need("matplotlib.pyplot", "lab").subplots()[1] if ax is None else ax
        names = list(self.per_layer)
        parts = [self.per_layer[name] for name in names]
        ax.barh(names, [p.value for p in parts], xerr=[p.stderr for p in parts], color="#4c72b0", capsize=3)
        ax.invert_yaxis()
        ax.set_xlabel(f"Hessian trace (total {self})")
        ax.set_ylabel("layer")
        return ax


@dataclass(frozen=True, kw_only=True)
class EigenResult(Measurement):
    """Extreme eigenvalues of the Hessian, or of the operator that was given (`method` says of which matrix).

    `value` is the first of them and `stderr` its residual bound.

    Attributes:
        values: eigenvalues, the wanted end first.
        residuals: |A v - value v| for each, A the matrix and |v| = 1, with a bound of rounding: an eigenvalue lies
            within this distance.
        errors: an estimate of each value's error, about residual^2 / gap, with a bound of rounding: by how much one
            more product would move it (see `Lanczos.ahead`). Not a bound: an eigenvalue that was not seen is not in it.
        converged: whether every residual is small beside its value and beside the spread of the spectrum, and falling,
            and the values have stayed (see `top_eigenvalues`).
        which: "LA" (largest algebraic) or "SA" (smallest).
        vectors: the eigenvectors, of norm 1, if they were asked for; not part of `to_dict`.
    """

    values: tuple[float, ...] = ()
    residuals: tuple[float, ...] = ()
    errors: tuple[float, ...] = ()
    converged: bool = True
    which: str = "LA"
    vectors: tuple[Vector, ...] = field(default=(), repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, without the vectors."""
        entries = dataclasses.asdict(dataclasses.replace(self, vectors=()))
        return plain({name: entry for name, entry in entries.items() if name != "vectors"})

    @property
    def estimates(self) -> tuple[Estimate, ...]:
        """Each eigenvalue with its residual."""
        return tuple(Estimate(value=v, stderr=r) for v, r in zip(self.values, self.residuals, strict=True))

    def __str__(self) -> str:
        return ", ".join(map(str, self.estimates))

    def plot(self, ax: Any = None) -> Any:
        """The eigenvalues in order, with their residuals as bars. Returns the matplotlib Axes."""
        ax = need("matplotlib.pyplot", "lab").subplots()[1] if ax is None else ax
        ax.errorbar(range(1, len(self.values) + 1), self.values, yerr=self.residuals, fmt="o", capsize=3)
        ax.locator_params(axis="x", integer=True)
        ax.set_xlabel("rank")
        ax.set_ylabel("eigenvalue")
        return ax


def student_interval(value: float, stderr: float, n: int, level: float) -> tuple[float, float]:
    """The confidence interval of a mean of `n` samples with this standard error."""
    if n < 2:
        return (-math.inf, math.inf)
    half = float(stdtrit(n - 1, 0.5 + level / 2)) * stderr
    return (value - half, value + half)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line of text for each row, its cells in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def rounded(value: float, digits: int) -> float:
    """`round`, but never -0.0."""
    return round(value, digits) + 0.0


def format_estimate(value: float, stderr: float, sign: str = "") -> str:
    """`12.34 +- 0.05`: two digits of the error, and the value to the same place; with `sign="+"` always with its sign.

    Below a ten-thousandth and from a million on with one power of ten for both: `(4.10 +- 0.23)e-07`.
    """
    if stderr == 0:
        return f"{value:{sign}.4g}"
    if not (math.isfinite(value) and math.isfinite(stderr)):
        return f"{value:{sign}.4g} +- {stderr:.2g}"
    power = math.floor(math.log10(max(abs(value), stderr)))
    place = math.floor(math.log10(stderr)) - 1  # of the error's second digit
    if power - place > 12:  # an error of the size of rounding
        return f"{value:{sign}.12g} +- {stderr:.1g}"
    if power < -300:  # of which there is no power of ten to divide by
        return f"{value:{sign}.4g} +- {stderr:.2g}"
    if -4 <= power < 6:
        digits = max(-place, 0)
        return f"{rounded(value, -place):{sign}.{digits}f} +- {rounded(stderr, -place):.{digits}f}"
    digits, unit = power - place, 10.0**power
    return f"({value / unit:{sign}.{digits}f} +- {stderr / unit:.{digits}f})e{power:+03d}"
