"""Where gradients go between `backward` and the base optimizer.

A probe with a weight leaves its gradient in `.grad` and lets the next one add to it: no extra memory, and one
unscaling, clipping and all-reduce for the whole step. That needs a caller who does not clear gradients, so with a
closure (which does) the running sum is set aside instead, in memory of its own.
"""

from __future__ import annotations

from torch import Tensor

from flatmin.distributed import Ranks
from flatmin.optim.misuse import CLEARED_IN_LOOP, NO_BACKWARD
from flatmin.optim.rule import NOTHING, Probe
from flatmin.shards import local
from flatmin.vectors import Vector


class Collector:
    """Takes gradients out of `.grad`, or lets weighted ones add up there, and installs the direction."""

    def __init__(self, params: list[Tensor], keep_sum_in_grad: bool, ranks: Ranks):
        self._params = params
        self._ranks = ranks
        self._in_grad = keep_sum_in_grad
        self._weight: float | None = None  # of the running sum that stands in .grad
        self._sum: Vector | None = None
        self._before: list[tuple[Tensor | None, int]] = []
        self.handed_out = False  # whether the rule has seen a gradient

    def before(self, probe: Probe) -> None:
        """Makes `.grad` ready for the evaluation of `probe`."""
        if self._in_grad and self._weight and probe.weight:
            if self._weight != probe.weight:  # .grad holds the sum divided by the weight of the next probe
                self._grads().scale_(self._weight / probe.weight)
        else:
            self._set_aside()
        self._before = [_mark(p.grad) for p in self._params] if self._weight is not None else []

    def is_part(self, probe: Probe, following: Probe | None) -> bool:
        """Whether the gradient of `probe` stays in `.grad` for the following one to add to."""
        return bool(self._in_grad and probe.weight and following is not None and following.weight)

    def after(self, probe: Probe) -> Vector:
        """Hands out the gradient of `probe`, or adds it to the running sum."""
        self._check()
        self._weight = probe.weight
        if probe.weight is None:
            self.handed_out = True
            grads = self._take()
            if self._ranks.reuse_gradients:
                return grads.apply(_copied)
            return grads.apply(_without_graph) if True in [g.requires_grad for g in grads.present] else grads
        return NOTHING

    def install(self, direction: Vector | None) -> None:
        """Puts the direction (`None`: the running sum) where the base optimizer reads it."""
        if direction is None:
            if self._sum is None and self._weight is not None:
                self._grads().scale_(self._weight)
                return
            self._set_aside()
            direction = self._sum
        assert direction is not None, "the rule returned None but weighted no probe"
        for p, d in zip(self._params, direction.tensors, strict=True):
            p.grad = d

    def combine(self, share: float, earlier: Vector | None) -> None:
        """Adds `share` times what stands in `.grad` to what `earlier` micro-batches have given, and installs that."""
        part = self._take()
        # Not in place: a rule may have kept what it returned.
        total = part * share if earlier is None else earlier.add_(part, share)
        for p, d in zip(self._params, total.tensors, strict=True):
            p.grad = d

    def _set_aside(self) -> None:
        """Moves what stands in `.grad` to the sum; without a weight it belongs to nobody."""
        if self._weight is None:
            self._clear()
            return
        part = self._take()
        # Not in place: the memory may be the caller's, who writes the next gradient into it.
        self._sum = part * self._weight if self._sum is None else self._sum.add_(part, self._weight)
        self._weight = None

    def _grads(self) -> Vector:
        return Vector([p.grad for p in self._params])

    def _take(self) -> Vector:
        grads = self._grads()
        self._clear()
        return grads

    def _clear(self) -> None:
        for p in self._params:
            p.grad = None

    def _check(self) -> None:
        if not self._before:
            if not [p for p in self._params if p.grad is not None]:
                raise ValueError(NO_BACKWARD)
            return
        changed = False
        for p, (grad, version) in zip(self._params, self._before, strict=True):
            if p.grad is not grad:
                changed = True
                if grad is not None and not _replaced_by_autograd(p) and not self._ranks.reuse_gradients:
                    raise ValueError(CLEARED_IN_LOOP)
            elif grad is not None and local(grad)._version != version:
                changed = True
        if not changed:
            raise ValueError(NO_BACKWARD)


def _mark(grad: Tensor | None) -> tuple[Tensor | None, int]:
    return (grad, 0 if grad is None else local(grad)._version)


def _without_graph(grad: Tensor) -> Tensor:
    return grad.detach() if grad.requires_grad else grad


def _copied(grad: Tensor) -> Tensor:
    return grad.detach().clone()


def _replaced_by_autograd(p: Tensor) -> bool:
    """Whether a new `.grad` object can hold the old sum: out-of-place accumulation, or a hook that assigned it."""
    grad = p.grad
    if grad is None:
        return False
    return grad.requires_grad or grad.is_sparse or bool(getattr(p, "_post_accumulate_grad_hooks", None))
