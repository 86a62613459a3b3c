"""The trace of the Hessian, in all and per layer, with its error: exactly where possible, else from random probes.

    "hutchinson"     the mean of v' H v over random signs v
    "gauss-newton"   tr H = tr G + tr (H - G): the first exactly or by random class vectors, the second by probes
    "hutch++"        exactly on a subspace found by products, probes on the rest
    "xtrace"         the same, with every vector used for both in turn
    "auto"           tr G alone where H - G has no trace; else Hutchinson or the split, by the variance of pilot probes

Per layer: v' H v = sum over layers of v_l' (H v)_l, and the mean of each term is the trace of that layer's block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from flatmin.curvature.gauss_newton import ClassVectors, Split, exact_trace, inspect
from flatmin.curvature.lowrank import fits, hutch_plus_plus, xtrace
from flatmin.curvature.objective import Objective
from flatmin.curvature.operators import GRAPH_MEMORY, HessianOperator, Operator, ResidualOperator
from flatmin.curvature.probes import PILOT, Budget, Probes, run, stderr
from flatmin.curvature.products import NOT_DIFFERENTIABLE, Way, choose_way
from flatmin.curvature.results import Estimate, TraceResult

MAX_PRODUCTS = 1000
METHODS = ("auto", "hutchinson", "gauss-newton", "hutch++", "xtrace")
FEW = 16  # class vectors that are all used at once; of more, a random sample is taken first
MANY = 100  # probes left to draw, from which on a subspace is tried


def trace(
    objective: Objective,
    *,
    rtol: float | None = None,
    max_products: int | None = None,
    max_seconds: float | None = None,
    method: str = "auto",
    products: str = "auto",
    graph_memory: int = GRAPH_MEMORY,
    seed: int = 0,
) -> TraceResult:
    """The trace of the Hessian of `objective`.

    Stops when the standard error is at most `rtol` times the value, or when `max_products` or `max_seconds` are used
    up, whichever comes first; at least 8 probes are drawn, unless `max_products` is smaller. With none of the three,
    `rtol=0.05`. The error is always reported; it is 0 where the trace is exact.

    Args:
        objective: what to measure.
        rtol: wanted relative standard error (widened for few probes, see `probes.cautious`). For an error of at most 5%
            nine times of ten, ask for 0.03.
        max_products: Hessian-vector products over the whole data, at most (1000 if not given).
        max_seconds: time, at most (checked between rounds of probes).
        method: "auto", "hutchinson", "gauss-newton", "hutch++" or "xtrace". "auto" says in the result why it chose.
        products: how second derivatives are computed: "auto", "autograd", "difference" or "loss".
        graph_memory: bytes that graphs kept between rounds may take.
        seed: of the probes.

    Returns:
        TraceResult with `value`, `stderr`, `per_layer`, `samples`, `num_products`, `num_gradients`, `method`.

    Cost: Hutchinson: 1 + 2 m gradients of the data for a round of m probes (2 m where graphs are kept). Exact
    Gauss-Newton: (1 + 2 (classes - 1)) / 3 gradients. Memory: the graph of one batch, and the graphs kept.

    Raises:
        ValueError: unknown method, a budget that is not positive, data that gives another loss on a second pass, a
            Hessian that is not finite, or a method that needs outputs where the model returns its own loss.

    Source: Hutchinson 1990; Avron and Toledo 2011 for the variance 2 (|H|_F^2 - sum_i H_ii^2); Schraudolph 2002 for G;
    Meyer et al. 2021 (Hutch++); Epperly, Tropp and Webber 2024 (XTrace).
    """
    if method not in METHODS:
        raise ValueError(f"unknown trace method {method!r}. Known: {', '.join(METHODS)}.")
    if rtol is None and max_products is None and max_seconds is None:
        rtol = 0.05
    budget = Budget(rtol, MAX_PRODUCTS if max_products is None else max_products, max_seconds, objective.together)
    if objective.group is not None and method not in ("auto", "hutchinson"):
        raise ValueError(f"over several processes the trace is estimated by Hutchinson's probes, not by {method!r}.")
    objective.check()
    work = _Work(objective, budget, products, graph_memory, seed)
    if method == "hutchinson":
        found = work.hutchinson()
    elif method == "gauss-newton":
        found = work.split(inspect(objective, seed=seed))
    elif method == "auto":
        found = work.auto()
    else:
        found = work.low_rank(method)
    return _result(objective, found, budget, seed)


@dataclass
class _Found:
    """A trace: `constant`, known exactly for each parameter, and the mean of `samples` (probes, parameters)."""

    method: str
    constant: np.ndarray | float = 0.0
    samples: np.ndarray = field(default_factory=lambda: np.empty((0, 1)))
    num_products: int = 0
    num_gradients: float = 0.0

    @property
    def exact(self) -> float:
        """The part of the value that has no error."""
        return float(np.sum(self.constant))


class _Work:
    """The methods, for one objective and one budget."""

    def __init__(self, objective: Objective, budget: Budget, products: str, graph_memory: int, seed: int):
        self._objective, self._budget, self._seed = objective, budget, seed
        self._products, self._graph_memory = products, graph_memory
        self._way: Way | None = None

    def hutchinson(self) -> _Found:
        """Probes of the Hessian until there are enough."""
        operator = self._operator(HessianOperator)
        samples = run(Probes(operator, self._seed).draw, self._budget)
        return self._of_probes(operator, samples)

    def low_rank(self, method: str) -> _Found:
        """Hutch++ or XTrace."""
        operator = self._operator(HessianOperator)
        found = (hutch_plus_plus if method == "hutch++" else xtrace)(operator, self._budget, self._seed)
        return _Found(
            method=f"{found.method}; {operator.method}",
            constant=found.constant,
            samples=found.samples,
            num_products=found.num_products,
            num_gradients=found.num_products * operator.cost,
        )

    def split(self, split: Split) -> _Found:
        """Tr G, and probes of H - G unless its trace is zero."""
        if split.piecewise_linear and not (split.exact and split.num_vectors <= FEW):
            return self._class_vectors(split)
        if split.exact:
            return self._exact(split)
        operator = self._operator(ResidualOperator)
        rest, vectors = Probes(operator, self._seed), ClassVectors(self._objective, split, self._seed)
        samples = run(lambda first, size: rest.draw(first, size) + vectors.draw(first, size), self._budget)
        found = self._of_probes(operator, samples)
        found.method = (
            f"Gauss-Newton by random class vectors ({split.reason}) and probes of the rest; {operator.method}"
        )
        found.num_gradients += len(samples) * vectors.cost
        return found

    def auto(self) -> _Found:
        """Tr G alone if that is all; else a pilot of Hutchinson's probes, and another way if it is cheaper."""
        split, why = self._inspect()
        if split is not None and split.piecewise_linear:
            return self.split(split)
        operator = self._operator(HessianOperator)
        pilot = Probes(operator, self._seed).draw(0, min(PILOT, self._budget.max_products)).cpu().numpy()
        left = self._budget.left(pilot.sum(1))
        if split is not None and split.exact and split.cost + PILOT * operator.cost < left * operator.cost / 2:
            return self._compare(split, operator, pilot, left)
        found = self._go_on(operator, pilot)
        found.method += f" (auto: {why or 'an exact tr G would cost more than the probes that it could save'})"
        return found

    def _compare(self, split: Split, operator: Operator, pilot: np.ndarray, left: int) -> _Found:
        """Goes on with Hutchinson, or with the split, whichever needs less for the error that `left` probes would give.

        The split's pilot is a part of its cost, and its probes are used if it is chosen.
        """
        rest = self._operator(ResidualOperator)
        other = Probes(rest, self._seed).draw(0, PILOT).cpu().numpy()
        ratio = float(other.sum(1).var(ddof=1) / pilot.sum(1).var(ddof=1))
        needed = max(ratio * (len(pilot) + left) - PILOT, 0)
        text = f"in a pilot, probes of H - G had {ratio:.2g} times the variance of probes of H"
        if split.cost + needed * rest.cost > left * operator.cost:
            self._budget.spend(PILOT)
            found = self._go_on(operator, pilot)
            found.num_products += PILOT
            found.num_gradients += PILOT * rest.cost
            found.method += f" (auto: {text}: not worth an exact tr G)"
            return found
        self._budget.spend(len(pilot) + math.ceil(split.cost / operator.cost))
        constant = exact_trace(self._objective, split).cpu().numpy()
        found = self._go_on(rest, other, constant)
        found.method = f"Gauss-Newton exact, and of the rest: {found.method} (auto: {text})"
        found.num_products += len(pilot)
        found.num_gradients += split.cost + len(pilot) * operator.cost
        return found

    def _go_on(self, operator: Operator, samples: np.ndarray, constant: np.ndarray | float = 0.0) -> _Found:
        """More probes; where many would be needed, of what a subspace leaves over, if that halves their variance."""
        known, wasted = float(np.sum(constant)), 0
        left = self._budget.left(samples.sum(1), known)
        if left > MANY and fits(operator, self._graph_memory):
            self._budget.spend(len(samples))
            variance = float(samples.sum(1).var(ddof=1))
            found = hutch_plus_plus(operator, self._budget, self._seed, known=known, variance=variance)
            if len(found.samples):
                products = found.num_products + len(samples)
                return _Found(
                    method=f"{found.method}; {operator.method}",
                    constant=constant + found.constant,
                    samples=found.samples,
                    num_products=products,
                    num_gradients=products * operator.cost,
                )
            self._budget.max_products += len(samples) - PILOT
            wasted = found.num_products
        samples = run(Probes(operator, self._seed).draw, self._budget, samples, known)
        result = self._of_probes(operator, samples, wasted)
        result.constant = constant
        return result

    def _inspect(self) -> tuple[Split | None, str]:
        """What the split can do here, or `None` and why not."""
        if self._objective.group is not None:
            return None, "over several processes"
        try:
            return inspect(self._objective, seed=self._seed), ""
        except torch.OutOfMemoryError:
            raise
        except (ValueError, *NOT_DIFFERENTIABLE) as error:
            return None, f"no Gauss-Newton: {str(error).splitlines()[0][:100]}"

    def _exact(self, split: Split) -> _Found:
        """Tr G exactly, and the rest by probes if there is any."""
        constant = exact_trace(self._objective, split).cpu().numpy()
        text = f"Gauss-Newton exact ({split.num_vectors} backward passes, per-sample norms)"
        if split.piecewise_linear:
            return _Found(method=f"{text}; {_equal(split)}", constant=constant, num_gradients=split.cost)
        operator = self._operator(ResidualOperator)
        samples = run(Probes(operator, self._seed).draw, self._budget, constant=float(constant.sum()))
        found = self._of_probes(operator, samples)
        found.constant, found.method = constant, f"{text}, and probes of the rest; {operator.method}"
        found.num_gradients += split.cost
        return found

    def _class_vectors(self, split: Split) -> _Found:
        """Tr G by random class vectors; exactly, if that turns out to be cheaper."""
        vectors = ClassVectors(self._objective, split, self._seed)
        pilot = vectors.draw(0, min(PILOT, self._budget.max_products)).cpu().numpy()
        if split.exact and split.cost < self._budget.left(pilot.sum(1)) * vectors.cost:
            return self._exact(split)
        samples = run(vectors.draw, self._budget, pilot)
        return _Found(
            method=f"Gauss-Newton by random class vectors; {_equal(split)}",
            samples=samples,
            num_gradients=len(samples) * vectors.cost,
        )

    def _of_probes(self, operator: Operator, samples: np.ndarray, wasted: int = 0) -> _Found:
        return _Found(
            method=f"Hutchinson, a fresh Rademacher probe for every batch; {operator.method}",
            samples=samples,
            num_products=len(samples) + wasted,
            num_gradients=(len(samples) + wasted) * operator.cost,
        )

    def _operator(self, kind: type[HessianOperator] | type[ResidualOperator]) -> Operator:
        if self._way is None:
            self._way = choose_way(self._objective, self._products, seed=self._seed)
        return kind(self._objective, self._way, graph_memory=self._graph_memory)


def _equal(split: Split) -> str:
    return (
        "equal to the Hessian's: the outputs are piecewise linear in every parameter (by the recorded operations; "
        f"verified for {', '.join(split.checked)})"
    )


def _result(objective: Objective, found: _Found, budget: Budget, seed: int) -> TraceResult:
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


def _per_layer(objective: Objective, found: _Found) -> dict[str, Estimate]:
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
