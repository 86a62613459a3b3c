"""The engine: a `torch.optim.Optimizer` around a base optimizer, run by a rule.

One training step, whatever the method:

    1. the rule asks for a gradient at a displacement          (flatmin.optim.rule)
    2. the engine moves the weights there                      (flatmin.place)
    3. the caller evaluates: a closure, or the body of a loop  (extra evaluations leave no trace: flatmin.quiet)
    4. the engine brings the weights back and hands the gradient to the rule; again from 1 until the rule returns
    5. the direction goes into `.grad` and the base optimizer steps

The engine contains no method's formula. Nothing of the size of the parameters is kept between steps, except what a
rule asks to remember (flatmin.optim.engine.memory).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flatmin.checks import check_choice, check_number
from flatmin.distributed import explain
from flatmin.optim.engine import compiled
from flatmin.optim.engine.losses import Losses
from flatmin.optim.engine.memory import make_room
from flatmin.optim.engine.misuse import (
    CLEARED_IN_LOOP,
    SCALER_STEP,
    check_base,
    check_closure,
    check_loss,
    check_model,
    check_options,
    check_perturbed,
    check_window,
    is_of_lightning,
)
from flatmin.optim.engine.scaling import UNSCALED, Scaling
from flatmin.optim.engine.session import Session
from flatmin.optim.rule import Probe
from flatmin.place import Restore


class FlatOptimizer(Session):
    """Base class of every method: subclasses give `rule()` and name their radius.

    Args:
        base: an optimizer *instance*; its `param_groups`, `state` and hyperparameters stay in charge.
        radius: the value of the group option named by `radius_name`, where a group does not set its own.
        seed: of the method's random numbers, if it has any; `None` is really random (and saved with the state).

    The other arguments are those of EngineOptions.

    Raises:
        ValueError: for a class instead of an instance, a negative radius, an unknown option, a `perturb` that names no
            parameter of the base, an optimizer that maximises or evaluates by itself.
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
        check_model(model)
        check_options(unknown, type(self), self.radius_name)
        super().__init__(base, radius, seed)
        self._perturbed = None if perturb is None else check_perturbed(perturb, self.params)
        self._restore = check_choice("restore", restore, get_args(Restore))
        self._low_memory = low_memory
        self._guard = guard
        self._every, self._start, self._stop = check_window(every, start, stop)
        self._model = model
        self._rest()

    # -- what a method provides ----------------------------------------------------------------------------------

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

        Gradients are cleared at the start; the body must not clear them, nor clip them: it may see the sum over the
        probes so far. After the loop `.grad` holds the direction (clip it there). Gradient accumulation has two
        meanings:

            inside the body    all micro-batches are evaluated at the same points: the step of the whole batch
            several loops      before one `step()`, each with a `share`: every micro-batch is perturbed by itself, and
                               the direction is the sum of the shares

        Args:
            scaler: a `torch.amp.GradScaler`, for fp16. The body calls `scaler.scale(loss).backward()`; gradients are
                unscaled here, and `opt.step()` skips on an overflow in any probe and updates the scaler.
            share: of this micro-batch in the direction, e.g. `1 / len(micro_batches)`; its loss is then not divided.
            rescale: hands the direction back scaled, not finite after an overflow, for code that calls
                `scaler.unscale_(opt)`, `scaler.step(opt)` and `scaler.update()` itself, as frameworks do.

        Yields: a `Probe` for each evaluation, with the weights displaced until the next one is asked for.

        Raises:
            ValueError: a body without `backward()`, that clears gradients, steps, or leaves out the `take` or `mean`
                that its probe asks for; a loop inside a loop; a direction of before that was neither stepped along nor
                cleared; a `share` that is negative or inside `no_sync()`; sparse gradients where a formula has none.
        """
        if compiled.inside():
            return compiled.each(self._probes, scaler, share, rescale)
        return self._probes(scaler, share, rescale)

    def _probes(self, scaler: Any, share: float | None, rescale: bool) -> Generator[Probe, None, None]:
        if share is not None:
            share = check_number("share", share, 0.0)
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
        if compiled.inside():
            return compiled.apart(self._step, closure, scaler)
        return self._step(closure, scaler)

    # Hooks and profiling belong to the base's step, which runs inside this one: once a step, not twice.
    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], Any] | None, scaler: Any) -> Any:
        if closure is None:
            self._step_after_loop()
            return None
        if "found_inf" in self.__dict__:
            raise ValueError(SCALER_STEP)
        if self._stage == "window" and self._under_way:
            return self._step_along_window(closure)
        if self._stage == "ready" and is_of_lightning(closure):  # manual optimization: the loop was the training step
            closure()  # its hooks
            self._step_after_loop()
            return None
        check_closure(closure)
        if not torch.is_grad_enabled():
            closure = torch.enable_grad()(closure)
        losses = Losses()
        for probe in self._open("closure", self._scaled_by(scaler)):
            try:
                loss = closure()
            except RuntimeError as error:
                explain(error)
                raise
            if type(loss) is not Tensor or loss.numel() != 1:
                check_loss(loss)
            losses.add(loss, probe)
        self._finish(losses)
        return losses.reported()

    def _step_after_loop(self) -> None:
        if self._initialises_state():
            self.base.step()
            make_room(self.remembers, self.params, self.state)
            return
        self._check_ready()
        self._check_scaled_by(self.__dict__.get("grad_scale"))  # set by GradScaler.step while it calls us
        self._finish(Losses())

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
        return UNSCALED if scaler is None and not rescale else Scaling(scaler, self.params, rescale=rescale)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and drops the direction of a finished or abandoned loop."""
        if not self._under_way:
            self._heal()
            self._dropped = self._stage == "ready"
            self._stage = "idle"
        elif self._stage == "window":
            return  # a framework's loop clears at the first micro-batch, whose gradients are being collected
        elif self._stage == "loop":
            raise ValueError(CLEARED_IN_LOOP)
        if set_to_none:
            for group in self.base.param_groups:
                for p in group["params"]:
                    p.grad = None
        else:
            self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's `state_dict`, with radius, step count and seed in its groups.

        What a method remembers from step to step (a mean gradient, an eigenvector: see its class) is in `state` beside
        the base's own, one tensor for each parameter. No weight copies.
        """
        self._heal()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, or a checkpoint of the bare base optimizer (our options then stay).

        Warns (UserWarning): of a checkpoint of another method, which has no radius for this one.
        """
        super().load_state_dict(state_dict)
        if not self._under_way:
            self._drop()
