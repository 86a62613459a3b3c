"""When to stop drawing: at a relative standard error, a number of draws, or a time, whichever comes first."""

from __future__ import annotations

import math
import time

import numpy as np

PILOT = 8  # draws before the first decision: fewer, and the standard error itself is a guess


class Budget:
    """Decides how many draws the next round has; 0 ends.

    Args:
        rtol: wanted standard error over the size of the mean.
        num_draws: draws, at most.
        max_seconds: time, at most (looked at between rounds).

    Raises:
        ValueError: for a bound that is not positive.
    """

    def __init__(self, rtol: float | None, num_draws: int, max_seconds: float | None):
        for name, value in [("rtol", rtol), ("num_draws", num_draws), ("max_seconds", max_seconds)]:
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        self._rtol, self._num_draws, self._max_seconds = rtol, num_draws, max_seconds
        self._start = time.monotonic()

    def met(self, samples: np.ndarray) -> bool:
        """Whether the relative error asked for is reached (true if none was)."""
        return self._rtol is None or bool(standard_error(samples) <= self._rtol * abs(samples.mean()))

    def next_round(self, samples: np.ndarray) -> int:
        """How many more draws, given the samples so far."""
        done = len(samples)
        if done == 0:
            return min(PILOT, self._num_draws)
        wanted = min(self._num_draws - done, done)  # at most double: the error of few draws is itself uncertain
        if self._rtol is not None:
            if self.met(samples):
                return 0
            goal = self._rtol * max(abs(samples.mean()), 1e-300)
            needed = min((standard_error(samples) / goal) ** 2 * done, 1e9)
            wanted = min(wanted, max(math.ceil(needed) - done, 2))
        if self._max_seconds is not None:
            used = time.monotonic() - self._start
            wanted = min(wanted, int((self._max_seconds - used) / (used / done)))
        return max(wanted, 0)


def standard_error(samples: np.ndarray) -> float:
    """Of the mean; infinite for fewer than two samples."""
    if len(samples) < 2:
        return math.inf
    return float(samples.std(ddof=1) / math.sqrt(len(samples)))
