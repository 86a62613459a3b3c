"""Products without a second derivative: differences of gradients, or of losses, at displaced weights.

    H v   = [g(w + s v) - g(w - s v)] / (2 s) + O(s^2)               two gradients
    v'H v = [f(w + s v) + f(w - s v) - 2 f(w)] / s^2 + O(s^2)        two forward passes, and one for all vectors

with s = length / |v|, so that the displacement has the same length whatever the scale of v. Too long, and the higher
derivatives are seen; too short, and rounding is. The best length depends on the model, so it is found by trial. At a
kink (ReLU) a difference sees what autograd's second derivative leaves out: the function as it is over that length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flatmin.curvature.function.sharded import gradients
from flatmin.place import Place, displaced
from flatmin.radii import Step
from flatmin.shards import parts, summed_apart
from flatmin.vectors import Vector

Scalar = Callable[[], Tensor]  # a loss at the weights as they are


class GradientDifference:
    """The Hessian of `scalar` as a map v -> H v, by central differences of gradients, subtracted in double.

    Cost: two gradients per product.
    """

    def __init__(self, scalar: Scalar, params: Sequence[Tensor], length: float):
        self._scalar, self._params, self._length = scalar, params, length

    def product(self, v: Sequence[Tensor], *, last: bool = False) -> tuple[Tensor, ...]:
        """H v, one tensor per parameter."""
        step = _step(v, self._length)
        if step == 0:
            with torch.no_grad():
                self._scalar()  # who asked for the product of a batch may ask for its size, known once it is evaluated
            return tuple(torch.zeros_like(p) for p in self._params)
        with displaced(self._params) as place, torch.enable_grad():
            plus, minus = (self._gradient(place, v, sign * step) for sign in (1, -1))
        return tuple(
            ((a.double() - b.double()) / (2 * step)).to(p.dtype)
            for a, b, p in zip(plus, minus, self._params, strict=True)
        )

    def forms(self, v: Sequence[Tensor]) -> Tensor:
        """v_p' (H v)_p for each parameter p, float64."""
        return dots(v, self.product(v))

    def _gradient(self, place: Place, v: Sequence[Tensor], scale: float) -> tuple[Tensor, ...]:
        place.move(_times(v, scale))
        return gradients(self._scalar(), self._params)


class LossDifference:
    """Quadratic forms of the Hessian of `scalar`, by second differences of its value.

    Cost: two forward passes per form, and one to begin.
    """

    def __init__(self, scalar: Scalar, params: Sequence[Tensor], length: float):
        self._scalar, self._params, self._length = scalar, params, length
        self._here = self._value()

    def product(self, v: Sequence[Tensor], *, last: bool = False) -> tuple[Tensor, ...]:
        """Not possible."""
        raise ValueError(
            "products with vectors need a backward pass, and this model has none: from differences of losses only the "
            "trace and other quadratic forms can be had."
        )

    def forms(self, v: Sequence[Tensor]) -> Tensor:
        """V' H v, in all: shape (1,), float64."""
        step = _step(v, self._length)
        total = torch.zeros(1, dtype=torch.float64, device="cpu")
        if step > 0:
            with displaced(self._params) as place:
                for sign in (1, -1):
                    place.move(_times(v, sign * step))
                    total += (self._value() - self._here) / step**2
        return total

    @torch.no_grad()
    def _value(self) -> float:
        return float(self._scalar().double())


def lengths(params: Sequence[Tensor], power: float) -> list[float]:
    """Displacements to try, in units of the weights: |w| eps^power times 1/8 .. 8, the longest first."""
    size = float(Vector(p.detach() for p in params).norm()) or 1.0
    eps = max(torch.finfo(p.dtype).eps for p in params)
    return [size * eps**power * factor for factor in (8.0, 2.0, 0.5, 0.125)]


def best_length(tried: Sequence[float], values: Sequence[Vector]) -> tuple[float, float]:
    """The length whose value differs least from that of the next longer one, and the relative difference.

    Truncation error falls and rounding error rises as the length goes down; where two lengths agree, both are small.
    """
    gaps = [relative_difference(a, b) for a, b in zip(values[1:], values[:-1], strict=True)]
    best = min(range(len(gaps)), key=gaps.__getitem__)
    return tried[best + 1], gaps[best]


def at_best_length(product: Callable[[float], Vector], tried: Sequence[float]) -> tuple[float, Vector, float]:
    """The length of `best_length`, what `product` gives at it, and the relative difference."""
    found = [product(length) for length in tried]
    length, gap = best_length(tried, found)
    return length, found[tried.index(length)], gap


def relative_difference(a: Vector, b: Vector) -> float:
    """|a - b| / |b|; 0 where both are zero."""
    difference, size = float((a - b).norm()), float(b.norm())
    return difference / size if size > 0 else math.inf if difference > 0 else 0.0


def _times(v: Sequence[Tensor], scale: float) -> Step:
    return Step(Vector(v), [scale] * len(v))


def _step(v: Sequence[Tensor], length: float) -> float:
    size = float(Vector(v).norm())
    return length / size if size > 0 else 0.0


def dots(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The inner product of each pair, float64, on the device of the first. Of shards: one all-reduce for all pairs."""
    pairs = zip(parts(a), parts(b), strict=True)
    terms = [(x * y).sum(dtype=torch.float64).to(a[0].device) for x, y in pairs]
    return torch.stack(summed_apart(terms, a))
