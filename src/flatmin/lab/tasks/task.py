"""What a task is: data, a model and a loss, with where they come from and how each method is run on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from flatmin.checks import check_number, check_positive, check_whole

Pair = tuple[Tensor, Tensor]


class Splits(NamedTuple):
    """Inputs and targets; `validation` is for choosing settings, `test` for nothing but the last number.

    Integer targets are class labels. With targets that are floating-point numbers (regression, say) there is no
    accuracy: the comparison is by test loss.
    """

    train: Pair
    validation: Pair
    test: Pair


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a method is run: around the task's base optimizer, on a cosine schedule to zero.

    Attributes:
        lr: initial learning rate.
        weight_decay: of the base optimizer; 0 for a method with a prior in its place (bSAM, around plain SGD).
        radius: rho or sigma; `None` for the base, and for a method's default.
        parts: what the method is joined with, and how strongly (flatmin.lab.parts); those of its name.

    Raises:
        ValueError: for a number that is not finite or out of range.
    """

    lr: float
    weight_decay: float = 0.0
    radius: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_positive("lr", self.lr)
        check_number("weight_decay", self.weight_decay, 0.0)
        if self.radius is not None:
            check_number("radius", self.radius, 0.0)


def sgd(model: nn.Module, settings: Settings) -> Optimizer:
    """SGD with momentum 0.9: the base of a task that names no other."""
    return SGD(model.parameters(), lr=settings.lr, momentum=0.9, weight_decay=settings.weight_decay)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Data + model + loss, by name.

    Attributes:
        name: as the command line spells it, and the folder of its comparison.
        summary: one line.
        source: where the data comes from.
        licence: of the data.
        load: seed -> Splits. The seed chooses the training samples; the test set never changes. All tensors are in
            memory.
        build_model: a freshly initialised model (from torch's random state).
        criterion: the loss, a mean over the batch.
        batch_size: of training.
        num_gradients: mini-batch gradients that a run may spend.
        settings: method name -> its tuned settings; may be empty until `flatmin tune` has found some.
        tuning: how the settings were chosen: one sentence, which the report repeats.
        build_base: (model, settings) -> the base optimizer, with the learning rate and weight decay of the settings.
            The schedule is a cosine to zero, whatever the base.

    Raises:
        ValueError: for a name that is no name of a folder, a batch or a budget below 1, or settings that are none.
    """

    name: str
    summary: str
    source: str = "not said"
    licence: str = "licence not said"
    load: Callable[[int], Splits]
    build_model: Callable[[], nn.Module]
    criterion: nn.Module
    batch_size: int
    num_gradients: int
    settings: Mapping[str, Settings] = field(default_factory=dict)
    tuning: str = "Not tuned."
    build_base: Callable[[nn.Module, Settings], Optimizer] = sgd

    def __post_init__(self) -> None:
        check_folder("the name of a task", self.name)
        check_whole("batch_size", self.batch_size, 1)
        check_whole("num_gradients", self.num_gradients, 1)
        for method, settings in self.settings.items():
            if not isinstance(settings, Settings):
                raise ValueError(f"settings[{method!r}] must be Settings(lr=...), got {settings!r}.")

    def model(self, seed: int) -> nn.Module:
        """The one that a run of this seed begins with; the random state stays as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build_model()

    def splits(self, seed: int) -> Splits:
        """What `load` gives, looked at.

        Raises:
            ValueError: if it is not three pairs of tensors, or inputs and targets are not equally many.
        """
        splits, where = self.load(seed), f"load of task {self.name!r}:"
        if not isinstance(splits, (tuple, list)) or len(splits) != len(Splits._fields):
            got = f"{len(splits)} parts" if isinstance(splits, (tuple, list)) else type(splits).__name__
            raise ValueError(f"{where} it must return train, validation and test, got {got}.")
        for name, pair in zip(Splits._fields, splits, strict=True):
            pair = pair if isinstance(pair, (tuple, list)) else (pair,)
            if not (len(pair) == 2 and all(isinstance(part, Tensor) for part in pair)):
                kinds = ", ".join(type(part).__name__ for part in pair)
                raise ValueError(f"{where} {name} must be two tensors, inputs and targets, got {kinds}.")
            num_inputs, num_targets = map(len, pair)
            if num_inputs == num_targets == 0:
                raise ValueError(f"{where} {name} is empty.")
            if num_inputs != num_targets:
                raise ValueError(
                    f"{where} {name} must have a target for each input, got {num_inputs} and {num_targets}."
                )
        return Splits(*splits)


def by_validation(num_seeds: int, *num_settings: int) -> str:
    """How settings were chosen by `flatmin tune`, in a sentence; several numbers of settings where methods differ."""
    return (
        f"Chosen by validation loss on {num_seeds} other seed{'s' if num_seeds != 1 else ''}, "
        f"{' or '.join(map(str, num_settings))} settings for each method (flatmin tune); the test set was not used."
    )


def check_folder(what: str, name: str) -> None:
    """Refuses a name that would lead out of the folder in which it is made."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(f"{what} is the name of a folder inside --out, got {name!r}.")
