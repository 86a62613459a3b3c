"""The engine: a `torch.optim.Optimizer` around a base optimizer, run by a rule.

One training step, whatever the method:

    1. the rule asks for a gradient at a displacement          (flatmin.optim.rule)
    2. the engine moves the weights there                      (flatmin.optim.place)
    3. the caller evaluates: a closure, or the body of a loop  (extra evaluations leave no trace: flatmin.quiet)
    4. the engine brings the weights back and hands the gradient to the rule; again from 1 until the rule returns
    5. the direction goes into `.grad` and the base optimizer steps

The engine contains no method's formula. Nothing of the size of the parameters is kept between steps.
"""

from __future__ import annotations

import inspect
import math
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flatmin.noise import Noise, mix_seeds
from flatmin.optim.collect import Collector
from flatmin.optim.host import Host
from flatmin.optim.misuse import (
    ABANDONED,
    ALREADY_UNDER_WAY,
    CLEARED_IN_LOOP,
    DIRECTION_LOST,
    NO_LOSS,
    NOTHING_TO_STEP,
    STEP_IN_LOOP,
    check_base,
    check_window,
)
from flatmin.optim.place import Place, Restore, check_restore
from flatmin.optim.rule import Probe, Rule, as_probe, plain
from flatmin.quiet import Quiet
from flatmin.vectors import Radii, Vector

_Stage = Literal["idle", "closure", "loop", "ready"]


class EngineOptions(TypedDict, total=False):
    """What every method takes beside its own arguments.

    model: the model, needed only where it cannot be found by itself (a compiled one).
    restore: "exact" (default) keeps one copy of the moved parameters while they are away; "recompute" keeps none
        and costs rounding (see flatmin.optim.place).
    low_memory: draw noise again from its seed instead of holding it: one copy of the parameters less.
    guard: skip the step, count it and warn when a loss or the direction is not finite (one host synchronisation).
    every, start, stop: perturb only at steps t with start <= t < stop and (t - start) % every == 0; the other steps
        are the base optimizer's.
    """

    model: nn.Module | None
    restore: Restore
    low_memory: bool
    guard: bool
    every: int
    start: int
    stop: int | None


