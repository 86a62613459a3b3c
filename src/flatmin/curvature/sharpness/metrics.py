"""What a ball around the weights is: |A^-1 d| <= rho, for a symmetric matrix A that may depend on the weights.

    euclidean   A = I                              |d| <= rho, as in SAM
    adaptive    A = diag(|w|)                      |d / w| <= rho, as in ASAM with eta = 0
    filter      A = diag(norm of the filter)       the same, with one scale for each filter
    monge       A = (I + g g^T)^(-1/2)             d^T (I + g g^T) d <= rho^2 with the gradient g, as in Monge SAM

`adaptive` does not change when any unit of a ReLU network is scaled up and what reads it is scaled down; `filter` when
whole layers are. `euclidean` and `monge` do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

from flatmin.curvature.function.objective import Objective
from flatmin.noise import filter_norms, times_norms
from flatmin.vectors import Vector

Metric = Literal["euclidean", "adaptive", "filter", "monge"]
ToWeights = Callable[[Vector], Vector]  # A: from the unit ball's coordinates to parameter space


def ball(objective: Objective, metric: Metric, gradient: Callable[[], Vector]) -> ToWeights:
    """The map A of a metric, at the weights as they are.

    Args:
        objective: whose parameters.
        metric: by name.
        gradient: of the loss at the weights; called for "monge" only.

    Raises:
        ValueError: for an unknown metric.
    """
    if metric not in get_args(Metric):
        raise ValueError(f"unknown metric {metric!r}. Known: {', '.join(get_args(Metric))}.")
    if metric == "euclidean":
        return lambda e: e
    if metric == "monge":
        return _monge(gradient())
    params = objective.params
    if metric == "filter":
        norms = filter_norms(params)
        return lambda e: times_norms(e, norms)
    return Vector(w.detach().abs() for w in params).times


def _monge(g: Vector) -> ToWeights:
    n = float(g.norm())
    # (I + g g^T)^(-1/2) = I - share g g^T / n^2: only the direction of the gradient is shortened, by sqrt(1 + n^2).
    share = (1 - 1 / math.sqrt(1 + n**2)) / n**2 if n > 0 else 0.0
    return lambda e: e - g * (share * float(g.dot(e)))
