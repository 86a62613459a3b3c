"""What `flatmin tune` tries after a grid: as many settings more for every method, in what its grid did not vary.

A grid of a method with a radius has the control's best weight decay throughout, which chance may have chosen among
decays that do the same for the control, and not for the method. So the other decays are tried at the best of its grid;
the control, whose grid has them, gets learning rates between those of its grid.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from flatmin.lab.tasks import Settings


def number_further(rates: Sequence[float], decays: Sequence[float]) -> int:
    """How many settings there are beyond a grid: as many as both kinds have."""
    return max(min(len(rates), len(decays)) - 1, 0)


def further(best: Settings, rates: Sequence[float], decays: Sequence[float], *, borrowed: bool) -> list[Settings]:
    """The settings to try after the grid, those nearest to its best first.

    Args:
        best: of the grid.
        rates: learning rates of the grid.
        decays: weight decays of the control's grid.
        borrowed: whether the grid had the control's weight decay in place of decays of its own.
    """
    if borrowed:
        own = best.weight_decay
        found = sorted((decay for decay in decays if decay != own), key=lambda decay: _apart(decay, own))
        settings = [dataclasses.replace(best, weight_decay=decay) for decay in found]
    else:
        between = [float(f"{math.sqrt(a * b):.3g}") for a, b in itertools.pairwise(sorted(rates))]
        settings = [dataclasses.replace(best, lr=lr) for lr in sorted(between, key=lambda lr: _apart(lr, best.lr))]
    return settings[: number_further(rates, decays)]


def _apart(a: float, b: float) -> float:
    """How many times the one is the other, as a logarithm; from 0, smaller ones are nearer."""
    if a and b:
        return abs(math.log(a / b))
    return math.inf if b else a
