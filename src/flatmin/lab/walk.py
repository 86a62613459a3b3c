"""A quick look for the control's learning rate and weight decay: a walk on a grid, downhill in validation loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FACTORS = (math.sqrt(10.0), 10.0)  # of the learning rate and of the weight decay, from one point to the next
WORTH = 0.01  # of its loss: the least by which another point must be better for the walk to go there
MOVES = 8  # at most

Index = tuple[int, int]
Losses = Callable[[Sequence[tuple[float, float]]], Sequence[float]]


@dataclass(frozen=True)
class Walk:
    """Where it led.

    Attributes:
        tried: (learning rate, weight decay) -> validation loss.
        best: where it ended.
        ended: whether none of the neighbours is better there; else it had to stop on the way.
    """

    tried: dict[tuple[float, float], float]
    best: tuple[float, float]
    ended: bool


def walk(lr: float, decay: float, losses: Losses) -> Walk:
    """From the start to the best of its four neighbours, and on, until none is better by a hundredth.

    Both are changed, since they act together (a decay acts times the learning rate): one alone, at a guess of the
    other, would lead astray. At most 26 points.

    Args:
        lr: where it begins.
        decay: where it begins; at 0 it stays.
        losses: points -> their validation losses.
    """

    def point(index: Index) -> tuple[float, float]:
        return rounded(lr * FACTORS[0] ** index[0]), rounded(decay * FACTORS[1] ** index[1])

    tried: dict[Index, float] = {}
    here, ended = (0, 0), False
    for _ in range(MOVES):
        i, j = here
        around = [(i + 1, j), (i - 1, j)] + ([(i, j + 1), (i, j - 1)] if decay else [])
        todo = [index for index in (here, *around) if index not in tried]
        tried |= dict(zip(todo, losses([point(index) for index in todo]), strict=True))
        best = min(around, key=lambda index: tried[index])
        worth = WORTH * abs(tried[here]) if math.isfinite(tried[here]) else 0.0
        ended = not tried[best] < tried[here] - worth
        if ended:
            break
        here = best
    return Walk({point(index): loss for index, loss in tried.items()}, point(here), ended)


def rounded(value: float) -> float:
    """To two digits."""
    return float(f"{value:.2g}")
