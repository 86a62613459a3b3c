"""Where gradients go between `backward` and the base optimizer.

A probe with a weight leaves its gradient in `.grad` and lets the next one add to it: no extra memory, and one
unscaling, clipping and all-reduce for the whole step. That needs a caller who does not clear gradients, so with a
closure (which does) the running sum is set aside instead, in memory of its own; and so it is where a hook sees `.grad`
after each backward, which may clip it.

A gradient may lie in the caller's memory, who writes the next one into it: a view of DDP's buckets, the output of a
captured graph, a buffer that a hook moves gradients to. So what a rule keeps beyond the next evaluation is copied.
"""

from __future__ import annotations

import weakref

from torch import Tensor

from flatmin.distributed import Ranks
from flatmin.optim.engine.misuse import CLEARED_IN_LOOP, NO_BACKWARD
from flatmin.optim.rule import NOTHING, Probe
from flatmin.shards import local
from flatmin.vectors import Vector


class Collector:
    """Takes gradients out of `.grad`, or lets weighted ones add up there, and installs the direction."""

    def __init__(self, params: list[Tensor], keep_sum_in_grad: bool, others: Ranks | None):
        self._params = params
        self._others = others
        self._in_grad = keep_sum_in_grad
        self._weight: float | None = None  # of the running sum that stands in .grad
        self._sum: Vector | None = None
        self._before: list[tuple[Tensor | None, int]] = []
        self.last: Vector | None = None  # what was handed out, while it stands in .grad too
        self._handed: weakref.ref[Vector] | None = None  # the same, as the rule has it
        self.handed_out = False  # whether the rule has seen a gradient
        self._clear()  # what stands there belongs to nobody

    def let_go(self) -> None:
        """Lets go of what was handed out: while the weights move, nobody but the rule should hold its memory."""
        if self.last is not None:
            self._clear()

    def secure(self) -> None:
        """Copies what the rule still has of what was handed out: the next gradient may be written over it."""
        if self._handed is not None and (kept := self._handed()) is not None:
            kept.own_()
        self._handed = None

    def before(self, probe: Probe) -> None:
        """Makes `.grad` ready for the evaluation of `probe`."""
        if self._weight is None:
            return  # there is nothing: what stood there has been handed out or set aside
        if self._in_grad and self._weight and probe.weight:
            if self._weight != probe.weight:  # .grad holds the sum divided by the weight of the next probe
                self._grads().scale_(self._weight / probe.weight)
            self._before = [_mark(p.grad) for p in self._params]
        else:
            self._set_aside()

    def is_part(self, probe: Probe, following: Probe | None) -> bool:
        """Whether the gradient of `probe` stays in `.grad` for the following one to add to."""
        return bool(self._in_grad and probe.weight and following is not None and following.weight)

    def after(self, probe: Probe) -> Vector:
        """Hands out the gradient of `probe`, or adds it to the running sum."""
        if self._before:
            self._check_changed()
        else:
            self._check_any()
        self._weight = probe.weight
        if self._weight is not None:
            return NOTHING
        self.handed_out = True
        self.last = found = self._grads()
        if any(g.requires_grad for g in found.present):
            found = found.apply(Tensor.detach)
        self._handed = weakref.ref(found)
        return found

    def install(self, direction: Vector | None) -> Vector:
        """Puts the direction (`None`: the running sum) where the base optimizer reads it, and returns it."""
        if direction is None:
            if self._sum is None and self._weight is not None:
                standing = self._grads()
                standing.scale_(self._weight)
                return standing
            if self._weight is not None:
                self._set_aside()
            direction = self._sum
        assert direction is not None, "the rule returned None but weighted no probe"
        if direction is self.last:
            return direction
        for p, d in zip(self._params, direction.tensors, strict=True):
            p.grad = d
        return direction

    def combine(self, share: float, earlier: Vector | None) -> None:
        """Adds `share` times what stands in `.grad` to what `earlier` micro-batches have given, and installs that."""
        part = self._grads()
        # Not in place: a rule may have kept what it returned.
        total = part * share if earlier is None else earlier.add_(part, share)
        for p, d in zip(self._params, total.tensors, strict=True):
            p.grad = d

    def _set_aside(self) -> None:
        """Moves what stands in `.grad` to the sum."""
        part, weight = self._grads(), self._weight
        assert weight is not None
        self._clear()
        # Not in place: the memory may be the caller's, who writes the next gradient into it.
        self._sum = part * weight if self._sum is None else self._sum.add_(part, weight)
        self._weight, self._before = None, []

    def _grads(self) -> Vector:
        return Vector([p.grad for p in self._params])

    def _clear(self) -> None:
        self.last = None
        for p in self._params:
            p.grad = None

    def _check_any(self) -> None:
        for p in self._params:
            if p.grad is not None:
                return
        raise ValueError(NO_BACKWARD)

    def _check_changed(self) -> None:
        changed, reused = False, self._others is not None and self._others.reuse_gradients
        for p, (grad, version) in zip(self._params, self._before, strict=True):
            if p.grad is not grad:
                changed = True
                if grad is not None and not _replaced_by_autograd(p) and not reused:
                    raise ValueError(CLEARED_IN_LOOP)
            elif grad is not None and _mark(grad)[1] != version:
                changed = True
        if not changed:
            raise ValueError(NO_BACKWARD)


def _mark(grad: Tensor | None) -> tuple[Tensor | None, int]:
    # Of a DTensor, the part of this process changes alone under FSDP2, and the whole alone under tensor parallelism.
    return (grad, 0 if grad is None else grad._version + local(grad)._version)


def _replaced_by_autograd(p: Tensor) -> bool:
    """Whether a new `.grad` object can hold the old sum: out-of-place accumulation."""
    grad = p.grad
    return grad is not None and (grad.requires_grad or grad.is_sparse)
