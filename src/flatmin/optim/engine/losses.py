"""The losses that the evaluations of a step gave."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from flatmin.optim.rule import Probe


class Losses:
    """What was returned for each probe, kept apart from the caller, who may write the next loss into the same tensor.

    On the CPU a number is kept, which costs less than a copy of the tensor; elsewhere a copy, without synchronisation.
    """

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._at_weights: list[Any] = []
        self._like: Tensor | None = None  # the first tensor of which a number was kept, in its own memory
        self._version: int | None = None  # of that tensor, if it is what will be reported while nobody writes it

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)

    def add(self, loss: Any, probe: Probe) -> None:
        """The next one: a number, or a tensor with one."""
        at_weights = probe.at_weights and probe.part is None
        if isinstance(loss, Tensor):
            loss = self._number(loss, at_weights) if loss.is_cpu and loss.numel() == 1 else loss.detach().clone()
        self._values.append(loss)
        if at_weights:
            self._at_weights.append(loss)

    def _number(self, loss: Tensor, at_weights: bool) -> float:
        if self._like is None:
            self._like = loss.detach()
            if at_weights and loss.requires_grad:  # what has a history is no memory that is written again and again
                self._version = loss._version
        return loss.item()

    def finite(self) -> bool:
        """Whether all are. One host synchronisation each, on a device."""
        return all(map(math.isfinite, self._values))

    def reported(self) -> Any:
        """The loss at the weights, if it was asked for, else the mean of all; a tensor if tensors were given."""
        like = self._like
        if like is not None and self._version is not None and like._version == self._version:
            return like
        values = self._at_weights[:1] or self._values
        mean = values[0] if len(values) == 1 else sum(values[1:], start=values[0]) / len(values)
        return mean if like is None or isinstance(mean, Tensor) else like.new_full(like.shape, mean)
