"""How a step ends: the base optimizer steps along the direction, or the step is skipped and nothing has changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flatmin.optim.memory import Memory
from flatmin.optim.misuse import SCALER_STEP, UNSCALED_NEEDED, warn_skipped
from flatmin.optim.scaling import Scaling
from flatmin.optim.tools import Tools
from flatmin.quiet import Quiet
from flatmin.vectors import Radii, Vector

ELSEWHERE = "loss of another process"


class Ending(Tools):
    """The last part of a step, after the rule has returned."""

    _guard: bool
    _stage: str
    _quiet: Quiet | None
    _scaling: Scaling
    _memory: Memory | None
    _drift: Vector | None
    _rule_saw_gradients: bool

    def _check_scaled_by(self, scale: Tensor | None) -> None:
        """`scaler.step(opt)` after a loop: right for a rule that only adds gradients up, if they are unscaled now."""
        if not hasattr(self, "found_inf"):
            return
        if self._scaling.active:
            raise ValueError(SCALER_STEP)
        if self._rule_saw_gradients:
            raise ValueError(UNSCALED_NEEDED)
        if scale is not None:
            Vector(p.grad for p in self.params).scale_(1.0 / float(scale))

    def _finish(self, losses: list[Any]) -> None:
        self._stage = "idle"
        agree = self.ranks.agree
        if self._scaling.overflowed(agree) or bool(getattr(self, "found_inf", False)):
            self._skip(None)  # an ordinary event of fp16 training: no warning
        elif self._guard and (culprit := self._not_finite(losses, agree)):
            self._skip(culprit)
        else:
            self._apply()
        self._memory = self._drift = None
        self._scaling.update()
        self._count("num_steps")

    def _apply(self) -> None:
        self.base.step()
        if self._drift is not None:
            self._add_drift(self._drift)
        if self._memory is not None and self._memory.commit():
            self._count("num_remembered")
        if self._quiet is not None:
            self._quiet.forget()

    @torch.no_grad()
    def _add_drift(self, drift: Vector) -> None:
        rates = Radii(float(group["lr"]) for group in self.param_groups for _ in group["params"])
        (rates * drift).add_to(self.params, sign=-1.0)

    def _not_finite(self, losses: list[Any], agree: Callable[[bool], bool]) -> str:
        """What is not finite, "" if nothing, on this process or another."""
        culprit = self._not_finite_here(losses)
        return culprit or ELSEWHERE if agree(bool(culprit)) else ""

    def _not_finite_here(self, losses: list[Any]) -> str:
        """What is not finite, "" if nothing: one synchronisation for the norm of the direction and the losses."""
        drift = () if self._drift is None else self._drift.tensors
        update = Vector([*(p.grad for p in self.params), *drift])
        size = update.size()
        if isinstance(size, float):
            if math.isfinite(size) and all(math.isfinite(loss) for loss in losses):
                return ""
        elif math.isfinite(size + sum(x.float() if isinstance(x, Tensor) else x for x in losses)):
            return ""
        if not all(math.isfinite(loss) for loss in losses):
            return "loss"
        return "" if update.isfinite() else "direction"

    def _skip(self, culprit: str | None) -> None:
        """Leaves weights, buffers and the base's state as they were before the step."""
        self._count("num_skipped")
        if self._quiet is not None:
            self._quiet.undo()
        for p in self.params:
            p.grad = None
        if culprit:
            warn_skipped(type(self).__name__, self.num_steps, culprit, self.num_skipped, self.radius_name)