class FlatOptimizer(Host):
    """Base class of every method: subclasses give `rule()` and name their radius.

    Args:
        base: an optimizer *instance*; its `param_groups`, `state` and hyperparameters stay in charge.
        radius: the value of the group option named by `radius_name`, where a group does not set its own.

    The other arguments are those of EngineOptions.

    Raises:
        ValueError: for a class instead of an instance, a negative radius, an optimizer that evaluates by itself.
    """

    def __init__(
        self,
        base: Optimizer,
        radius: float,
        *,
        model: nn.Module | None = None,
        restore: Restore = "exact",
        low_memory: bool = False,
        guard: bool = True,
        every: int = 1,
        start: int = 0,
        stop: int | None = None,
    ):
        super().__init__(check_base(base, type(self).__name__), radius)
        self._model = model
        self._restore: str = check_restore(restore)
        self._low_memory = low_memory
        self._guard = guard
        self._every, self._start, self._stop = check_window(every, start, stop)
        self._stage: _Stage = "idle"
        self._session: weakref.ref[Generator[Probe, None, None]] | None = None
        self._place: Place | None = None
        self._num_draws = 0

    # -- what a method provides ----------------------------------------------------------------------------------

    def rule(self) -> Rule:
        """The method, as a fresh generator for one step."""
        raise TypeError(f"{type(self).__name__} must define rule()")

    @property
    def gradients_per_step(self) -> int:
        """Gradients that one perturbed step needs."""
        raise TypeError(f"{type(self).__name__} must define gradients_per_step")

    # -- what a method may use -----------------------------------------------------------------------------------

    @property
    def params(self) -> list[Tensor]:
        """All parameters, in group order."""
        return [p for group in self.param_groups for p in group["params"]]

    def radii(self) -> Radii:
        """The radius of each parameter, read from the groups (0 where it is frozen)."""
        values: list[float] = []
        for group in self.param_groups:
            radius = float(group[self.radius_name])
            values += [radius if p.requires_grad else 0.0 for p in group["params"]]
        return Radii(values)

    def noise(self, law: str) -> Noise:
        """A fresh displacement `radius * z`, the next of this step's stream."""
        seed = mix_seeds(self.param_groups[0]["seed"], self.num_steps, self._num_draws)
        self._num_draws += 1
        return Noise(self.params, self.radii(), law, seed, keep=not self._low_memory)

    # -- the two ways to evaluate --------------------------------------------------------------------------------

    def probes(self) -> Iterator[Probe]:
        """The loop form: the weights are displaced inside the body and restored after it.

        Example:
            for probe in opt.probes():
                x_, y_ = probe.take(x, y)
                loss_fn(model(x_), y_).backward()
            opt.step()

        Gradients are cleared at the start; the body must not clear them. Gradient accumulation over micro-batches
        goes inside the body. After the loop `.grad` holds the direction (clip it there).
        """
        return self._open("loop")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step: with a closure (which may be called several times), or after a `probes()` loop.

        Args:
            closure: clears the gradients, computes the loss, calls backward, returns the loss.

        Returns:
            The loss at the unperturbed weights where the rule evaluates there, else the mean loss over its probes;
            `None` in the loop form.

        Raises:
            ValueError: if there is nothing to step with: no gradient, an unfinished loop, a closure that forgot
                `backward()` or `return loss`.
        """
        if closure is None:
            self._check_ready()
            self._finish(None)
            return None
        losses: list[tuple[Any, bool]] = []
        for probe in self._open("closure"):
            with torch.enable_grad():
                loss = closure()
            if loss is None:
                raise ValueError(NO_LOSS)
            losses.append((loss.detach() if isinstance(loss, Tensor) else loss, probe.at_weights))
        loss = _reported(losses)
        self._finish(sum(value for value, _ in losses))
        return loss

    # -- one step, inside ----------------------------------------------------------------------------------------

    def _open(self, stage: Literal["closure", "loop"]) -> Generator[Probe, None, None]:
        session = self._guarded_session(stage)
        if not self._under_way:
            self._session = weakref.ref(session)
        return session

    def _guarded_session(self, stage: Literal["closure", "loop"]) -> Generator[Probe, None, None]:
        self._begin(stage)
        place = self._place = Place(self.params, self._restore)
        try:
            yield from self._probe_by_probe(place, keep_sum_in_grad=stage == "loop")
            self._stage = "ready" if stage == "loop" else "idle"
        finally:
            place.home()  # a second time: an interrupt may have cut the first one off
            self._place = None

    def _probe_by_probe(self, place: Place, keep_sum_in_grad: bool) -> Generator[Probe, None, None]:
        params = self.params
        quiet = Quiet({p.device for p in params}, self._model)
        collector = Collector(params, keep_sum_in_grad)
        rule = self.rule() if self._active() else plain()
        self._num_draws = 0
        try:
            probe = as_probe(next(rule))
            while True:
                place.move(probe.release())
                collector.before(probe)
                with quiet.probe():
                    yield probe
                probe = as_probe(rule.send(collector.after(probe)))
        except StopIteration as stop:
            collector.install(stop.value)
        finally:
            place.home()
            quiet.end()

    def _active(self) -> bool:
        t = self.num_steps
        due = t >= self._start and (t - self._start) % self._every == 0
        return due and (self._stop is None or t < self._stop) and self.radii().any

    @property
    def _under_way(self) -> bool:
        session = self._session and self._session()
        return session is not None and inspect.getgeneratorstate(session) == inspect.GEN_SUSPENDED

    def _begin(self, stage: _Stage) -> None:
        if self._under_way:
            raise ValueError(ALREADY_UNDER_WAY)
        if self._stage == "ready":
            raise ValueError(DIRECTION_LOST)
        self._heal()
        self._fill_groups()
        self._stage = stage

    def _check_ready(self) -> None:
        if self._stage == "idle":
            raise ValueError(NOTHING_TO_STEP)
        if self._stage != "ready":
            raise ValueError(STEP_IN_LOOP if self._under_way else ABANDONED)

    def _finish(self, loss_sum: Any) -> None:
        self._stage = "idle"
        if self._guard and not self._finite(loss_sum):
            self._skip(loss_sum)
        else:
            self.base.step()
        self._count("num_steps")

    def _finite(self, loss_sum: Any) -> bool:
        size = Vector(p.grad for p in self.params).norm()
        return math.isfinite(float(size if loss_sum is None else size + loss_sum))  # one synchronisation

    def _skip(self, loss_sum: Any) -> None:
        self._count("num_skipped")
        what = "direction" if loss_sum is None or math.isfinite(float(loss_sum)) else "loss"
        warnings.warn(
            f"{type(self).__name__} skipped step {self.num_steps}: the {what} is not finite. The weights are "
            f"unchanged ({self.num_skipped} skipped so far). A lower learning rate or {self.radius_name} usually "
            "mends it.",
            RuntimeWarning,
            stacklevel=3,
        )
        for p in self.params:
            p.grad = None

    def _heal(self) -> None:
        if self._place is not None and not self._under_way:
            self._place.home()  # two interrupts in one breath: finish the work that they cut off
            self._place = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and drops the direction of a finished or abandoned loop."""
        if not self._under_way:
            self._stage = "idle"
        elif self._stage == "loop":
            raise ValueError(CLEARED_IN_LOOP)
        if set_to_none:
            for p in self.params:
                p.grad = None
        else:
            self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's `state_dict`, with radius, step count and seed in its groups. No weight copies."""
        self._heal()
        return super().state_dict()


def _reported(losses: list[tuple[Any, bool]]) -> Any:
    at_weights = [value for value, here in losses if here]
    values = at_weights[:1] or [value for value, _ in losses]
    return values[0] if len(values) == 1 else sum(values) / len(values)
