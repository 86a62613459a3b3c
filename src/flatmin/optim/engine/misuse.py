"""What quietly wrong use is told: each message names the culprit and the mend."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.optim import LBFGS, Optimizer

from flatmin.checks import check_whole
from flatmin.notices import warn
from flatmin.optim.options import EngineOptions

NOTHING_TO_STEP = """step() before any gradient. Either pass a closure,
    opt.step(closure)    # it clears the gradients, computes the loss, calls backward and returns the loss
or evaluate in a loop:
    for probe in opt.probes():
        loss_fn(model(x), y).backward()
    opt.step()"""

NO_BACKWARD = (
    "no parameter has a gradient after this probe: the closure (or the body of the probes() loop) must call "
    "loss.backward(), on a loss that depends on the optimizer's parameters."
)

ALREADY_UNDER_WAY = (
    "a step is already under way: step() and probes() cannot be called from inside a closure or a probes() loop. If "
    "an earlier loop was left by break or an exception and its iterator still has a name (it = opt.probes()), the "
    "weights are displaced until it.close()."
)

DIRECTION_CLEARED = (
    "the gradients were cleared between the probes() loop and step(), so there is no direction to step along. Remove "
    "the call that clears them: probes() does it by itself."
)

DIRECTION_LOST = (
    "a probes() loop has finished, but opt.step() was not called: its direction would be lost. Call opt.step() "
    "after the loop, or opt.zero_grad() to drop the direction."
)

WAITS_ELSEWHERE = (
    "another optimizer ({}) of some of the same parameters has had its probes() loop and has not stepped yet: its "
    "direction stands in their .grad. Call its step() first, or its zero_grad() to drop the direction."
)

STEP_IN_LOOP = "step() inside the probes() loop: move it after the loop (unindent it)."

ABANDONED = (
    "the probes() loop was left half-way (break, return or an exception), so there is no direction to step along. "
    "Let the loop run to its end, or call opt.zero_grad() and start again."
)

RADIUS_NAMES = ("rho", "sigma", "radius")  # of the methods here, and what else it is called

NOT_PER_SAMPLE = (
    "this method chooses samples by their losses, so mean() takes one loss for each sample, (n,), got {shape}. Use "
    "reduction='none', and average over further dimensions: losses.flatten(1).mean(1)."
)
NOT_TAKEN = (
    "this rule evaluates its probes on parts of the batch, but take() was not called. In a loop write x, y = "
    "probe.take(x, y) first, in a closure x, y = opt.take(x, y)."
)

NOT_CHOSEN = (
    "this rule chooses samples by their losses, but mean() was not called. Compute one loss per sample "
    "(reduction='none') and write probe.mean(losses).backward() in a loop, opt.mean(losses).backward() in a closure."
)

UNSCALED_NEEDED = (
    "this rule looks at gradients, and they were scaled. Pass the scaler: for probe in opt.probes(scaler): ..., then "
    "opt.step(); or opt.step(closure, scaler=scaler)."
)

SCALER_STEP = (
    "scaler.step(opt) after opt.probes(scaler), or with a closure: the gradients would be unscaled twice, or not at "
    "all. Call opt.step() (or opt.step(closure, scaler=scaler)) instead: it unscales, skips on overflow and updates "
    "the scaler. In Accelerate use flatmin.integrations.accelerate.probes."
)

SHARE_NOT_AVERAGED = (
    "probes(share=...) inside no_sync(): the gradients of this micro-batch would not be averaged over the processes, "
    "so that their weights would drift apart. Leave no_sync() away: what need not be averaged in a probe is not."
)

CLOSURE_IN_ACCUMULATE = (
    "step(closure) where Accelerate accumulates (gradient_accumulation_steps > 1): the closure evaluates one "
    "micro-batch, and the others would be lost. Use flatmin.integrations.accelerate.probes and windows, or accumulate "
    "in the closure and leave gradient_accumulation_steps at 1."
)

NO_CALLBACK = (
    "Lightning calls this optimizer without the callback that it needs: losses would be logged and gradients clipped "
    "at each evaluation, and of an accumulation window only the last micro-batch would count. Give the Trainer "
    "callbacks=[flatmin.integrations.lightning.FlatCallback()]."
)

STILL_SCALED = (
    "the gradients are still scaled: after opt.probes(scaler, rescale=True) call scaler.step(opt) and scaler.update(). "
    "Without rescale=True call opt.step(), which does both."
)

CLEARED_IN_LOOP = (
    "gradients were cleared inside the probes() loop, and with them what the earlier probes gave. probes() clears "
    "gradients itself: remove the call, or move it before the loop."
)


def check_base(base: object, name: str) -> Optimizer:
    """Returns `base` if it is an optimizer that `name` can wrap, else raises a `ValueError` with the right call."""
    if isinstance(base, type):
        raise ValueError(
            f"{name} needs an optimizer instance, got the class {base.__name__}. Write "
            f"{name}(torch.optim.{base.__name__}(model.parameters(), lr=...), ...)."
        )
    if not isinstance(base, Optimizer):
        hint = " (parameters go to the base optimizer)" if isinstance(base, (list, Iterator)) else ""
        raise ValueError(
            f"{name} needs a torch.optim.Optimizer instance as its first argument, got "
            f"{type(base).__name__}{hint}. Write {name}(torch.optim.SGD(model.parameters(), lr=0.1), ...)."
        )
    if isinstance(base, LBFGS):
        raise ValueError(f"{name} cannot wrap LBFGS, which evaluates the loss by itself. Use a first-order optimizer.")
    for group in base.param_groups:
        check_minimises(name, group)
    if any(word in type(base).__name__.lower() for word in ("lion", "sign", "rprop")):
        warn(
            f"{name} around {type(base).__name__}: an update by signs alone keeps little of a perturbed gradient. "
            "Reports for sign-based optimizers found no gain.",
        )
    if hasattr(base, "gradients_per_step"):
        raise ValueError(
            f"{name} cannot wrap {type(base).__name__}: each would displace the other's probes. Wrap the plain "
            "optimizer."
        )
    return base


def check_minimises(name: str, group: Mapping[str, Any]) -> None:
    """Raises a `ValueError` for a group that ascends."""
    if group.get("maximize"):
        raise ValueError(f"{name} minimises: set maximize=False and change the sign of the loss.")


def warn_leftover(name: str, option: str, found: object, given: object) -> None:
    """Says that the base optimizer has been wrapped before, by which its groups have options already."""
    warn(
        f"the base optimizer's groups have {option}={found} from an earlier wrapper or a checkpoint: {name} goes on "
        f"with that, and not with {option}={given}. Make a new base optimizer for each wrapper, or set "
        f"group[{option!r}].",
    )


def warn_other_method(name: str, radius_name: str, radius: object) -> None:
    """Says that a checkpoint is of a method with another radius."""
    warn(
        f"the checkpoint is another method's: it has no {radius_name}, so {name} goes on with its own, "
        f"{radius_name}={radius}.",
    )


def check_names(base: Optimizer, name: str, ours: Iterable[str]) -> None:
    """Raises a `ValueError` if the base has a group option of its own by one of our names."""
    if taken := sorted(set(ours) & set(base.defaults)):
        raise ValueError(
            f"{name} cannot wrap {type(base).__name__}, which has a group option {taken[0]!r} of its own that means "
            "something else: one would be taken for the other. Use another base optimizer."
        )


def check_radius_name(name: str, radius_name: str, options: Iterable[str]) -> None:
    """Raises a `ValueError` if a group has a radius by another name, which nobody would read."""
    for option in options:
        if option != radius_name and option.lower() in RADIUS_NAMES:
            raise ValueError(f"a group has {option!r}, which {name} does not read: its radius is {radius_name!r}.")


def check_closure(closure: object) -> None:
    """Raises a `ValueError` for a closure that a framework calls, which knows one micro-batch of several only."""
    state = sys.modules.get("accelerate.state")
    shared = {} if state is None else state.GradientState._shared_state  # of all accelerators of the process
    if shared.get("plugin_kwargs", {}).get("num_steps", 1) > 1 and _called_by("accelerate.optimizer"):
        raise ValueError(CLOSURE_IN_ACCUMULATE)
    if is_of_lightning(closure):
        raise ValueError(NO_CALLBACK)


def is_of_lightning(closure: object) -> bool:
    """Whether Lightning made it: of a training step, or, in manual optimization, of nothing but its hooks."""
    return getattr(getattr(closure, "func", None), "__qualname__", "") == "Precision._wrap_closure"


def _called_by(module: str) -> bool:
    frame = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != module:
        frame = frame.f_back
    return frame is not None


def check_model(model: object) -> None:
    """Raises a `ValueError` if `model=` is something else than a module."""
    if model is not None and not isinstance(model, Module):
        raise ValueError(f"model= takes the module that is trained (a torch.nn.Module), got {type(model).__name__}.")


def check_loss(loss: object) -> None:
    """Raises a `ValueError` if a closure returned something else than a loss."""
    if loss is None:
        raise ValueError("the closure returned None. End it with `return loss`.")
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise ValueError(f"the closure returned a tensor of shape {tuple(loss.shape)}: return its mean.")
    if isinstance(loss, (tuple, list, dict)):
        raise ValueError(f"the closure returned a {type(loss).__name__}: let it return the loss alone, a number.")


def check_perturbed(chosen: Iterable[object], params: Iterable[Tensor]) -> list[Tensor]:
    """Returns the parameters that `perturb=` names, or raises a `ValueError` if none of them can be moved."""
    found: list[Tensor] = []
    for one in chosen:
        if not isinstance(one, Tensor):
            raise ValueError(
                f"perturb= takes parameters, got {type(one).__name__}. Write perturb=[p for name, p in "
                "model.named_parameters() if ...], or perturb=flatmin.norm_parameters(model)."
            )
        found.append(one)
    known = {id(p) for p in params}
    if not any(id(p) in known for p in found):
        raise ValueError(
            "perturb= names no parameter of the base optimizer, so that nothing would be perturbed. "
            + ("It is empty." if not found else "Are they those of another model?")
        )
    return found


def check_dense(gradients: Iterable[Tensor | None], name: str) -> None:
    """Raises a `ValueError` if a gradient is sparse."""
    if any(g is not None and g.is_sparse for g in gradients):
        raise ValueError(f"{name} cannot take sparse gradients. Use sparse=False in the embedding, or another method.")


def check_options(unknown: Iterable[str], cls: type, radius_name: str) -> None:
    """Raises a `ValueError` for keyword arguments that a method does not take."""
    for name in unknown:
        if name in ("rho", "sigma"):
            hint = f"its radius is {radius_name}"
        elif name in ("lr", "momentum", "weight_decay", "betas", "eps", "nesterov", "amsgrad"):
            hint = "that belongs to the base optimizer"
        elif name == "sync_ascent":
            hint = "its gradients are part of its direction or of its memory, and are averaged over processes"
        else:
            known = [*inspect.signature(cls).parameters, *EngineOptions.__annotations__]
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}? See" if near else "see"
            hint = f"{hint} help({cls.__name__})"
        raise ValueError(f"{cls.__name__} has no option {name!r}: {hint}.")


def warn_skipped(name: str, step: int, culprit: str, count: int, radius_name: str) -> None:
    """Says that a step was skipped, and why."""
    warn(
        f"{name} skipped step {step}: the {culprit} is not finite. The weights are unchanged ({count} skipped so far). "
        f"If the data is finite, a lower learning rate or {radius_name} usually mends it.",
        RuntimeWarning,
    )


def check_window(every: int, start: int, stop: int | None) -> tuple[int, int, int | None]:
    """Returns (every, start, stop) if they say which steps to perturb, else raises a `ValueError`."""
    check_whole("every", every)
    check_whole("start", start)
    if stop is not None:
        check_whole("stop", stop)
    if every < 1 or start < 0 or (stop is not None and stop < start):
        raise ValueError(
            "a rule is active at steps t with start <= t < stop and (t - start) % every == 0, so every must be "
            f">= 1 and 0 <= start <= stop; got every={every}, start={start}, stop={stop}."
        )
    return every, start, stop
