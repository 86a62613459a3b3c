"""The trace of the Hessian by random probes (Hutchinson), with its error, in all and per layer.

For v with independent entries +-1, E v^T H v = tr H. Two choices make a product worth more than usual:

    a fresh v for every batch    the batches' errors are independent and average out; the sum stays unbiased,
                                 since it is v_b^T H_b v_b whose mean is wanted, batch by batch
    several v for every graph    the first-order graph of a batch is built once for all probes of a round

Per layer: v^T H v = sum over layers of v_l^T (H v)_l, and the mean of each term is the trace of that layer's block.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch

from flatmin.curvature.objective import Objective
from flatmin.curvature.products import METHOD, BatchHessian, check_finite, differentiable_twice
from flatmin.curvature.results import Estimate, TraceResult
from flatmin.noise import draw_like, mix_seeds

PILOT = 8  # probes before the first decision: fewer, and the standard error itself is a guess
MAX_PRODUCTS = 1000


def trace(
    objective: Objective,
    *,
    rtol: float | None = None,
    max_products: int | None = None,
    max_seconds: float | None = None,
    method: str = "auto",
    seed: int = 0,
) -> TraceResult:
    """The trace of the Hessian of `objective` by Hutchinson's estimator with Rademacher probes.

    Stops when the standard error is at most `rtol` times the value, or when `max_products` or `max_seconds` are used
    up, whichever comes first; at least 8 probes are drawn, unless `max_products` is smaller. With none of the three,
    `rtol=0.05`. The error is always reported.

    Args:
        objective: what to measure.
        rtol: wanted relative standard error.
        max_products: Hessian-vector products over the whole data, at most (1000 if not given).
        max_seconds: time, at most (checked between rounds of probes).
        method: "auto" or "hutchinson".
        seed: of the probes.

    Returns:
        TraceResult with `value`, `stderr`, `per_layer`, `samples`, `num_products`.

    Cost: 1 + 2 m gradients of the data for a round of m probes. Memory: the graph of one batch.

    Raises:
        ValueError: unknown method, a budget that is not positive, data that gives another loss on a second pass, or a
            Hessian that is not finite.

    Source: Hutchinson 1990; Avron and Toledo 2011 for the variance 2 (|H|_F^2 - sum_i H_ii^2).
    """
    if method not in ("auto", "hutchinson"):
        raise ValueError(f"unknown trace method {method!r}. Known: auto, hutchinson.")
    if rtol is None and max_products is None and max_seconds is None:
        rtol = 0.05
    budget = _Budget(rtol, MAX_PRODUCTS if max_products is None else max_products, max_seconds)
    objective.check()
    samples = np.empty((0, len(objective.params)))  # (probes, parameters): v_p^T (H v)_p
    while round_size := objective.together(budget.next_round(samples.sum(1))):
        samples = np.concatenate([samples, _round(objective, len(samples), round_size, seed)])
    return _result(objective, samples, budget, seed)


def _round(objective: Objective, first: int, size: int, seed: int) -> np.ndarray:
    """`size` new samples, each a pass over the data: (size, parameters)."""
    device = objective.params[0].device
    generator = torch.Generator(device)
    totals = torch.zeros(size, len(objective.params), dtype=torch.float64, device=device)
    batch = count = 0
    with differentiable_twice(objective):
        for loss, n in objective.batch_losses():  # not enumerate(), which would keep the last loss
            hessian = BatchHessian(loss, objective.params)
            for row in range(size):
                generator.manual_seed(mix_seeds(seed, first + row, objective.number(batch)))
                v = [draw_like(p, "rademacher", generator) for p in objective.params]
                terms = [(a * b).sum(dtype=torch.float64) for a, b in zip(v, hessian.product(v), strict=True)]
                totals[row] += n * torch.stack(terms)
            batch, count = batch + 1, count + n
            del loss, hessian
    means = objective.mean(totals, count)
    check_finite(list(means.isfinite().all(0)), objective)
    return means.cpu().numpy()


class _Budget:
    """Decides how many probes the next round has; 0 ends."""

    def __init__(self, rtol: float | None, max_products: int, max_seconds: float | None):
        for name, value in [("rtol", rtol), ("max_products", max_products), ("max_seconds", max_seconds)]:
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        self.rtol, self.max_products, self.max_seconds = rtol, max_products, max_seconds
        self._start = time.monotonic()

    def met(self, samples: np.ndarray) -> bool:
        """Whether the relative error asked for is reached (true if none was)."""
        return self.rtol is None or bool(_stderr(samples) <= self.rtol * abs(samples.mean()))

    def next_round(self, samples: np.ndarray) -> int:
        done = len(samples)
        if done == 0:
            return min(PILOT, self.max_products)
        wanted = self.max_products - done
        if self.rtol is not None:
            if self.met(samples):
                return 0
            needed = (_stderr(samples) / (self.rtol * max(abs(samples.mean()), 1e-300))) ** 2 * done
            # At most double: the pilot's variance is itself uncertain.
            wanted = min(wanted, done, max(math.ceil(min(needed, 1e9)) - done, 2))
        else:
            wanted = min(wanted, max(done, PILOT))
        if self.max_seconds is not None:
            used = time.monotonic() - self._start
            wanted = min(wanted, int((self.max_seconds - used) / (used / done)))
        return max(wanted, 0)


def _result(objective: Objective, samples: np.ndarray, budget: _Budget, seed: int) -> TraceResult:
    totals = samples.sum(1)
    layers = np.array(objective.layers)
    per_layer = {
        name: Estimate(value=float(part.mean()), stderr=_stderr(part))
        for name in dict.fromkeys(objective.layers)
        for part in [samples[:, layers == name].sum(1)]
    }
    return TraceResult(
        value=float(totals.mean()),
        stderr=_stderr(totals),
        method=f"Hutchinson, a fresh Rademacher probe for every batch; {METHOD}",
        num_products=len(totals),
        num_samples=objective.num_samples,
        seed=seed,
        per_layer=per_layer,
        samples=tuple(float(t) for t in totals),
        num_params=objective.num_params,
        converged=budget.met(totals),
    )


def _stderr(samples: np.ndarray) -> float:
    if len(samples) < 2:
        return math.inf
    return float(samples.std(ddof=1) / math.sqrt(len(samples)))
