"""The losses that the evaluations of a step gave."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flatmin.optim.rule import Probe


class Losses:
    """What was returned for each probe, kept apart from the caller, who may write the next loss into the same tensor.

    On the CPU a number is kept, which costs less than a copy of the tensor; elsewhere a copy, without synchronisation.
    """

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._at_weights: list[Any] = []
        self._like: tuple[torch.Size, torch.dtype] | None = None  # of the tensors of which numbers were kept

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)

    def add(self, loss: Any, probe: Probe) -> None:
        """The next one: a number, or a tensor with one."""
        if isinstance(loss, Tensor):
            if loss.is_cpu and loss.numel() == 1:
                self._like = loss.shape, loss.dtype
                loss = loss.item()
            else:
                loss = loss.detach().clone()
        self._values.append(loss)
        if probe.at_weights and probe.part is None:
            self._at_weights.append(loss)

    def finite(self) -> bool:
        """Whether all are. One host synchronisation each, on a device."""
        return all(math.isfinite(value) for value in self._values)

    def reported(self) -> Any:
        """The loss at the weights, if it was asked for, else the mean of all; a tensor if tensors were given."""
        values = self._at_weights[:1] or self._values
        mean = values[0] if len(values) == 1 else sum(values[1:], start=values[0]) / len(values)
        if self._like is None or isinstance(mean, Tensor):
            return mean
        shape, dtype = self._like
        return torch.full(shape, mean, dtype=dtype, device="cpu")
