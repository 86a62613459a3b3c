"""The trace of the Hessian, in all and per layer, with its error: exactly where possible, else from random probes.

    "hutchinson"     the mean of v' H v over random signs v
    "gauss-newton"   tr H = tr G + tr (H - G): the first exactly or by random class vectors, the second by probes; by
                     local probes, fresh for every sample, where every parameter enters one operation
    "hutch++"        exactly on a subspace found by products, probes on the rest
    "xtrace"         the same, with every vector used for both in turn
    "auto"           tr G alone where H - G has no trace; else the split if there are local probes and tr G is cheap;
                     else Hutchinson or the split, by the variance of pilot probes

Per layer: v' H v = sum over layers of v_l' (H v)_l, and the mean of each term is the trace of that layer's block.
"""

from __future__ import annotations

import numpy as np

from flatmin.curvature.function.arguments import of_objective
from flatmin.curvature.function.objective import Objective
from flatmin.curvature.per_sample.uses import Uncovered
from flatmin.curvature.products.operators import GRAPH_MEMORY
from flatmin.curvature.products.probes import Budget, stderr
from flatmin.curvature.results import Estimate, TraceResult
from flatmin.curvature.traces.estimators import Work
from flatmin.curvature.traces.found import Found
from flatmin.curvature.traces.gauss_newton import Split, split_of

MAX_PRODUCTS = 1000
METHODS = ("auto", "hutchinson", "gauss-newton", "hutch++", "xtrace")


@of_objective
def trace(
    objective: Objective,
    *,
    rtol: float | None = None,
    max_products: int | None = None,
    max_seconds: float | None = None,
    method: str = "auto",
    products: str = "auto",
    graph_memory: int = GRAPH_MEMORY,
    seed: int | None = 0,
) -> TraceResult:
    """The trace of the Hessian of `objective`.

    Stops when the standard error is at most `rtol` times the value, or when `max_products` or `max_seconds` are used
    up, whichever comes first; at least 8 probes are drawn, unless `max_products` is smaller. With none of the three,
    `rtol=0.05`. The error is always reported; it is 0 where the trace is exact.

    Args:
        objective: what to measure.
        rtol: wanted relative standard error (widened for few probes, see `probes.cautious`). For an error of at most 5%
            nine times of ten, ask for 0.03.
        max_products: Hessian-vector products (or local probes) over the whole data, at most (1000 if not given).
        max_seconds: time, at most (checked between rounds of probes).
        method: "auto", "hutchinson", "gauss-newton", "hutch++" or "xtrace". "auto" says in the result why it chose.
        products: how second derivatives are computed: "auto", "autograd", "difference" or "loss".
        graph_memory: bytes that graphs kept between rounds may take.
        seed: of the probes; `None` is really random.

    Returns:
        TraceResult with `value`, `stderr`, `per_layer`, `samples`, `num_products`, `num_gradients`, `method`.

    Cost: Hutchinson: 1 + 2 m gradients of the data for a round of m probes (2 m where graphs are kept). Exact
    Gauss-Newton: (1 + 2 classes) / 3 gradients, where there are few outputs a sample; with many, random combinations of
    them are taken, and a ReLU network's trace has an error, too. Local probes: as Hutchinson's, but fewer are needed;
    and about five gradients of the first batch to try them. Memory: the graph of one batch, and the graphs kept.

    Raises:
        ValueError: unknown method, a budget that is not positive, data that gives another loss on a second pass, a
            Hessian that is not finite, or a method that needs outputs where the model returns its own loss.

    Source: Hutchinson 1990; Avron and Toledo 2011 for the variance 2 (|H|_F^2 - sum_i H_ii^2); Schraudolph 2002 for G;
    Meyer et al. 2021 (Hutch++); Epperly, Tropp and Webber 2024 (XTrace); local probes: `local.py`, with the
    covariance argument of Kingma, Salimans and Welling 2015.
    """
    seed = objective.members.seed(seed)
    if method not in METHODS:
        raise ValueError(f"unknown trace method {method!r}. Known: {', '.join(METHODS)}.")
    if rtol is None and max_products is None and max_seconds is None:
        rtol = 0.05
    budget = Budget(
        rtol, MAX_PRODUCTS if max_products is None else max_products, max_seconds, objective.members.together
    )
    if objective.group is not None and method not in ("auto", "hutchinson"):
        raise ValueError(f"over several processes the trace is estimated by Hutchinson's probes, not by {method!r}.")
    objective.check()
    work = Work(objective, budget, products, graph_memory, seed)
    if method == "hutchinson":
        found = work.hutchinson()
    elif method == "gauss-newton":
        found = _split(work, split_of(objective, seed=seed))
    elif method == "auto":
        found = work.auto()
    else:
        found = work.low_rank(method)
    return _result(objective, found, budget, seed)


def _split(work: Work, split: Split) -> Found:
    try:
        return work.split(split)
    except Uncovered as error:
        error.add_note("Use method='hutchinson', which needs no such thing, or 'auto', which goes over to it.")
        raise


def _result(objective: Objective, found: Found, budget: Budget, seed: int) -> TraceResult:
    totals = found.exact + found.samples.sum(1)
    return TraceResult(
        value=float(totals.mean()) if len(totals) else found.exact,
        stderr=stderr(totals) if len(totals) else 0.0,
        method=found.method,
        num_products=found.num_products,
        num_gradients=found.num_gradients,
        num_samples=objective.num_samples,
        seed=seed,
        per_layer=_per_layer(objective, found),
        samples=tuple(float(t) for t in totals),
        num_params=objective.num_params,
        converged=len(totals) == 0 or budget.met(totals),
    )


def _per_layer(objective: Objective, found: Found) -> dict[str, Estimate]:
    """The parts of the layers; none where only the whole was measured (differences of losses)."""
    size = len(objective.params)
    samples = found.samples if len(found.samples) else np.zeros((1, size))
    if samples.shape[1] != size:
        return {}
    constant = np.broadcast_to(found.constant, size)
    layers = np.array(objective.layers)
    parts = {}
    for name in dict.fromkeys(objective.layers):
        part = samples[:, layers == name].sum(1) + constant[layers == name].sum()
        parts[name] = Estimate(value=float(part.mean()), stderr=stderr(part) if len(found.samples) else 0.0)
    return parts
