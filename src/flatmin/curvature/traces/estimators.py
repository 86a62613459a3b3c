"""The ways to a trace, and the choice between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from flatmin.curvature.function.objective import Objective
from flatmin.curvature.per_sample.uses import Uncovered
from flatmin.curvature.products.graph import first_line
from flatmin.curvature.products.operators import HessianOperator, Operator, ResidualOperator
from flatmin.curvature.products.probes import PILOT, Budget, Draw, Probes, VectorProbes, run
from flatmin.curvature.products.ways import NOT_DIFFERENTIABLE, Way, choose_way
from flatmin.curvature.traces.found import Found
from flatmin.curvature.traces.gauss_newton import ClassVectors, Split, exact_trace, split_of
from flatmin.curvature.traces.local import LocalProbes, LocalResidual, why_not
from flatmin.curvature.traces.lowrank import fits, hutch_plus_plus, xtrace

FEW = 16  # class vectors that are all used at once; of more, a random sample is taken first
FEWEST = 12  # products for a subspace and probes of the rest
MANY = 100  # probes left to draw, from which on a subspace is tried


@dataclass
class Pilot:
    """First draws of `probes`; what is known beside them, at a cost of `entry`; how many are still needed.

    `refused` says why there are no local probes.
    """

    probes: Probes
    samples: np.ndarray
    constant: np.ndarray | float = 0.0
    entry: float = 0.0
    left: int = 0
    refused: str = ""

    @property
    def local(self) -> bool:
        """Whether these are local probes."""
        return isinstance(self.probes, LocalProbes)

    @property
    def cost(self) -> float:
        """Gradients of the data for each probe, about."""
        return self.probes.operator.cost

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

    def hutchinson(self) -> Found:
        """Probes of the Hessian until there are enough."""
        return self._finish(self._pilot(self._vectors(HessianOperator)))

    def low_rank(self, method: str) -> Found:
        """Hutch++ or XTrace."""
        if self._budget.max_products < FEWEST:
            raise ValueError(f"{method} needs max_products of at least {FEWEST}, got {self._budget.max_products}.")
        operator = self._operator(HessianOperator)
        found = (hutch_plus_plus if method == "hutch++" else xtrace)(operator, self._budget, self._seed)
        return replace(found, method=f"{found.method}; {operator.method}")

    def split(self, split: Split) -> Found:
        """Tr G, and probes of H - G unless its trace is zero."""
        if split.piecewise_linear:
            return self._exact(split) if split.exact and split.num_vectors <= FEW else self._class_vectors(split)
        if split.exact:
            return self._finish(self._with_constant(self._pilot_of_rest(split), split, spend=False))
        pilot, vectors = self._pilot_of_rest(split), ClassVectors(self._objective, split, self._seed)
        rest = pilot.probes
        pilot.samples = pilot.samples + vectors.draw(0, len(pilot.samples)).cpu().numpy()

        def draw(first: int, size: int) -> torch.Tensor:
            return rest.draw(first, size) + vectors.draw(first, size)

        found = self._finish(pilot, draw)
        found.method = f"Gauss-Newton by random class vectors ({split.reason}); of the rest {found.method}"
        found.num_gradients += len(found.samples) * vectors.cost
        return found

    def auto(self) -> Found:
        """Tr G alone if that is all; else probes of H - G (with tr G exactly) or of H, by the variance of pilots.

        The split goes first if tr G costs no more than a pilot; the other is tried only if much is left to do, and not
        if there are local probes of H - G.
        """
        split, why = self._try_split()
        try:
            if split is not None and split.piecewise_linear:
                return self.split(split)
            if split is not None and split.exact:
                return self._by_variance(split)
        except torch.OutOfMemoryError:
            raise
        except (Uncovered, *NOT_DIFFERENTIABLE) as error:
            why = first_line(error)  # the first batch said otherwise, or the loss bends no further
        found = self._go_on(self._pilot(self._vectors(HessianOperator)))
        found.method += f" (auto: {why or split.reason})"  # type: ignore[union-attr]
        return found

    def _by_variance(self, split: Split) -> Found:
        """Probes of H - G or of H, by what pilots say."""
        cheap = split.cost <= 2 * PILOT
        if cheap:
            first, entry = self._with_constant(self._pilot_of_rest(split), split), 0.0
        else:
            first, entry = self._pilot(self._vectors(HessianOperator)), split.cost
        few = first.left * first.cost < 2 * (entry + PILOT * first.cost)
        if first.local or few:
            found = self._go_on(first)
            why = "and few probes were needed" if few else "and there are local probes"
            found.method += f" (auto: tr G costs {split.cost:.1f} gradients, {why})"
            return found
        second = self._pilot(self._vectors(HessianOperator)) if cheap else self._pilot_of_rest(split)
        ratio = second.variance / first.variance
        needed = max(ratio * (PILOT + first.left) - PILOT, 0)
        change = entry + needed * second.cost < first.left * first.cost
        if change and not cheap:
            second = self._with_constant(second, split)
        chosen, other = (second, first) if change else (first, second)
        self._budget.spend(len(other.samples))
        found = self._go_on(chosen)
        found.num_products += len(other.samples)
        found.num_gradients += len(other.samples) * other.cost + (other.entry if change else 0)
        ratio = 1 / ratio if cheap else ratio
        found.method += f" (auto: in a pilot, probes of H - G had {ratio:.2g} times the variance of probes of H)"
        return found

    def _pilot(self, probes: Probes) -> Pilot:
        """The first draws."""
        size = min(PILOT, self._budget.max_products)
        pilot = Pilot(probes, probes.draw(0, size).cpu().numpy())
        pilot.left = self._budget.left(pilot.samples.sum(1))
        return pilot

    def _pilot_of_rest(self, split: Split) -> Pilot:
        """The first draws of H - G: of local probes where they can be had."""
        refused = why_not(self._objective, self._way, split.layouts, self._seed)
        if not refused:
            rest = LocalResidual(self._objective, self._way, split.layouts, graph_memory=self._graph_memory)
            try:
                return self._pilot(LocalProbes(rest, self._seed))
            except Uncovered as error:  # another batch is computed otherwise
                refused = str(error)
        pilot = self._pilot(self._vectors(ResidualOperator))
        pilot.refused = refused
        return pilot

    def _with_constant(self, pilot: Pilot, split: Split, spend: bool = True) -> Pilot:
        """With tr G, whose cost is taken out of the budget if there was a choice."""
        pilot.constant, pilot.entry = exact_trace(self._objective, split).cpu().numpy(), split.cost
        if spend:
            self._budget.spend(math.ceil(split.cost / pilot.cost))
        pilot.left = self._budget.left(pilot.samples.sum(1), pilot.known)
        return pilot

    def _go_on(self, pilot: Pilot) -> Found:
        """More probes; where many would be needed, of what a subspace leaves over, if that halves their variance."""
        operator, samples = pilot.probes.operator, pilot.samples
        wasted = Found(method="")
        if isinstance(operator, Operator) and pilot.left > MANY and fits(operator, self._graph_memory):
            self._budget.spend(len(samples))
            found = hutch_plus_plus(operator, self._budget, self._seed, known=pilot.known, variance=pilot.variance)
            if len(found.samples):
                return replace(
                    found,
                    method=f"{found.method}; {_of(pilot)}",
                    constant=pilot.constant + found.constant,
                    num_products=found.num_products + len(samples),
                    num_gradients=found.num_gradients + len(samples) * operator.cost + pilot.entry,
                )
            wasted = found
            self._budget.max_products += len(samples)  # the pilot's, which run() counts again
        found = self._finish(pilot)
        found.num_products += wasted.num_products
        found.num_gradients += wasted.num_gradients
        return found

    def _finish(self, pilot: Pilot, draw: Draw | None = None) -> Found:
        """Probes until there are enough."""
        samples = run(draw or pilot.probes.draw, self._budget, pilot.samples, pilot.known)
        return Found(
            method=f"{pilot.probes.text}; {_of(pilot)}",
            constant=pilot.constant,
            samples=samples,
            num_products=len(samples),
            num_gradients=len(samples) * pilot.cost + pilot.entry,
        )

    def _try_split(self) -> tuple[Split | None, str]:
        """What the split can do here, or `None` and why not."""
        if self._objective.group is not None:
            return None, "over several processes"
        try:
            return split_of(self._objective, seed=self._seed), ""
        except torch.OutOfMemoryError:
            raise
        except (ValueError, *NOT_DIFFERENTIABLE) as error:
            return None, f"no Gauss-Newton: {first_line(error)}"

    def _exact(self, split: Split) -> Found:
        """Tr G, which is all."""
        return Found(
            method=f"Gauss-Newton exact ({split.num_vectors} backward passes, per-sample norms); {_equal(split)}",
            constant=exact_trace(self._objective, split).cpu().numpy(),
            num_gradients=split.cost,
        )

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

    @cached_property
    def _way(self) -> Way:
        return choose_way(self._objective, self._products, seed=self._seed)

    def _vectors(self, kind: type[HessianOperator] | type[ResidualOperator]) -> VectorProbes:
        return VectorProbes(self._operator(kind), self._seed)

    def _operator(self, kind: type[HessianOperator] | type[ResidualOperator]) -> Operator:
        return kind(self._objective, self._way, graph_memory=self._graph_memory)


def _of(pilot: Pilot) -> str:
    """What the probes are of."""
    method = pilot.probes.operator.method + (f" (no local probes: {pilot.refused})" if pilot.refused else "")
    return f"Gauss-Newton exact; of the rest {method}" if pilot.entry else method


def _equal(split: Split) -> str:
    return (
        "equal to the Hessian's: the outputs are piecewise linear in every parameter (by the recorded operations; "
        f"verified for {', '.join(split.checked)})"
    )
