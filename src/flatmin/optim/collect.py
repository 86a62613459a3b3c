"""Where gradients go between `backward` and the base optimizer.

A probe with a weight leaves its gradient in `.grad` and lets the next one add to it: no extra memory, and one
unscaling, clipping and all-reduce for the whole step. That needs a caller who does not clear gradients, so with a
closure (which does) the running sum is set aside instead.
"""

from __future__ import annotations

from torch import Tensor

from flatmin.optim.misuse import CLEARED_IN_LOOP, NO_BACKWARD
from flatmin.optim.rule import Probe
from flatmin.vectors import Vector


class Collector:
    """Takes gradients out of `.grad`, or lets weighted ones add up there, and installs the direction."""

    def __init__(self, params: list[Tensor], keep_sum_in_grad: bool):
        self._params = params
        self._in_grad = keep_sum_in_grad
        self._weight: float | None = None  # of the running sum that stands in .grad
        self._sum: Vector | None = None
        self._first: Tensor | None = None

    def before(self, probe: Probe) -> None:
        """Makes `.grad` ready for the evaluation of `probe`."""
        if self._weight is None or probe.weight is None:
            self._take()
        elif self._weight != probe.weight:  # .grad holds the sum divided by the weight of the next probe
            self._grads().scale_(self._weight / probe.weight)
        self._weight = probe.weight if self._in_grad else None
        self._first = next((p.grad for p in self._params if p.grad is not None), None)

    def after(self, probe: Probe) -> Vector:
        """Hands out the gradient of `probe`, or adds it to the running sum."""
        self._check()
        if probe.weight is None:
            return self._take()
        if not self._in_grad:
            part = self._take()
            part.scale_(probe.weight)
            self._sum = part if self._sum is None else self._sum.add_(part)
        return Vector(())

    def install(self, direction: Vector | None) -> None:
        """Puts the direction (`None`: the running sum) where the base optimizer reads it."""
        if direction is None and self._in_grad:
            assert self._weight is not None, "the rule returned None but weighted no probe"
            self._grads().scale_(self._weight)
            return
        direction = self._sum if direction is None else direction
        assert direction is not None, "the rule returned None but weighted no probe"
        for p, d in zip(self._params, direction.tensors, strict=True):
            p.grad = d

    def _grads(self) -> Vector:
        return Vector(p.grad for p in self._params)

    def _take(self) -> Vector:
        grads = self._grads()
        for p in self._params:
            p.grad = None
        return grads

    def _check(self) -> None:
        if all(p.grad is None for p in self._params):
            raise ValueError(NO_BACKWARD)
        if self._first is not None and all(p.grad is not self._first for p in self._params):
            raise ValueError(CLEARED_IN_LOOP)
