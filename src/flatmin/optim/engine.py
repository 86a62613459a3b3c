"""The engine: a `torch.optim.Optimizer` around a base optimizer, run by a rule.

One training step, whatever the method:

    1. the rule asks for a gradient at a displacement          (flatmin.optim.rule)
    2. the engine moves the weights there                      (flatmin.place)
    3. the caller evaluates: a closure, or the body of a loop  (extra evaluations leave no trace: flatmin.quiet)
    4. the engine brings the weights back and hands the gradient to the rule; again from 1 until the rule returns
    5. the direction goes into `.grad` and the base optimizer steps

The engine contains no method's formula. Nothing of the size of the parameters is kept between steps, except what a
rule asks to remember (flatmin.optim.memory).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flatmin.distributed import Ranks, explain
from flatmin.optim.collect import Collector
from flatmin.optim.ending import Ending, reported
from flatmin.optim.memory import Memory, make_room
from flatmin.optim.misuse import (
    ALREADY_UNDER_WAY,
    CLEARED_IN_LOOP,
    DIRECTION_LOST,
    NO_LOSS,
    SCALER_STEP,
    check_base,
    check_closure,
    check_dense,
    check_options,
    check_window,
)
from flatmin.optim.rule import Probe, Requests, Rule, Update, plain
from flatmin.optim.scaling import Scaling
from flatmin.place import Place, Restore, check_restore
from flatmin.quiet import Quiet
from flatmin.vectors import Vector

# What a step is doing: nothing, evaluating by a closure, in a loop or in a framework's loop (flatmin.optim.window), or
# waiting for `step()` after a loop ("ready").
_Stage = Literal["idle", "closure", "loop", "window", "ready"]


class FlatOptimizer(Ending):
    """Base class of every method: subclasses give `rule()` and name their radius.

    Args:
        base: an optimizer *instance*; its `param_groups`, `state` and hyperparameters stay in charge.
        radius: the value of the group option named by `radius_name`, where a group does not set its own.
        seed: of the method's random numbers, if it has any; `None` is really random (and saved with the state).

    The other arguments are those of EngineOptions.

    Raises:
        ValueError: for a class instead of an instance, a negative radius, an unknown option, an optimizer that
            maximises or evaluates by itself.
    """

    def __init__(
        self,
        base: Optimizer,
        radius: float,
        *,
        seed: int | None = 0,
        model: nn.Module | None = None,
        perturb: Iterable[Tensor] | None = None,
        restore: Restore = "exact",
        low_memory: bool = False,
        guard: bool = True,
        every: int = 1,
        start: int = 0,
        stop: int | None = None,
        **unknown: Any,
    ):
        base = check_base(base, type(self).__name__)
        check_options(unknown, type(self), self.radius_name)
        super().__init__(base, radius, seed)
        self._perturbed = None if perturb is None else list(perturb)
        self._restore: str = check_restore(restore)
        self._low_memory = low_memory
        self._guard = guard
        self._every, self._start, self._stop = check_window(every, start, stop)
        self._model = model
        self._rest()

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
        self._scaling = Scaling(None, [])
        self._memory: Memory | None = None
        self._drift: Vector | None = None
        self._probe: Probe | None = None
        self._rule_saw_gradients = False
        self._micro_share: float | None = None
        self._num_draws = 0

    # -- what a method provides ----------------------------------------------------------------------------------

    def rule(self) -> Rule:
        """The method, as a fresh generator for one step."""
        raise TypeError(f"{type(self).__name__} must define rule()")

    @property
    def gradients_per_step(self) -> float:
        """Gradients that one perturbed step needs (a mean, where steps differ)."""
        raise TypeError(f"{type(self).__name__} must define gradients_per_step")

    @property
    def needs_take(self) -> bool:
        """Whether its probes are about parts of the batch, so that the caller has to use `take`."""
        return False

    @property
    def needs_losses(self) -> bool:
        """Whether it chooses samples by their losses, so that the caller has to use `mean`."""
        return False

    # -- the two ways to evaluate --------------------------------------------------------------------------------

    def probes(self, scaler: Any = None, *, share: float | None = None, rescale: bool = False) -> Iterator[Probe]:
        """The loop form: the weights are displaced inside the body and restored after it.

        Example:
            for probe in opt.probes():
                x_, y_ = probe.take(x, y)
                loss_fn(model(x_), y_).backward()
            opt.step()

        Gradients are cleared at the start; the body must not clear them. After the loop `.grad` holds the direction
        (clip it there). Gradient accumulation has two meanings:

            inside the body    all micro-batches are evaluated at the same points: the step of the whole batch
            several loops      before one `step()`, each with a `share`: every micro-batch is perturbed by itself, and
                               the direction is the sum of the shares

        Args:
            scaler: a `torch.amp.GradScaler`, for fp16. The body calls `scaler.scale(loss).backward()`; gradients are
                unscaled here, and `opt.step()` skips on an overflow in any probe and updates the scaler.
            share: of this micro-batch in the direction, e.g. `1 / len(micro_batches)`; its loss is then not divided.
            rescale: hands the direction back scaled, not finite after an overflow, for code that calls
                `scaler.unscale_(opt)`, `scaler.step(opt)` and `scaler.update()` itself, as frameworks do.
        """
        return self._open("loop", self._scaled_by(scaler, rescale=rescale), share)

    def step(self, closure: Callable[[], Any] | None = None, *, scaler: Any = None) -> Any:  # type: ignore[override]
        """One step: with a closure (which may be called several times), or after a `probes()` loop.

        Args:
            closure: clears the gradients, computes the loss, calls backward, returns the loss.
            scaler: a `torch.amp.GradScaler`; the closure then calls `scaler.scale(loss).backward()` and returns the
                unscaled loss. The step is skipped on an overflow in any probe, and the scaler is updated.

        Returns:
            The loss at the unperturbed weights where the rule evaluates there, else the mean loss over its probes;
            `None` in the loop form.

        Raises:
            ValueError: if there is nothing to step with: no gradient, an unfinished loop, a closure that forgot
                `backward()` or `return loss`; or a scaler that was not passed on.
        """
        scaled_by = self.__dict__.get("grad_scale")  # set by GradScaler.step while it calls us
        if closure is None:
            if self._initialises_state():
                self.base.step()
                make_room(self.remembers, self.params, self.state)
                return None
            self._check_ready()
            self._check_scaled_by(scaled_by)
            self._finish([])
            return None
        if "found_inf" in self.__dict__:
            raise ValueError(SCALER_STEP)
        if self._stage == "window" and self._under_way:
            return self._step_along_window(closure)
        check_closure(closure)
        losses: list[tuple[Any, bool]] = []
        for probe in self._open("closure", self._scaled_by(scaler)):
            loss = self._evaluate(closure)
            if loss is None:
                raise ValueError(NO_LOSS)
            # A clone: the caller may write the next loss into the same tensor.
            losses.append(
                (loss.detach().clone() if isinstance(loss, Tensor) else loss, probe.at_weights and probe.part is None)
            )
        self._finish([value for value, _ in losses])
        return reported(losses)

    # Hooks and profiling belong to the base's step, which runs inside this one: once a step, not twice.
    step.hooked = True  # type: ignore[attr-defined]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True: GradScaler.step calls us without unscaling by itself, so that wrong use can be told from right."""
        return not (self._stage == "ready" and self._scaling.by_framework)

    def name_model(self, model: nn.Module) -> None:
        """Names the model, as `model=` does at construction."""
        if self._model is not model:
            self._model = model
            self._quiet = self._ranks = None

    def take(self, *batch: Any) -> Any:
        """The part of the batch that the present probe is evaluated on (`probe.take`, for closures)."""
        return (self._probe or Probe()).take(*batch)

    def mean(self, losses: Tensor) -> Tensor:
        """The mean of per-sample losses over the samples that the present probe is about (`probe.mean`)."""
        return (self._probe or Probe()).mean(losses)

    def _scaled_by(self, scaler: Any, *, rescale: bool = False) -> Scaling:
        return Scaling(scaler, [] if scaler is None else self.params, rescale=rescale)

    @staticmethod
    def _evaluate(closure: Callable[[], Any]) -> Any:
        try:
            if torch.is_grad_enabled():
                return closure()
            with torch.enable_grad():
                return closure()
        except RuntimeError as error:
            explain(error)
            raise

    # -- one step, inside ----------------------------------------------------------------------------------------

    def _open(
        self, stage: Literal["closure", "loop", "window"], scaling: Scaling, share: float | None = None
    ) -> Generator[Probe, None, None]:
        session = self._guarded_session(stage, scaling, share)
        if not self._under_way:
            self._session = weakref.ref(session)
        return session

    def _guarded_session(
        self, stage: Literal["closure", "loop", "window"], scaling: Scaling, share: float | None
    ) -> Generator[Probe, None, None]:
        params = self.params
        earlier = self._begin(stage, scaling, share, params)
        quiet = self._quiet
        assert quiet is not None
        place = self._place = Place(params, self._restore)
        collector, active = Collector(params, stage != "closure", self.ranks), self._active()
        try:
            yield from self._probe_by_probe(self.rule() if active else plain(), place, quiet, collector)
            if share is not None:
                collector.combine(share, earlier)
            self._rule_saw_gradients |= collector.handed_out and active
            self._stage = "idle" if stage == "closure" else "ready"
        except RuntimeError as error:
            explain(error)
            raise
        finally:
            place.home()  # a second time: an interrupt may have cut the first one off
            self._place = self._probe = None

    def _probe_by_probe(
        self, rule: Rule, place: Place, quiet: Quiet, collector: Collector
    ) -> Generator[Probe, None, None]:
        ranks, requests = self.ranks, Requests(rule)
        try:
            probe = requests.next(None)
            while probe is not None:
                self._probe = probe
                # A window goes away and home again with each micro-batch, so it keeps the displacement.
                place.move(probe.displacement if self._stage == "window" else probe.release())
                collector.before(probe)
                try:
                    ranks.probe(self._exchanges(probe) and not collector.is_part(probe, requests.ahead))
                    quiet.probe()
                    yield probe
                finally:
                    quiet.settle()
                    ranks.settle()
                quiet.leave()
                probe.check_used()
                if probe.weight is None:
                    self._scaling.unscale()
                if not self.takes_sparse:
                    check_dense([p.grad for p in self.params], type(self).__name__)
                place.move(None)  # a rule may read the weights, or draw noise in their scale
                probe = requests.next(collector.after(probe))
            place.home()
            self._install(collector, requests.direction)
        finally:
            place.home()
            quiet.end()

    def _exchanges(self, probe: Probe) -> bool:
        return self.sync_ascent or not probe.ascent

    def _install(self, collector: Collector, direction: Vector | Update | None) -> None:
        if isinstance(direction, Update):
            drift = direction.drift if self._micro_share is None else direction.drift * self._micro_share
            self._drift = drift if self._drift is None else self._drift + drift
            direction = direction.direction
        collector.install(direction)
        self._scaling.settle(self.ranks.agree, is_scaled=direction is None)

    def _active(self) -> bool:
        t = self.num_steps
        due = t >= self._start and (t - self._start) % self._every == 0
        return due and (self._stop is None or t < self._stop) and self.radii().any

    def _begin(
        self, stage: _Stage, scaling: Scaling, share: float | None, params: list[Tensor]
    ) -> Vector | None:
        """Makes ready for a loop. Returns what earlier loops of the same step have given."""
        if self._under_way:
            raise ValueError(ALREADY_UNDER_WAY)
        self._heal()
        goes_on = self._stage == "ready" and share is not None and self._micro_share is not None
        if self._stage == "ready" and not goes_on:
            raise ValueError(DIRECTION_LOST)
        self._fill_groups()
        self._stage, self._micro_share = stage, share
        if not goes_on:
            self._scaling, self._memory, self._drift, self._num_draws = scaling, None, None, 0
            self._rule_saw_gradients = False
        if self._ranks is not None and self._ranks.num_params != len(params):
            self._ranks = None  # parameters were added
        if self._quiet is None:
            self._quiet = Quiet({p.device for p in params}, self._model)
        self._quiet.begin(undoable=self._guard, goes_on=goes_on)
        return Vector([p.grad for p in params]) if goes_on else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and drops the direction of a finished or abandoned loop."""
        if self._stage == "window" and self._under_way:
            return  # a framework's loop clears at the first micro-batch, whose gradients are being collected
        self._heal()
        if not self._under_way:
            self._stage = "idle"
        elif self._stage == "loop":
            raise ValueError(CLEARED_IN_LOOP)
        if set_to_none:
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad = None
        else:
            self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's `state_dict`, with radius, step count and seed in its groups. No weight copies."""
        self._heal()
        return super().state_dict()
