"""fp16: a `torch.amp.GradScaler` with several backward passes in one step.

The rule must see unscaled gradients, an overflow in any probe must skip the step, and the scaler must hear of it
once. The caller scales each loss; the rest is done here, through `scaler.unscale_`, which takes anything with
`param_groups` and keeps one overflow flag for each until `scaler.update()` asks for them.

A framework that owns the scaler unscales, clips, steps and updates by itself. For it the direction is scaled again, and
made not finite if any probe overflowed, so that the scaler skips the step as it would skip any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from flatmin.vectors import Vector


class _Gradients:
    """The face of an optimizer: parameters whose `.grad` is to be unscaled, once."""

    def __init__(self, params: list[Tensor]):
        self.param_groups = [{"params": params}]


class Scaling:
    """The scaler of one step (`None`: gradients are not scaled).

    Attributes:
        by_framework: whether a framework takes over once the direction stands.
        rescale: whether it gets the direction scaled, because there is a scaler.
        undone: whether an overflow has been dealt with, before the framework hears of it.
    """

    def __init__(self, scaler: Any, params: list[Tensor], *, rescale: bool = False):
        self._scaler: Any = scaler if scaler is not None and scaler.is_enabled() else None
        self.by_framework = rescale
        self.rescale = rescale and self._scaler is not None
        self.undone = False
        self._params = params
        self._handed_to: Any = None  # the scaler's notes when the direction was handed back; it drops them on update
        self._done: list[_Gradients] = []  # kept alive until the update: the scaler knows them by their id

    @property
    def active(self) -> bool:
        """Whether gradients are scaled."""
        return self._scaler is not None

    def unscale(self) -> None:
        """Divides the gradients that stand in `.grad` by the scale, in place, and notes an overflow."""
        if self._scaler is not None and any(p.grad is not None for p in self._params):
            gradients = _Gradients(self._params)
            self._done.append(gradients)
            self._scaler.unscale_(gradients)

    def settle(self, agree: Callable[[bool], bool], *, is_scaled: bool) -> bool:
        """Leaves the direction in `.grad` as the caller expects it: unscaled, or scaled for a framework.

        Returns whether it was handed back as not finite.
        """
        if not self.rescale:
            if is_scaled:
                self.unscale()
            return False
        direction, overflow = Vector([p.grad for p in self._params]), self.overflowed(agree)
        direction.scale_(math.inf if overflow else 1.0 if is_scaled else self._scaler.get_scale())
        self._handed_to = self._scaler._per_optimizer_states
        return overflow or agree(not direction.isfinite())

    def was_skipped(self) -> bool:
        """Whether the scaler has been updated since the direction was handed back: then it did not step."""
        return self.rescale and self._scaler._per_optimizer_states is not self._handed_to

    def is_right_for(self, optimizer: Any) -> bool:
        """Whether the gradients have been unscaled exactly once, now that `optimizer` is about to step."""
        if self._scaler is None:
            return True
        by_caller = self._scaler._per_optimizer_states[id(optimizer)]["stage"].name == "UNSCALED"
        return by_caller == self.rescale

    def overflowed(self, agree: Callable[[bool], bool]) -> bool:
        """Whether any unscaled gradient was not finite, on any process. One host synchronisation.

        Args:
            agree: tells whether its argument is true on any process.
        """
        if self._scaler is None:
            return False
        flags = [flag for g in self._done for flag in self._scaler._found_inf_per_device(g).values()]
        here = any(bool(flag) for flag in flags)
        anywhere = agree(here)
        if anywhere and not here:
            for flag in flags:
                flag.fill_(1.0)  # so that all scalers go down together
        return anywhere

    def forget(self) -> None:
        """Of a direction that was dropped: the scaler would take what comes next under the same id for it."""
        for gradients in self._done:
            self._scaler._per_optimizer_states.pop(id(gradients), None)
        self._done = []

    def update(self) -> None:
        """Lets the scaler adjust its scale, once a step."""
        if self._scaler is not None and self._done and not self.rescale:
            self._scaler.update()
        self._done = []


UNSCALED = Scaling(None, [])
