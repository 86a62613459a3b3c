"""What a method may be joined with, by name: `sam+swa`, `nso+mixup`, `base+label-smoothing`.

A part changes the loss, the batch or what happens after a step, and works beside every rule.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from flatmin.lab.tasks import Settings, Task
from flatmin.optim import Averager, DistancePenalty, DistanceProjection, mixup
from flatmin.optim.registry import Method, get_method, unknown

# part -> its strength where the task says nothing, and what it is
PARTS: dict[str, tuple[float, str]] = {
    "label-smoothing": (0.1, "share of the uniform distribution in the targets"),
    "mixup": (0.2, "alpha of the Beta distribution of the mix"),
    "distance-penalty": (1e-3, "strength of |W - W_0|^2 in the loss"),
    "distance-projection": (1.0, "radius of the ball around W_0, tensor by tensor (Frobenius)"),
    "swa": (0.75, "one average an epoch, from this fraction of the run on; constant learning rate"),
    "tail-average": (0.75, "the average of every iterate from this fraction of the run on; constant learning rate"),
    "ema": (0.99, "decay of an exponential average; constant learning rate"),
}
AVERAGES = ("swa", "tail-average", "ema")

Evaluation = Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]


def split_name(name: str) -> tuple[Method, dict[str, float]]:
    """The rule, and the parts with their usual strengths, that `rule+part+part` names.

    Raises:
        ValueError: for an unknown rule or part, a part named twice, or two averages.
    """
    rule, *parts = name.split("+")
    method = get_method(rule)
    for part in parts:
        if part not in PARTS:
            raise ValueError(unknown("part", part, PARTS))
    if len(set(parts)) < len(parts):
        raise ValueError(f"{name!r} names a part twice.")
    if len([part for part in parts if part in AVERAGES]) > 1:
        raise ValueError(f"{name!r} has two averages: name one of {', '.join(AVERAGES)}.")
    return method, {part: PARTS[part][0] for part in parts}


def check_used(name: str, settings: Settings) -> None:
    """Refuses settings that `rule+part+part` would not use: a record would say what was not so."""
    method, parts = split_name(name)
    if settings.weight_decay and method.replaces_momentum:
        raise ValueError(
            f"{method.name} has a prior of its own in place of weight decay: take "
            f"weight_decay={settings.weight_decay:g} out of its settings."
        )
    if settings.radius is not None and method.radius_name is None:
        raise ValueError(f"{method.name} has no radius: take radius={settings.radius:g} out of its settings.")
    if settings.parts.keys() != parts.keys():
        had, named = (" and ".join(p) or "none" for p in (settings.parts, parts))
        raise ValueError(f"the settings of {name} must have the parts of its name ({named}), and have {had}.")


def settings_of(task: Task, name: str) -> Settings:
    """The task's settings for `rule+part+part`; those of the rule, with the parts' usual strengths, if it has none."""
    if name in task.settings:
        return task.settings[name]
    method, parts = split_name(name)
    return replace(task.settings[method.name], parts=parts)


def has_settings(task: Task, name: str) -> bool:
    """Whether the task has settings for `rule+part+part`, or for the rule.

    Raises:
        ValueError: for an unknown rule or part.
    """
    method, _ = split_name(name)
    return name in task.settings or method.name in task.settings


class Training:
    """The loss, the batches and what surrounds a step, for one run with its parts.

    Args:
        model: as initialised; the distance is from here.
        criterion: the task's loss.
        parts: part -> strength.
        num_steps: of the run.
        epoch: steps in one epoch.
        num_classes: of the labels; `None` if the targets are not labels.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        parts: Mapping[str, float],
        *,
        num_steps: int,
        epoch: int,
        num_classes: int | None,
    ):
        self._criterion, self._parts, self._num_classes = criterion, parts, num_classes
        if "label-smoothing" in parts:
            if not hasattr(criterion, "label_smoothing"):
                raise ValueError(f"label smoothing needs a cross-entropy, and the loss is {type(criterion).__name__}.")
            self._criterion = copy.copy(criterion)
            self._criterion.label_smoothing = parts["label-smoothing"]  # type: ignore[assignment]
        if "mixup" in parts and num_classes is None:
            raise ValueError("mixup mixes labels, and the targets of this task are not labels.")
        params = [p for p in model.parameters() if p.requires_grad]
        penalty, radius = parts.get("distance-penalty"), parts.get("distance-projection")
        self._penalty = None if penalty is None else DistancePenalty(params, penalty)
        self._ball = None if radius is None else DistanceProjection(params, radius)
        self._averager = _averager(model, parts, num_steps, epoch)

    def evaluation(self, optimizer: Any) -> Evaluation:
        """(model, batch) -> the loss of the present probe of `optimizer`."""
        criterion = self._criterion
        needs_losses = getattr(optimizer, "needs_losses", False)
        if needs_losses:
            criterion = copy.copy(criterion)
            criterion.reduction = "none"  # type: ignore[assignment]
        take = getattr(optimizer, "take", lambda *batch: batch)
        mean = getattr(optimizer, "mean", lambda losses: losses)

        def evaluate(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            inputs, targets = take(*batch)
            if "mixup" in self._parts and self._num_classes is not None:
                inputs, targets = mixup(inputs, targets, self._num_classes, self._parts["mixup"])
            outputs = model(inputs)
            loss = criterion(outputs, targets)
            if needs_losses:
                loss = loss.flatten(1).mean(1) if loss.dim() > 1 else loss
                _check_plain(loss.detach().mean(), self._criterion(outputs.detach(), targets))
            loss = mean(loss)
            return loss if self._penalty is None else loss + self._penalty()

        return evaluate

    def schedule(self, optimizer: Optimizer, num_steps: int) -> LRScheduler:
        """A cosine to zero; for an average, which lives on large steps, a constant."""
        if self._averager is not None:
            return LambdaLR(optimizer, lambda _: 1.0)
        return CosineAnnealingLR(optimizer, num_steps)

    def after_step(self) -> None:
        """Projects and averages."""
        if self._ball is not None:
            self._ball.project()
        if self._averager is not None:
            self._averager.update()

    def refresh(self, data: Iterable[Any]) -> None:
        """Batch-norm statistics for the average, from the training data."""
        if self._averager is not None:
            self._averager.refresh(data)

    def worn(self) -> AbstractContextManager[Any]:
        """Inside, the model has the weights that the run is judged by: the average, if there is one."""
        return nullcontext() if self._averager is None else self._averager.applied()


def _check_plain(mean: Tensor, loss: Tensor) -> None:
    """Refuses a loss that is no plain mean over samples, where a method chooses among the losses of samples."""
    if loss.isfinite() and not torch.allclose(mean, loss, rtol=1e-3):
        raise ValueError(
            f"the mean of the losses of samples is {float(mean):.4g}, and the loss {float(loss):.4g}: it has class "
            "weights or labels that it ignores. A method that chooses samples by their losses (esam) needs a plain "
            "mean over samples: leave it out of --methods."
        )


def _averager(model: nn.Module, parts: Mapping[str, float], num_steps: int, epoch: int) -> Averager | None:
    if "ema" in parts:
        return Averager(model, "ema", decay=parts["ema"])
    if "tail-average" in parts:
        return Averager(model, "tail", start=parts["tail-average"], num_steps=num_steps)
    if "swa" in parts:
        return Averager(model, "tail", start=parts["swa"], num_steps=num_steps, every=epoch)
    return None
