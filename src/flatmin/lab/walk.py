"""A quick look for the control's learning rate and weight decay: a walk on a grid, downhill in validation loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FACTORS = (math.sqrt(10.0), 10.0)  # of the learning rate and of the weight decay, from one point to the next
WORTH = 0.01  # of its loss: the least by which another point must be better for the walk to go there
MOVES, CLIMBS = 8, 4  # at most

Index = tuple[int, int]
Losses = Callable[[Sequence[tuple[float, float]]], Sequence[float]]


@dataclass(frozen=True)
class Walk:
    """Where it led.

    Attributes:
        tried: (learning rate, weight decay) -> validation loss.
        best: where it ended.
        ended: whether none of the neighbours was better; else it had to stop on the way.
    """

    tried: dict[tuple[float, float], float]
    best: tuple[float, float]
    ended: bool


def walk(lr: float, decay: float, losses: Losses) -> Walk:
    """From the start to the best of its four neighbours, and on, until none is better by a hundredth.

    Both are changed, since they act together (a decay acts times the learning rate): one alone, at a guess of the
    other, would lead astray. In the end, of decays that do as well within a hundredth, up to the largest: a grid around
    one that does nothing would not be one. At most 30 points.

    Args:
        lr: where it begins.
        decay: where it begins; at 0 it stays.
        losses: points -> their validation losses.
    """

    def point(index: Index) -> tuple[float, float]:
        return rounded(lr * FACTORS[0] ** index[0]), rounded(decay * FACTORS[1] ** index[1])

    tried: dict[Index, float] = {}

    def look(*indices: Index) -> None:
        todo = [index for index in indices if index not in tried]
        tried.update(zip(todo, losses([point(index) for index in todo]), strict=True))

    here, ended = (0, 0), False
    for _ in range(MOVES):
        i, j = here
        around = [(i + 1, j), (i - 1, j)] + ([(i, j + 1), (i, j - 1)] if decay else [])
        look(here, *around)
        best = min(around, key=lambda index: tried[index])
        worth = WORTH * abs(tried[here]) if math.isfinite(tried[here]) else 0.0
        ended = not tried[best] < tried[here] - worth
        if ended:
            break
        here = best
    if ended and decay:
        here = _highest(here, look, tried)
    return Walk({point(index): loss for index, loss in tried.items()}, point(here), ended)


def _highest(here: Index, look: Callable[[Index], None], tried: dict[Index, float]) -> Index:
    """The largest decay up to which none is worse by a hundredth."""
    most, (i, j) = tried[here] + WORTH * abs(tried[here]), here
    for k in range(j + 1, j + 1 + CLIMBS):
        look((i, k))
        if not tried[i, k] <= most < math.inf:
            break
        j = k
    return i, j


def rounded(value: float) -> float:
    """To two digits."""
    return float(f"{value:.2g}")
