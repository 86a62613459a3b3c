"""What a comparison takes for granted of a task, looked at before anything is trained.

A task that breaks one of these trains without an error, and its numbers mean something else:

    data      the same for the same seed; a test set that no seed changes; finite; labels in range
    model     a new one at each call
    loss      one number, a mean over samples, of outputs and targets that belong together

Test or validation inputs that are also trained on may be so by chance (small tables have equal rows), so they are said
and not refused.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from flatmin.lab.tasks.task import Splits, Task
from flatmin.notices import warn

FEW = 64  # rows are enough to see how the loss behaves


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
    if {id(p) for p in model.parameters()} & {id(p) for p in other.parameters()}:
        raise _Refused(
            "build_model returned the same parameters twice, so that a run would go on where the last one ended. It "
            "must make a new model at each call."
        )
    rest = len(splits.train[1]) % task.batch_size
    if rest == 1 and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        raise _Refused(
            f"batches of {task.batch_size} leave one of {len(splits.train[1])} training samples over, and batch norm "
            "needs two: take another batch_size."
        )
    model.eval()
    for name, (inputs, targets) in splits._asdict().items():
        _check_loss(task.criterion, model, name, inputs[:FEW], targets[:FEW])


@torch.no_grad()
def _check_loss(criterion: nn.Module, model: nn.Module, name: str, inputs: Tensor, targets: Tensor) -> None:
    try:
        with warnings.catch_warnings():  # torch warns of a broadcast; it is refused below
            warnings.simplefilter("ignore", UserWarning)
            outputs = model(inputs)
            loss, twice = (
                criterion(outputs, targets),
                criterion(*(torch.cat([part, part]) for part in (outputs, targets))),
            )
    except Exception as error:
        kinds = f"inputs {_kind(inputs)}, targets {_kind(targets)}"
        raise _Refused(f"model or loss fail on {name} ({kinds}): {type(error).__name__}: {error}") from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise _Refused(f"the loss must be one number, the mean over the samples, got {_kind(loss)}.")
    if not torch.isfinite(loss):
        raise _Refused(f"the loss of {name} is {loss.item()} before training.")
    if torch.isclose(twice, 2 * loss, rtol=1e-3) and not torch.isclose(twice, loss, rtol=1e-3):
        raise _Refused(
            "the loss of samples that are there twice is twice as large: it must be their mean, not their sum."
        )
    (_check_values if targets.is_floating_point() else _check_labels)(outputs, targets)


def _check_values(outputs: Any, targets: Tensor) -> None:
    if not isinstance(outputs, Tensor) or outputs.shape == targets.shape:
        return
    try:
        together = torch.broadcast_shapes(outputs.shape, targets.shape)
    except RuntimeError:
        return  # a loss of its own kind
    if together not in (outputs.shape, targets.shape):
        raise _Refused(
            f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} are of other shapes, and a loss would "
            "pair each output with every target. Give them the same shape (targets.unsqueeze(1)?)."
        )


def _check_labels(outputs: Any, targets: Tensor) -> None:
    fits = isinstance(outputs, Tensor) and outputs.ndim == targets.ndim + 1 and outputs.shape[1] > 1
    if not fits or outputs.shape[2:] != targets.shape[1:] or len(outputs) != len(targets):
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise _Refused(
            f"integer targets are class labels: (n, ...) for outputs (n, classes, ...) of two classes or more, got "
            f"{tuple(targets.shape)} for {shape}. If they are no labels, make them floating-point."
        )


def _kind(value: Any) -> str:
    return (
        f"{tuple(value.shape)} {value.dtype}".replace("torch.", "")
        if isinstance(value, Tensor)
        else type(value).__name__
    )


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
