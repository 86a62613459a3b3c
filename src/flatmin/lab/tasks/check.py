"""What a comparison takes for granted of a task, looked at before anything is trained.

A task that breaks one of these trains without an error, and its numbers mean something else:

    data      the same for the same seed; a test set that no seed changes; finite; labels in range
    model     a new one at each call
    loss      one number, a mean over samples, of outputs and targets that belong together

Test or validation inputs that are also trained on may be so by chance (small tables have equal rows), so they are said
and not refused.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from flatmin.lab.tasks.task import Splits, Task
from flatmin.notices import warn

FEW = 64  # rows are enough to see how the loss behaves
ELEMENTWISE = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss)


def check_task(task: Task, seed: int = 0) -> None:
    """Refuses what would give wrong numbers silently. The random state stays as it is.

    Args:
        task: the task.
        seed: of the data that is looked at; that of the next seed is too.

    Raises:
        ValueError: it names the task, what is wrong, and the mend.

    Warns (UserWarning): of inputs that are trained on and in another part too.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            splits = _check_data(task, seed)
            _check_model(task, splits)
        except _Refused as error:
            raise ValueError(f"task {task.name}: {error}") from error.__cause__
    _warn_of_copies(task, splits)


class _Refused(Exception):
    """Without the name of the task."""


def _check_data(task: Task, seed: int) -> Splits:
    splits, again, other = task.splits(seed), task.splits(seed), task.splits(seed + 1)
    for name, (inputs, targets) in splits._asdict().items():
        for what, tensor in (("inputs", inputs), ("targets", targets)):
            if not torch.isfinite(tensor).all():
                raise _Refused(f"{name} {what} of load({seed}) are not all finite.")
    if not all(_same(a, b) for a, b in zip(splits, again, strict=True)):
        raise _Refused(f"load({seed}) gave other data when it was called again. It must depend on its seed alone.")
    if not _same(splits.test, other.test):
        raise _Refused(
            f"the test sets of load({seed}) and load({seed + 1}) differ. A seed may choose what is trained and "
            "validated on, but all methods and seeds are to be compared on one test set."
        )
    return splits


def _same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _check_model(task: Task, splits: Splits) -> None:
    model, other = task.build_model(), task.build_model()
    for name, module in (("build_model must return", model), ("criterion must be", task.criterion)):
        if not isinstance(module, nn.Module):
            raise _Refused(f"{name} an nn.Module, got {type(module).__name__}.")
    if any(isinstance(p, UninitializedParameter) for p in model.parameters()):
        raise _Refused("build_model returned a model with lazy layers: run it once on some input there.")
    if {id(p) for p in model.parameters()} & {id(p) for p in other.parameters()}:
        raise _Refused(
            "build_model returned the same parameters twice, so that a run would go on where the last one ended. It "
            "must make a new model at each call."
        )
    criterion = copy.deepcopy(task.criterion)  # it may have a state
    model.eval()
    for name, (inputs, targets) in splits._asdict().items():
        rows = torch.linspace(0, len(targets) - 1, min(FEW, len(targets))).long()
        _check_loss(criterion, model, name, inputs[rows], targets[rows])
    # The smallest batch of training: batch norm, for one, may need two samples.
    last = len(splits.train[1]) % task.batch_size or task.batch_size
    _evaluated(criterion, model.train(), f"a batch of {last} training samples", *(t[:last] for t in splits.train))


@torch.no_grad()
def _evaluated(criterion: nn.Module, model: nn.Module, what: str, inputs: Tensor, targets: Tensor) -> tuple[Any, Any]:
    """Outputs and loss."""
    try:
        with warnings.catch_warnings():  # torch warns of a broadcast; `_check_values` refuses it
            warnings.simplefilter("ignore", UserWarning)
            outputs = model(inputs)
            return outputs, criterion(outputs, targets)
    except Exception as error:
        kinds = f"inputs {_kind(inputs)}, targets {_kind(targets)}"
        raise _Refused(f"model or loss fail on {what} ({kinds}): {type(error).__name__}: {error}") from error


def _check_loss(criterion: nn.Module, model: nn.Module, name: str, inputs: Tensor, targets: Tensor) -> None:
    outputs, loss = _evaluated(criterion, model, name, inputs, targets)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise _Refused(f"the loss must be one number, the mean over the samples, got {_kind(loss)}.")
    if not torch.isfinite(loss):
        raise _Refused(f"the loss of {name} is {loss.item()} before training.")
    _, twice = _evaluated(criterion, model, name, torch.cat([inputs, inputs]), torch.cat([targets, targets]))
    if torch.isclose(twice, 2 * loss, rtol=1e-3) and not torch.isclose(twice, loss, rtol=1e-3):
        raise _Refused(
            "the loss of samples that are there twice is twice as large: it must be their mean, not their sum."
        )
    if targets.is_floating_point():
        _check_values(criterion, outputs, targets)
    else:
        _check_labels(criterion, outputs, targets)


def _check_values(criterion: nn.Module, outputs: Any, targets: Tensor) -> None:
    if not isinstance(outputs, Tensor) or outputs.shape == targets.shape:
        return
    try:
        together = torch.broadcast_shapes(outputs.shape, targets.shape)
    except RuntimeError:
        return  # a loss of its own kind
    if isinstance(criterion, ELEMENTWISE) or together not in (outputs.shape, targets.shape):
        raise _Refused(
            f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} are of other shapes, and a loss would "
            "pair each output with several targets, or each target with several outputs. Give them the same shape "
            "(targets.unsqueeze(1)?)."
        )


def _check_labels(criterion: nn.Module, outputs: Any, targets: Tensor) -> None:
    fits = isinstance(outputs, Tensor) and outputs.ndim == targets.ndim + 1 and outputs.shape[1] > 1
    if not fits or outputs.shape[2:] != targets.shape[1:] or len(outputs) != len(targets):
        raise _Refused(
            f"integer targets are class labels: (n, ...) for outputs (n, classes, ...), two classes or more, in this "
            f"order; got {_kind(targets)} for {_kind(outputs)}. If they are no labels, make them floating-point."
        )
    known = targets[counted(targets, criterion)]
    if ((known < 0) | (known >= outputs.shape[1])).any():
        raise _Refused(
            f"there are labels outside of 0 .. {outputs.shape[1] - 1}, the classes of the outputs, that are not the "
            "loss's ignore_index."
        )


def counted(labels: Tensor, criterion: nn.Module) -> Tensor:
    """Which labels the loss counts, and the accuracy: all but its `ignore_index`."""
    return labels != getattr(criterion, "ignore_index", -100)


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)} {value.dtype}".replace("torch.", "")


def _warn_of_copies(task: Task, splits: Splits) -> None:
    parts = {name: _rows(inputs) for name, (inputs, _) in splits._asdict().items()}
    for name, others in (("test", ("train", "validation")), ("validation", ("train",))):
        for other in others:
            known = set(parts[other])
            if count := sum(row in known for row in parts[name]):
                warn(
                    f"task {task.name}: {count} of {len(parts[name])} {name} inputs are also {other} inputs. If they "
                    "are the same samples, the comparison says nothing about new ones."
                )


def _rows(inputs: Tensor) -> list[bytes]:
    flat = inputs.detach().cpu().contiguous().flatten(1) if inputs.ndim > 1 else inputs.detach().cpu().unsqueeze(1)
    return [row.tobytes() for row in flat.contiguous().view(torch.uint8).numpy()]
