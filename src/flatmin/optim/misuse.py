"""What quietly wrong use is told: each message names the culprit and the mend."""

from __future__ import annotations

from collections.abc import Iterator

from torch.optim import LBFGS, Optimizer

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

NO_LOSS = "the closure returned None. End it with `return loss`."

ALREADY_UNDER_WAY = (
    "a step is already under way: step() and probes() cannot be called from inside a closure or a probes() loop."
)

DIRECTION_LOST = (
    "a probes() loop has finished, but opt.step() was not called: its direction would be lost. Call opt.step() "
    "after the loop, or opt.zero_grad() to drop the direction."
)

STEP_IN_LOOP = "step() inside the probes() loop: move it after the loop (unindent it)."

ABANDONED = (
    "the probes() loop was left half-way (break, return or an exception), so there is no direction to step along. "
    "Let the loop run to its end, or call opt.zero_grad() and start again."
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
    if hasattr(base, "gradients_per_step"):
        raise ValueError(
            f"{name} cannot wrap {type(base).__name__}: each would displace the other's probes. Wrap the plain "
            "optimizer."
        )
    return base


def check_window(every: int, start: int, stop: int | None) -> tuple[int, int, int | None]:
    """Returns (every, start, stop) if they say which steps to perturb, else raises a `ValueError`."""
    if every < 1 or start < 0 or (stop is not None and stop < start):
        raise ValueError(
            "a rule is active at steps t with start <= t < stop and (t - start) % every == 0, so every must be "
            f">= 1 and 0 <= start <= stop; got every={every}, start={start}, stop={stop}."
        )
    return every, start, stop
