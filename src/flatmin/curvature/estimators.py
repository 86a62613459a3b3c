"""The ways to a trace, and the choice between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from flatmin.curvature.gauss_newton import ClassVectors, Split, exact_trace, inspect
from flatmin.curvature.lowrank import fits, hutch_plus_plus, xtrace
from flatmin.curvature.objective import Objective
from flatmin.curvature.operators import HessianOperator, Operator, ResidualOperator
from flatmin.curvature.probes import PILOT, Budget, Probes, run
from flatmin.curvature.products import NOT_DIFFERENTIABLE, Way, choose_way

HUTCHINSON = "Hutchinson, a fresh Rademacher probe for every batch"
FEW = 16  # class vectors that are all used at once; of more, a random sample is taken first
FEWEST = 12  # products for a subspace and probes of the rest
MANY = 100  # probes left to draw, from which on a subspace is tried


@dataclass
class Found:
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


@dataclass
class Pilot:
    """First probes of an operator; what is known beside them, at a cost of `entry`; how many are still needed."""

    operator: Operator
    samples: np.ndarray
    constant: np.ndarray | float = 0.0
    entry: float = 0.0
    left: int = 0

    @property
    def known(self) -> float:
        """The sum of what is known exactly."""
        return float(np.sum(self.constant))

    @property
    def variance(self) -> float:
        """Of a probe."""
        return float(self.samples.sum(1).var(ddof=1))


class Work:
    """The methods, for one objective and one budget."""

    def __init__(self, objective: Objective, budget: Budget, products: str, graph_memory: int, seed: int):
        self._objective, self._budget, self._seed = objective, budget, seed
        self._products, self._graph_memory = products, graph_memory
        self._way: Way | None = None

    def hutchinson(self) -> Found:
        """Probes of the Hessian until there are enough."""
        operator = self._operator(HessianOperator)
        samples = run(Probes(operator, self._seed).draw, self._budget)
        return self._of_probes(operator, samples)

    def low_rank(self, method: str) -> Found:
        """Hutch++ or XTrace."""
        if self._budget.max_products < FEWEST:
            raise ValueError(f"{method} needs max_products of at least {FEWEST}, got {self._budget.max_products}.")
        operator = self._operator(HessianOperator)
        found = (hutch_plus_plus if method == "hutch++" else xtrace)(operator, self._budget, self._seed)
        return Found(
            method=f"{found.method}; {operator.method}",
            constant=found.constant,
            samples=found.samples,
            num_products=found.num_products,
            num_gradients=found.num_products * operator.cost,
        )

    def split(self, split: Split) -> Found:
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

    def auto(self) -> Found:
        """Tr G alone if that is all; else probes of H - G (with tr G exactly) or of H, by the variance of pilots.

        The split goes first if tr G costs no more than a pilot; the other is tried only if much is left to do.
        """
        split, why = self._inspect()
        if split is not None and split.piecewise_linear:
            return self.split(split)
        if split is None or not split.exact:
            found = self._go_on(self._pilot(HessianOperator))
            found.method += f" (auto: {why or split.reason})"  # type: ignore[union-attr]
            return found
        cheap = split.cost <= 2 * PILOT
        first = self._pilot(ResidualOperator, split) if cheap else self._pilot(HessianOperator)
        entry = 0.0 if cheap else split.cost
        if first.left * first.operator.cost < 2 * (entry + PILOT * first.operator.cost):
            found = self._go_on(first)
            found.method += f" (auto: tr G costs {split.cost:.1f} gradients, and few probes were needed)"
            return found
        second = self._pilot(HessianOperator if cheap else ResidualOperator)
        ratio = second.variance / first.variance
        needed = max(ratio * (PILOT + first.left) - PILOT, 0)
        change = entry + needed * second.operator.cost < first.left * first.operator.cost
        if change and not cheap:
            second = self._with_constant(second, split)
        chosen, other = (second, first) if change else (first, second)
        self._budget.spend(len(other.samples))
        found = self._go_on(chosen)
        found.num_products += len(other.samples)
        found.num_gradients += len(other.samples) * other.operator.cost + (other.entry if change else 0)
        ratio = 1 / ratio if cheap else ratio
        found.method += f" (auto: in a pilot, probes of H - G had {ratio:.2g} times the variance of probes of H)"
        return found

    def _pilot(self, kind: type[HessianOperator] | type[ResidualOperator], split: Split | None = None) -> Pilot:
        """The first probes; of H - G with tr G if `split` is given."""
        operator = self._operator(kind)
        size = min(PILOT, self._budget.max_products)
        pilot = Pilot(operator, Probes(operator, self._seed).draw(0, size).cpu().numpy())
        if split is not None:
            return self._with_constant(pilot, split)
        pilot.left = self._budget.left(pilot.samples.sum(1))
        return pilot

    def _with_constant(self, pilot: Pilot, split: Split) -> Pilot:
        pilot.constant, pilot.entry = exact_trace(self._objective, split).cpu().numpy(), split.cost
        self._budget.spend(math.ceil(split.cost / pilot.operator.cost))
        pilot.left = self._budget.left(pilot.samples.sum(1), pilot.known)
        return pilot

    def _go_on(self, pilot: Pilot) -> Found:
        """More probes; where many would be needed, of what a subspace leaves over, if that halves their variance."""
        operator, samples = pilot.operator, pilot.samples
        text = f"Gauss-Newton exact; of the rest {operator.method}" if pilot.entry else operator.method
        wasted = 0
        if pilot.left > MANY and fits(operator, self._graph_memory):
            self._budget.spend(len(samples))
            found = hutch_plus_plus(operator, self._budget, self._seed, known=pilot.known, variance=pilot.variance)
            if len(found.samples):
                products = found.num_products + len(samples)
                return Found(
                    method=f"{found.method}; {text}",
                    constant=pilot.constant + found.constant,
                    samples=found.samples,
                    num_products=products,
                    num_gradients=products * operator.cost + pilot.entry,
                )
            wasted = found.num_products
            self._budget.max_products += len(samples) - PILOT
        samples = run(Probes(operator, self._seed).draw, self._budget, samples, pilot.known)
        result = self._of_probes(operator, samples, wasted)
        result.method, result.constant = f"{HUTCHINSON}; {text}", pilot.constant
        result.num_gradients += pilot.entry
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

    def _exact(self, split: Split) -> Found:
        """Tr G exactly, and the rest by probes if there is any."""
        constant = exact_trace(self._objective, split).cpu().numpy()
        text = f"Gauss-Newton exact ({split.num_vectors} backward passes, per-sample norms)"
        if split.piecewise_linear:
            return Found(method=f"{text}; {_equal(split)}", constant=constant, num_gradients=split.cost)
        operator = self._operator(ResidualOperator)
        samples = run(Probes(operator, self._seed).draw, self._budget, constant=float(constant.sum()))
        found = self._of_probes(operator, samples)
        found.constant, found.method = constant, f"{text}, and probes of the rest; {operator.method}"
        found.num_gradients += split.cost
        return found

    def _class_vectors(self, split: Split) -> Found:
        """Tr G by random class vectors; exactly, if that turns out to be cheaper."""
        vectors = ClassVectors(self._objective, split, self._seed)
        pilot = vectors.draw(0, min(PILOT, self._budget.max_products)).cpu().numpy()
        if split.exact and split.cost < self._budget.left(pilot.sum(1)) * vectors.cost:
            return self._exact(split)
        samples = run(vectors.draw, self._budget, pilot)
        return Found(
            method=f"Gauss-Newton by random class vectors; {_equal(split)}",
            samples=samples,
            num_gradients=len(samples) * vectors.cost,
        )

    def _of_probes(self, operator: Operator, samples: np.ndarray, wasted: int = 0) -> Found:
        return Found(
            method=f"{HUTCHINSON}; {operator.method}",
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
