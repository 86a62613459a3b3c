"""A quick look for the control's learning rate and weight decay: a walk on a grid, downhill in validation loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FACTORS = (math.sqrt(10.0), 10.0)  # of the learning rate and of the weight decay, from one point to the next
WORTH = 0.01  # of its loss: the least by which another point must be better for the walk to go there
NOTHING = 0.0025, 0.05  # of its loss, and of what was learned: a decay that changes both by less does nothing
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
        indifferent: whether all decays did the same, up to the largest that was tried.
    """

    tried: dict[tuple[float, float], float]
    best: tuple[float, float]
    ended: bool
    indifferent: bool = False


def walk(lr: float, decay: float, losses: Losses, untrained: float = math.inf) -> Walk:
    """From the start to the best of its four neighbours, and on, until none is better by a hundredth.

    Both are changed, since they act together (a decay acts times the learning rate): one alone, at a guess of the
    other, would lead astray. From a decay that does nothing up to the last that does nothing, and on if the next one is
    better: a grid around the first would not be one. At most 58 points, as a rule ten.

    Args:
        lr: where it begins.
        decay: where it begins; at 0 it stays.
        losses: points -> their validation losses.
        untrained: the loss without training.
    """

    def point(index: Index) -> tuple[float, float]:
        return rounded(lr * FACTORS[0] ** index[0]), rounded(decay * FACTORS[1] ** index[1])

    tried: dict[Index, float] = {}

    def look(*indices: Index) -> None:
        if todo := [index for index in indices if index not in tried]:
            tried.update(zip(todo, losses([point(index) for index in todo]), strict=True))

    here, ended, climbs = (0, 0), False, 0
    for _ in range(MOVES):
        i, j = here
        around = [(i + 1, j), (i - 1, j)] + ([(i, j + 1), (i, j - 1)] if decay else [])
        look(here, *around)
        best = min(around, key=lambda index: tried[index])
        if ended := not _is_better(tried[best], tried[here]):
            climbs = _climbs(here, look, tried, untrained) if decay else 0
            best = (i, j + climbs + 1)
            if best not in tried or not _is_better(tried[best], tried[here]):
                break
            ended = False
        here = best
    if ended and climbs < CLIMBS:
        here = (here[0], here[1] + climbs)
    return Walk({point(index): loss for index, loss in tried.items()}, point(here), ended, climbs == CLIMBS)


def _is_better(one: float, other: float) -> bool:
    """By a hundredth."""
    return one < other - (WORTH * abs(other) if math.isfinite(other) else 0.0)


def _climbs(here: Index, look: Callable[[Index], None], tried: dict[Index, float], untrained: float) -> int:
    """How many decays above do the same."""
    loss, (i, j) = tried[here], here
    same = min(NOTHING[0] * abs(loss), NOTHING[1] * (untrained - loss))
    for k in range(1, CLIMBS + 1):
        look((i, j + k))
        if not abs(tried[i, j + k] - loss) <= same < math.inf:
            return k - 1
    return CLIMBS


def rounded(value: float) -> float:
    """To two digits."""
    return float(f"{value:.2g}")
