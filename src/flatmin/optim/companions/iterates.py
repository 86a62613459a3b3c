"""Which iterates count in an average, and how much."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

from flatmin.checks import check_choice, check_share, check_whole

Kind = Literal["tail", "mean", "ema"]

NO_LENGTH = (
    "start={start} is a fraction of the run, so the length of the run is needed: pass num_steps=, or the first step to "
    "average as a whole number (start=1000), or kind='mean' for all steps."
)
NO_START = (
    "start must be a step (a whole number >= 1) or a fraction between 0 and 1, got {start!r}. For all steps take "
    "kind='mean'."
)


def next_share(kind: str, decay: float) -> Callable[[int], float]:
    """The share of the next iterate in the average, by how many are in it: 1 / (n + 1), or always 1 - decay."""
    if kind != "ema":
        return lambda num_averaged: 1.0 / (num_averaged + 1)
    kept = check_share("decay, the part of the last average that the next keeps,", decay, "[)")
    return lambda _: 1.0 - kept


def first_step(kind: str, start: float, num_steps: int | None, every: int) -> int:
    """The first step that may be averaged, counted from 1."""
    check_choice("kind", kind, get_args(Kind))
    check_whole("every, the steps between two averaged iterates,", every, 1)
    if num_steps is not None:
        check_whole("num_steps", num_steps, 1)
    first = _tail(start, num_steps) if kind == "tail" else 1
    if num_steps is not None and math.ceil(first / every) * every > num_steps:
        raise ValueError(
            f"no step would be averaged: the first is {first}, every={every}, and the run ends after {num_steps}."
        )
    return first


def _tail(start: float, num_steps: int | None) -> int:
    if start >= 1 and start == int(start):
        return int(start)
    if not 0 < start < 1:
        raise ValueError(NO_START.format(start=start))
    if num_steps is None:
        raise ValueError(NO_LENGTH.format(start=start))
    return min(num_steps, math.floor(start * num_steps + 1e-9) + 1)  # 0.29 * 100 is a little less than 29
