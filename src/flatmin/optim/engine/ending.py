"""How a step ends: the base optimizer steps along the direction, or the step is skipped and nothing has changed."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from flatmin.optim.engine import unobserved
from flatmin.optim.engine.losses import Losses
from flatmin.optim.engine.memory import Memory
from flatmin.optim.engine.misuse import (
    ABANDONED,
    DIRECTION_CLEARED,
    NOTHING_TO_STEP,
    SCALER_STEP,
    STEP_IN_LOOP,
    STILL_SCALED,
    UNSCALED_NEEDED,
    warn_skipped,
)
from flatmin.optim.engine.scaling import UNSCALED, Scaling
from flatmin.optim.rule import Probe
from flatmin.optim.tools import Tools
from flatmin.place import Place
from flatmin.quiet import Quiet
from flatmin.radii import Radii
from flatmin.shards import local
from flatmin.vectors import Vector

OF_ANOTHER_PROCESS = "loss of another process"


class Ending(Tools):
    """The last part of a step, after the rule has returned."""

    _guard: bool
    _stage: str
    _quiet: Quiet | None
    _scaling: Scaling
    _memory: Memory | None
    _direction: Vector | None  # what stands in `.grad`, where nobody can have changed it
    _drift: Vector | None
    _rule_saw_gradients: bool
    _dropped: bool  # the direction of a loop, by zero_grad()
    _session: weakref.ref[Generator[Probe, None, None]] | None
    _place: Place | None

    @property
    def _under_way(self) -> bool:
        session = self._session and self._session()
        return session is not None and session.gi_suspended  # type: ignore[attr-defined]

    def _initialises_state(self) -> bool:
        """torch.distributed.checkpoint steps with learning rate 0 and zero gradients to set up the base's state."""
        if self._stage != "idle" or self._under_way or self.state:
            return False
        if any(group.get("lr") != 0 for group in self.param_groups):
            return False
        return not any(p.grad is not None and local(p.grad).count_nonzero() for p in self.params)

    def _check_ready(self) -> None:
        if self._stage == "idle":
            raise ValueError(DIRECTION_CLEARED if self._dropped else NOTHING_TO_STEP)
        if self._stage != "ready":
            raise ValueError(STEP_IN_LOOP if self._under_way else ABANDONED)
        if all(p.grad is None for p in self.params):
            self._stage = "idle"
            raise ValueError(DIRECTION_CLEARED)

    def _heal(self) -> None:
        if self._place is not None and not self._under_way:
            self._place.home()  # two interrupts in one breath: finish the work that they cut off
            self._place = None
        if self._stage == "ready" and self._scaling.was_skipped():
            self._stage = "idle"
            if not self._scaling.undone:
                self._skip(None)
                self._count("num_steps")

    def _undo_overflow(self) -> None:
        """A framework's scaler will skip this step: nothing of it stays, whatever is looked at or saved next."""
        self._scaling.undone = True
        self._count("num_skipped")
        self._count("num_steps")
        if self._quiet is not None:
            self._quiet.undo()

    def _drop(self) -> None:
        """Another state has been loaded: a direction that stands is not to be stepped along, nor anything put back."""
        self._stage, self._memory, self._drift, self._direction = "idle", None, None, None
        if self._quiet is not None:
            self._quiet.forget()

    def _check_scaled_by(self, scale: Tensor | None) -> None:
        """Gradients are unscaled once; `scaler.step(opt)` after a loop is right for a rule that only adds them up."""
        if not self._scaling.is_right_for(self):
            raise ValueError(STILL_SCALED if self._scaling.rescale else SCALER_STEP)
        if "found_inf" not in self.__dict__:
            return
        if self._scaling.active:
            raise ValueError(SCALER_STEP)
        if self._rule_saw_gradients:
            raise ValueError(UNSCALED_NEEDED)
        if scale is not None:
            Vector(p.grad for p in self.params).scale_(1.0 / float(scale))

    def _step_along_window(self, closure: Callable[[], Any]) -> Any:
        """A framework's step: its closure evaluates the last micro-batch, and with it all later probes."""
        with torch.enable_grad():
            loss = closure()
        if loss is None and self._stage == "window":  # the framework's word for "skip this batch"
            self._stage = "idle"
            return None
        self.step()
        return loss

    def _finish(self, losses: Losses) -> None:
        self._stage = "idle"
        scaled = self._scaling is not UNSCALED
        if (scaled and self._scaling.overflowed(self.ranks.agree)) or bool(self.__dict__.get("found_inf", False)):
            self._skip(None)  # an ordinary event of fp16 training: no warning
        elif self._guard and (culprit := self._not_finite(losses)):
            self._skip(culprit)
        else:
            self._apply()
        self._memory = self._drift = self._direction = None
        if scaled:
            self._scaling.update()
        self._count("num_steps")

    def _apply(self) -> None:
        unobserved.step(self.base)
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

    def _not_finite(self, losses: Losses) -> str:
        """What is not finite, "" if nothing, on this process or another."""
        culprit = self._not_finite_here(losses)
        return culprit or OF_ANOTHER_PROCESS if self.ranks.agree(bool(culprit)) else ""

    def _not_finite_here(self, losses: Losses) -> str:
        """What is not finite, "" if nothing: one synchronisation for the norm of the direction and the losses.

        A norm of shards is asked of all processes together, so whether it is must not depend on a loss of one of them.
        """
        update = Vector([p.grad for p in self.params]) if self._direction is None else self._direction
        if self._drift is not None:
            update = Vector([*update.tensors, *self._drift.tensors])
        if self._quiet is not None and self._quiet.devices:
            size = update.size()
            if math.isfinite(size + sum(x.float() if isinstance(x, Tensor) else x for x in losses)):
                return ""
            sound = math.isfinite(size) or update.isfinite()
        else:
            sound = update.isfinite_()
        if not losses.finite():
            return "loss"
        return "" if sound else "direction"

    def _skip(self, culprit: str | None) -> None:
        """Leaves weights, buffers and the base's state as they were before the step."""
        self._count("num_skipped")
        if self._quiet is not None:
            self._quiet.undo()
        for p in self.params:
            p.grad = None
        if culprit:
            warn_skipped(type(self).__name__, self.num_steps, culprit, self.num_skipped, self.radius_name)
