"""How strongly a method's radius acts at given weights: how far it moves them, and how much the loss rises there.

A radius is in the units of the weights, so that the same number is nothing on one network and too much on another; and
weights before a norm may have any size. What can be compared is the rise of the loss of a mini-batch at w + d. It is
seen by letting the method take steps with a learning rate of 0, which leave the weights where they are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from flatmin.lab.train import to_training
from flatmin.lab.tuning.standing import Standing
from flatmin.quiet import undisturbed
from flatmin.vectors import Vector

Batch = tuple[Tensor, Tensor]
FACTOR, MOST = 4.0, 16  # of the ladder on which a radius is looked for, and its steps
CLOSE, REFINEMENTS = 0.1, 10  # to the target, relatively, and how often an interval is made smaller


@dataclass(frozen=True)
class Strength:
    """What a radius does.

    Attributes:
        radius: of the method.
        moved: |d| / |w|, root mean square over probes.
        rise: of the loss of a mini-batch, over the unit; the mean over probes. For noise it is the mean of w + d and
            w - d, without what is linear in d.
    """

    radius: float
    moved: float
    rise: float


class Strengths:
    """Of one method at the weights that the model has, in training mode: dropout masks are the same at w and at w + d.

    Args:
        model: whose weights, buffers, mode and random state stay.
        criterion: the loss, a mean over the batch.
        batches: mini-batches; the means are over them.
        build: (radius, model) -> the method there, made anew for each radius, so that all see the same noise.
        unit: a loss, in which rises are told.
        mirrored: whether d is noise, for which -d is as likely.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        batches: Sequence[Batch],
        build: Callable[[float, nn.Module], Standing],
        *,
        unit: float,
        mirrored: bool,
    ):
        self._unit = abs(unit)
        self._model, self._criterion, self._batches, self._build = model, criterion, batches, build
        self._mirrored = mirrored
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._weights = self._here()
        self.at = cache(self._at)

    def _at(self, radius: float) -> Strength:
        with undisturbed(self._model, eval_mode=False):
            to_training(self._model)
            try:
                standing = self._build(radius, self._model)
                found = [probe for batch in self._batches for probe in self._probes(standing, batch)]
            finally:
                self._move(None)
        if not found:
            return Strength(radius, 0.0, 0.0)
        moved, rises = (np.array(column) for column in zip(*found, strict=True))
        moved = float(np.sqrt(np.mean(moved**2))) / float(self._weights.norm())
        return Strength(radius, moved, float(rises.mean()) / self._unit if self._unit else math.inf)

    def _probes(self, standing: Standing, batch: Batch) -> list[tuple[float, float]]:
        """Of the displaced probes of one step: |d|, and the rise of the loss of the batch."""
        seen: list[Vector] = []
        with warnings.catch_warnings():  # a radius far too large makes losses that are not finite
            warnings.simplefilter("ignore")
            standing.step(batch, lambda: seen.append(self._here() - self._weights))
        self._move(None)
        clean = self._loss(batch)
        found = []
        for d in seen:
            if size := float(d.norm()):
                ends = [d, d * -1.0] if self._mirrored else [d]
                rise = float(np.mean([self._loss_at(end, batch) for end in ends])) - clean
                found.append((size, rise if math.isfinite(rise) else math.inf))
        return found

    def _loss_at(self, d: Vector, batch: Batch) -> float:
        self._move(d)
        try:
            return self._loss(batch)
        finally:
            self._move(None)

    @torch.no_grad()
    def _loss(self, batch: Batch) -> float:
        inputs, targets = batch
        torch.manual_seed(0)  # the same masks at w and at w + d
        return float(self._criterion(self._model(inputs), targets))

    def _here(self) -> Vector:
        return Vector(p.detach().clone() for p in self._params)

    @torch.no_grad()
    def _move(self, d: Vector | None) -> None:
        to = self._weights if d is None else self._weights + d
        for p, value in zip(self._params, to.present, strict=True):
            p.copy_(value)


def radius_for(target: float, value: Callable[[float], float], start: float = 0.01) -> float | None:
    """A radius at which `value`, which grows with it, is within a tenth of the target; `None` if none is found.

    By a ladder of radii from `start`, and interpolation of the logarithms between two of its rungs.
    """
    low = high = start
    while value(high) < target:
        low, high = high, high * FACTOR
        if high > start * FACTOR**MOST:
            return None
    while value(low) >= target:
        low, high = low / FACTOR, low
        if low < start / FACTOR**MOST:
            return None
    for _ in range(REFINEMENTS):
        middle = low * (high / low) ** _share(value(low), target, value(high))
        if abs(value(middle) - target) < CLOSE * target:
            return middle
        low, high = (middle, high) if value(middle) < target else (low, middle)
    return None


def _share(below: float, target: float, above: float) -> float:
    """How far between the two the target is, on a logarithmic scale."""
    if not 0 < below < above < math.inf:
        return 0.5
    return min(max(math.log(target / below) / math.log(above / below), 0.1), 0.9)
