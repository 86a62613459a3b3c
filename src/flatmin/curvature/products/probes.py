"""Random probes v' A v, one per pass over the data, with a fresh v for every batch; and when there are enough of them.

For v with independent entries +-1, E v' A v = tr A. Two choices make a product worth more than usual:

    a fresh v for every batch    the batches' errors are independent and average out; the sum stays unbiased,
                                 since it is v_b' A_b v_b whose mean is wanted, batch by batch
    several v for every graph    the first-order graph of a batch is built once for all probes of a round
"""

from __future__ import annotations

import itertools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic

import numpy as np
import torch
from scipy.special import ndtri, stdtrit
from torch import Tensor

from flatmin.checks import check_positive, check_whole
from flatmin.curvature.products.operators import BatchOperator, Curvature, Operator, PerBatch
from flatmin.curvature.products.ways import check_finite
from flatmin.noise import draw_like, mix_seeds

PILOT = 8  # probes before the first decision: fewer, and the standard error itself is a guess

Draw = Callable[[int, int], Tensor]  # (number of the first, how many) -> (how many, parameters), float64


class Probes(ABC, Generic[Curvature]):
    """Random estimates, for each parameter p, whose mean is the trace of its block: those of the batches, averaged.

    Args:
        operator: gives the curvature of each batch.
        seed: of the probes.
    """

    text = ""  # what is drawn, for `method` of a result

    def __init__(self, operator: PerBatch[Curvature], seed: int):
        self.operator, self._seed = operator, seed

    def draw(self, first: int, size: int) -> Tensor:
        """The probes with the numbers `first` ... `first + size - 1`: (size, parameters), float64."""
        objective = self.operator.objective
        device = objective.params[0].device
        generator = torch.Generator(device)
        total, count = torch.zeros((), dtype=torch.float64, device=device), 0
        numbers = itertools.count()
        for curvature, batch in self.operator.batches():  # not enumerate(), which would keep the last graph
            index, rows = next(numbers), []
            for row in range(size):
                generator.manual_seed(mix_seeds(self._seed, first + row, objective.members.number(index)))
                rows.append(self._forms(curvature, generator).to(device))
            total, count = total + batch.size * torch.stack(rows), count + batch.size
            del curvature, batch
        means = objective.mean(total, count)
        if means.shape[1] == len(objective.params):
            check_finite(list(means.T), objective)
        return means

    @abstractmethod
    def _forms(self, curvature: Curvature, generator: torch.Generator) -> Tensor:
        """The estimate of one batch for each parameter."""


class VectorProbes(Probes[BatchOperator]):
    """v_p' (A v)_p for each parameter p, with a fresh v of random signs for every batch.

    Args:
        operator: A.
        seed: of the probes.
        change: what is done to a probe before it is used; with a projection P the mean is the trace of P A P.

    Cost: about two gradients of the data for each, and one for each call unless graphs are kept.
    """

    text = "Hutchinson, a fresh Rademacher probe for every batch"

    def __init__(self, operator: Operator, seed: int, change: Callable[[list[Tensor]], list[Tensor]] | None = None):
        super().__init__(operator, seed)
        self._change = change or (lambda v: v)

    def _forms(self, curvature: BatchOperator, generator: torch.Generator) -> Tensor:
        params = self.operator.objective.params
        return curvature.forms(self._change([draw_like(p, "rademacher", generator) for p in params]))


class Budget:
    """Decides how many probes the next round has; 0 ends.

    Args:
        rtol: wanted relative standard error.
        max_products: probes, at most.
        max_seconds: time, at most.
        together: makes one decision of those that several processes take by their own clocks.
    """

    def __init__(
        self,
        rtol: float | None,
        max_products: int,
        max_seconds: float | None,
        together: Callable[[int], int] = lambda decision: decision,
    ):
        self.rtol = None if rtol is None else check_positive("rtol", rtol)
        self.max_products = check_whole("max_products", max_products, 1)
        self.max_seconds = None if max_seconds is None else check_positive("max_seconds", max_seconds)
        self._start, self._together = time.monotonic(), together

    def met(self, samples: np.ndarray, constant: float = 0.0) -> bool:
        """Whether the relative error asked for is reached (true if none was)."""
        return self.rtol is None or bool(cautious(samples) <= self.rtol * abs(constant + samples.mean()))

    def left(self, samples: np.ndarray, constant: float = 0.0) -> int:
        """How many more probes are expected to be needed and can be had.

        Args:
            samples: the probes so far, (probes,).
            constant: what is known exactly and added to their mean.
        """
        done = len(samples)
        left = self.max_products - done
        if self.rtol is not None:
            if self.met(samples, constant):
                return 0
            goal = self.rtol * max(abs(constant + samples.mean()), 1e-300)
            left = min(left, max(math.ceil(min((cautious(samples) / goal) ** 2 * done, 1e9)) - done, 2))
        if self.max_seconds is not None:
            elapsed = time.monotonic() - self._start
            left = min(left, int((self.max_seconds - elapsed) / (elapsed / done)))
        return max(self._together(left), 0)

    def used(self, done: int, more: int) -> float:
        """The share of the time that will be used after `more` products like the `done` ones; 0 without a limit."""
        if self.max_seconds is None:
            return 0.0
        elapsed = time.monotonic() - self._start
        share = elapsed * (1 + more / max(done, 1)) / self.max_seconds
        return self._together(math.ceil(100 * min(share, 1e6))) / 100

    def spend(self, products: int) -> None:
        """Takes products out of the budget that were used otherwise."""
        self.max_products = max(self.max_products - products, 1)


def run(draw: Draw, budget: Budget, samples: np.ndarray, constant: float = 0.0) -> np.ndarray:
    """The probes `samples` (probes, parameters), and rounds of further ones until the budget says enough."""
    # At most double: the pilot's variance is itself uncertain.
    while size := min(budget.left(samples.sum(1), constant), max(len(samples), PILOT)):
        samples = np.concatenate([samples, draw(len(samples), size).cpu().numpy()])
    return samples


def stderr(samples: np.ndarray) -> float:
    """The standard error of the mean; infinite for a single sample."""
    if len(samples) < 2:
        return math.inf
    return float(samples.std(ddof=1) / math.sqrt(len(samples)))


def cautious(samples: np.ndarray) -> float:
    """The standard error, widened by what Student's t has over the normal distribution.

    Stopping when an estimate of the error looks small stops too early, the more so the fewer the samples.
    """
    if len(samples) < 2:
        return math.inf
    return stderr(samples) * float(stdtrit(len(samples) - 1, 0.95) / ndtri(0.95))
