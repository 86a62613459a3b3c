"""How far a method may move each parameter, and the displacement that a gradient and these numbers make.

Radii    one number per parameter
Step     the displacement a_i v_i, which holds the vector v and no multiple of it
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from flatmin.vectors import Vector

LIFT = 2.0**96  # a power of two: tiny entries times it are exact


def _inverse(norm: Any) -> Any:
    return 1.0 / norm


class Radii:
    """One non-negative number per parameter; 0 leaves that parameter alone.

    `radii * vector` scales entry by entry and drops the entries whose radius is 0.
    """

    __slots__ = ("values",)

    def __init__(self, values: Iterable[float]):
        self.values: tuple[float, ...] = tuple(values)

    def __repr__(self) -> str:
        return f"Radii({list(self.values)})"

    @property
    def any(self) -> bool:
        """Whether anything is moved at all."""
        return any(self.values)

    @property
    def ones(self) -> Radii:
        """1 for each parameter that is moved, 0 for the others."""
        return Radii(float(value > 0) for value in self.values)

    def select(self, vector: Vector) -> Vector:
        """The entries of `vector` that these radii move; nothing is copied."""
        assert len(self.values) == len(vector.tensors), f"{len(self.values)} radii for {len(vector)} entries"
        if all(self.values):
            return vector
        return Vector(t if value > 0 else None for value, t in zip(self.values, vector.tensors, strict=True))

    def __mul__(self, vector: Vector) -> Vector:
        return self._scale(self.select(vector), 1.0)

    def along(self, vector: Vector) -> Vector:
        """`r v / |v|`, entry by entry, with one global norm over the moved entries; a zero vector stays zero."""
        moved = self.select(vector)
        return self._scale(moved, moved.inverse_norm())

    def ascent(self, vector: Vector, factor: Callable[[Any], Any] = _inverse) -> Step:
        """The displacement `r factor(|v|) v`, which holds `v` and no multiple of it (but of a denormal one).

        Args:
            vector: v, usually a gradient.
            factor: of the norm |v| over the moved entries (a number, or a 0-dim tensor); 1 / |v| by default. Where it
                is not finite it counts as 0 (and v, if it is not finite either, times 0 is not 0 off the CPU).
        """
        moved = self.select(vector)
        size = moved.size()
        if isinstance(size, Tensor):
            scale = factor(size)
            if not isinstance(scale, Tensor):  # where the norm is: elsewhere it would be copied for each parameter
                scale = torch.full_like(size, scale)
            scale = torch.nan_to_num(scale, nan=0.0, posinf=0.0, neginf=0.0)
            return Step(self._scale(moved, scale), [1.0] * len(self.values))
        scale = factor(size) if math.isfinite(size) and size > 0 else 0.0
        if scale > LIFT:  # times a radius it may be beyond fp32, while what it multiplies is tiny
            moved, scale = moved * LIFT, scale / LIFT if math.isfinite(scale) else 0.0
        return Step(moved, [scale * r for r in self.values])

    def _scale(self, moved: Vector, factor: float | Tensor) -> Vector:
        # One pass over the memory, so that a gradient and its multiple never need a third copy.
        radii = [self.values[i] for i in moved.support]
        if len(set(radii)) == 1:
            return moved * (factor * radii[0])
        return moved.with_present(
            (Vector([t]) * (factor * r)).present[0] for t, r in zip(moved.present, radii, strict=True)
        )


class Step:
    """The displacement `a_i v_i`, entry by entry: a vector with numbers that are multiplied in when it is added."""

    __slots__ = ("factors", "vector")

    def __init__(self, vector: Vector, factors: Sequence[float]):
        self.vector = vector
        self.factors = factors

    @property
    def support(self) -> list[int]:
        """The indices of the parameters that are moved."""
        support = self.vector.support
        return support if all(self.factors) else [i for i in support if self.factors[i]]

    def isfinite(self) -> bool:
        """Whether every entry is. One host synchronisation."""
        return self.vector.isfinite() and all(map(math.isfinite, self.factors))

    def copy(self) -> Step:
        """The same displacement in memory of its own."""
        return Step(self.vector.copy(), self.factors)

    def __neg__(self) -> Step:
        return Step(self.vector, [-f for f in self.factors])

    def add_to(self, params: Sequence[Tensor], sign: float = 1.0) -> None:
        """Adds `sign` times the displacement to `params` in place."""
        first = self.factors[0] if self.factors else 0.0
        if self.factors.count(first) == len(self.factors):
            if first:
                self.vector.add_to(params, sign * first)
            return
        tensors, support = self.vector.tensors, self.support
        for factor in {self.factors[i] for i in support}:
            same = [i for i in support if self.factors[i] == factor]
            Vector([tensors[i] for i in same]).add_to([params[i] for i in same], sign * factor)


def check_radius(name: str, value: float) -> float:
    """Returns `value` if it can be a radius, else raises a `ValueError` that says what it is for."""
    known = type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))
    if not (known and math.isfinite(value) and value >= 0):
        raise ValueError(
            f"{name} must be a finite number >= 0, got {value!r}. It is the size of the perturbation in "
            "the units of the weights; 0 turns the method into its base optimizer."
        )
    return float(value)
