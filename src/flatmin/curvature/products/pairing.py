"""Inner products <t, v> whose v is said later, and whose t are not kept.

To differentiate tensors t in the direction v, torch wants both. But of a gradient whose graph is kept for many
directions the values are of no use, and they are a copy of the parameters for every batch. A Pairing is a number with
the graph of t behind it, whose derivative by t is whatever v it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Pairing:
    """The map v -> <t, v>, of which only the derivative is of interest.

    Args:
        tensors: t, recorded by autograd; only their graph is kept.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._direction = _Direction()
        self._number: Tensor = _Inner.apply(self._direction, *tensors)  # type: ignore[no-untyped-call]

    @property
    def number(self) -> Tensor:
        """What has the graph of t behind it; its value says nothing."""
        return self._number

    def along(self, v: Sequence[Tensor]) -> Tensor:
        """The number whose derivative is that of <t, v>, until another v is given."""
        self._direction.v = v
        return self._number

    def forget(self) -> None:
        """Lets go of v."""
        self._direction.v = ()


class _Direction:
    """What the recorded operation looks at when it is run backwards."""

    v: Sequence[Tensor] = ()


class _Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, direction: _Direction, *tensors: Tensor) -> Tensor:
        ctx.direction = direction
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return None, *ctx.direction.v
