"""The evaluations of a step: between a rule, which asks for gradients, and a caller, who computes them.

A session is a generator that yields probes; the weights are displaced while it waits, and whole when it has ended,
however it ends.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Generator
from typing import Any, Literal

from torch import Tensor

from flatmin.distributed import Ranks, explain
from flatmin.optim.engine.collect import Collector
from flatmin.optim.engine.ending import Ending
from flatmin.optim.engine.memory import Memory
from flatmin.optim.engine.misuse import (
    ALREADY_UNDER_WAY,
    DIRECTION_LOST,
    SHARE_NOT_AVERAGED,
    WAITS_ELSEWHERE,
    check_dense,
)
from flatmin.optim.engine.rounding import warn_if_lost
from flatmin.optim.engine.scaling import UNSCALED, Scaling
from flatmin.optim.rule import Probe, Requests, Rule, Update, plain
from flatmin.place import Place, refuse_if_cached, refuse_if_worn
from flatmin.quiet import Quiet
from flatmin.radii import Radii
from flatmin.vectors import Vector

# What a step is doing: nothing, evaluating by a closure, in a loop or in a framework's loop (`window.py`), or
# waiting for `step()` after a loop ("ready").
Stage = Literal["idle", "closure", "loop", "window", "ready"]


# The optimizers that have had a loop. Their directions stand in `.grad` until they step.
_LOOPING: list[weakref.ref[Session]] = []


def _install(params: list[Tensor], gradients: Vector) -> None:
    for p, g in zip(params, gradients.tensors, strict=True):
        p.grad = g


class Session(Ending):
    """The first part of a step, until the direction stands."""

    _restore: str
    _every: int
    _start: int
    _stop: int | None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._rest()

    def _rest(self) -> None:
        """Nothing is under way."""
        self._stage: str = "idle"
        self._session: weakref.ref[Generator[Probe, None, None]] | None = None
        self._place: Place | None = None
        self._quiet: Quiet | None = None
        self._ranks: Ranks | None = None
        self._scaling = UNSCALED
        self._memory: Memory | None = None
        self._drift: Vector | None = None
        self._direction: Vector | None = None
        self._probe: Probe | None = None
        self._rule_saw_gradients = False
        self._micro_share: float | None = None
        self._num_draws = 0
        self._saw_rounding = False
        self._dropped = self._is_looping = False
        self._thread = 0
        self._radii: Radii | None = None

    def rule(self) -> Rule:
        """The method, as a fresh generator for one step."""
        raise TypeError(f"{type(self).__name__} must define rule()")

    def _open(self, stage: Stage, scaling: Scaling, share: float | None = None) -> Generator[Probe, None, None]:
        session = self._evaluations(stage, scaling, share)
        if not self._under_way:
            self._session = weakref.ref(session)
        return session

    def _evaluations(self, stage: Stage, scaling: Scaling, share: float | None) -> Generator[Probe, None, None]:
        params = self.params
        earlier = self._begin(stage, scaling, share, params)
        place = self._place = Place(params, self._restore)
        quiet = self._quiet
        assert quiet is not None
        others = None if self.ranks.alone else self.ranks
        stays = stage != "closure" and not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in params)
        collector, active = Collector(params, stays, others), self._active()
        requests = Requests(self.rule() if active else plain())
        elsewhere: list[tuple[list[Tensor], Vector]] = []
        try:
            try:
                if stage == "loop":
                    place.announce()
                if len(_LOOPING) > self._is_looping:
                    self._set_aside_elsewhere(elsewhere)
                probe = requests.next(None)
                while probe is not None:
                    self._go_to(probe, place, collector)
                    if others is not None:
                        others.probe(self._exchanges(probe) and not collector.is_part(probe, requests.ahead))
                    quiet.probe()
                    yield probe
                    quiet.settle()
                    if others is not None:
                        others.settle()
                    self._check_evaluated(probe)
                    if self.reads_weights:
                        place.move(None)
                    probe = requests.next(collector.after(probe))
                place.home()
                overflow = self._install(collector, requests.direction)
                if share is not None:
                    collector.combine(share, earlier)
                self._rule_saw_gradients |= collector.handed_out and active
                self._stage = "idle" if stage == "closure" else "ready"
            except RuntimeError as error:
                explain(error)
                raise
            finally:
                quiet.settle()  # before the weights come home: a buffer may lie in the memory of one
                place.home()
                if others is not None:
                    others.settle()
        finally:  # an interrupt may have cut the first one off, or come before it
            place.home()
            quiet.end()
            if earlier is not None and self._stage == "loop":  # left half-way: earlier micro-batches stay
                _install(params, earlier)
                self._stage = "ready"
            if stage == "loop":
                place.withdraw()
            for theirs, direction in elsewhere:
                _install(theirs, direction)
            self._place = self._probe = self._radii = None
        if overflow and share is None:
            self._undo_overflow()

    def _go_to(self, probe: Probe, place: Place, collector: Collector) -> None:
        """Moves the weights to where `probe` is about."""
        self._probe = probe
        collector.let_go()
        # A window goes away and home again with each micro-batch, so it keeps the displacement.
        displacement = probe.displacement if self._stage == "window" else probe.release()
        if displacement is not None and not self._saw_rounding:
            self._saw_rounding = True  # the first one stands for all
            if self._guard:
                warn_if_lost(displacement, self.params, type(self).__name__, self.radius_name)
        place.move(displacement)
        del displacement
        collector.secure()
        collector.before(probe)

    def _check_evaluated(self, probe: Probe) -> None:
        """Refuses what the caller left in `.grad` if it is not the gradient that was asked for; unscales it."""
        if self._micro_share is not None and self.ranks.kept_apart:
            raise ValueError(SHARE_NOT_AVERAGED)
        probe.check_used()
        if probe.weight is None and self._scaling is not UNSCALED:
            self._scaling.unscale()
        if not self.takes_sparse:
            check_dense([p.grad for p in self.params], type(self).__name__)

    def _waiting(self) -> list[Session]:
        """The others in this thread that have had a loop and not stepped yet."""
        found = [other for seen in _LOOPING if (other := seen()) is not None and other is not self]
        return [other for other in found if other._stage == "ready" and other._thread == self._thread]

    def _refuse_shared(self, params: list[Tensor]) -> None:
        """Refuses to begin where a direction of somebody else stands in the gradients of some of `params`."""
        own = {id(p) for p in params}
        for other in self._waiting():
            if any(id(p) in own for p in other.params):
                raise ValueError(WAITS_ELSEWHERE.format(type(other).__name__))

    def _set_aside_elsewhere(self, found: list[tuple[list[Tensor], Vector]]) -> None:
        """Takes away what others are about to step along: a loss here may add gradients to it."""
        for other in self._waiting():
            theirs = other.params
            found.append((theirs, Vector([p.grad for p in theirs])))
            _install(theirs, Vector([None] * len(theirs)))

    def _exchanges(self, probe: Probe) -> bool:
        return self.sync_ascent or not probe.ascent

    def _install(self, collector: Collector, direction: Vector | Update | None) -> bool:
        """Puts the direction where the base reads it; whether a framework's scaler will skip the step."""
        if isinstance(direction, Update):
            drift = direction.drift if self._micro_share is None else direction.drift * self._micro_share
            self._drift = drift if self._drift is None else self._drift + drift
            direction = direction.direction
        last, installed = collector.last, collector.install(direction)
        if self._memory is not None:
            self._memory.keep(self._micro_share, installed, last)
        # After a loop the caller may change it, by clipping, say.
        self._direction = installed if self._stage == "closure" else None
        if self._scaling is UNSCALED:
            return False
        return self._scaling.settle(self.ranks.agree, is_scaled=direction is None)

    def _active(self) -> bool:
        t = self.num_steps
        due = t >= self._start and (t - self._start) % self._every == 0
        if not due or (self._stop is not None and t >= self._stop):
            return False
        self._radii = self.radii()  # nobody changes them within a step
        return self._radii.any

    def _begin(self, stage: Stage, scaling: Scaling, share: float | None, params: list[Tensor]) -> Vector | None:
        """Makes ready for a loop. Returns what earlier loops of the same step have given."""
        if self._under_way:
            raise ValueError(ALREADY_UNDER_WAY)
        self._heal()
        refuse_if_worn(params)
        refuse_if_cached()
        goes_on = self._stage == "ready" and share is not None and self._micro_share is not None
        if self._stage == "ready" and not goes_on:
            raise ValueError(DIRECTION_LOST)
        self._thread = threading.get_ident()
        if len(_LOOPING) > self._is_looping:
            self._refuse_shared(params)
        self._fill_groups()
        if stage == "loop" and not self._is_looping:
            _LOOPING.append(weakref.ref(self, _LOOPING.remove))
            self._is_looping = True
        self._stage, self._micro_share, self._radii, self._dropped = stage, share, None, False
        if not goes_on:
            self._scaling.forget()
            self._scaling, self._memory, self._num_draws = scaling, None, 0
            self._drift = self._direction = None
            self._rule_saw_gradients = False
        if self._memory is not None:
            self._memory.begin()
        if self._ranks is not None and self._ranks.num_params != len(params):
            self._ranks = None  # parameters were added
        if self._quiet is None:
            self._quiet = Quiet(params, self._model)
        self._quiet.begin(undoable=self._guard or scaling is not UNSCALED, goes_on=goes_on)
        return Vector([p.grad for p in params]) if goes_on else None
