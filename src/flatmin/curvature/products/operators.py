"""Symmetric matrices over parameter space, as maps v -> A v over the whole data.

    HessianOperator       H = second derivative of L
    ResidualOperator      H - G = 1/N sum_i sum_k (d loss_i / d f_ik) (second derivative of output f_ik)

G = 1/N sum_i J_i' A_i J_i is the Gauss-Newton matrix, with J_i the outputs by the parameters and A_i the loss by the
outputs, twice; it and the Fisher matrix are in `flatmin.curvature.products.factored`. All have one face: `product(v)`,
`objective`, `num_params`, `cost` (gradients of the data per product) and `method` (what is computed). Batches are
weighted by their samples. The graphs of all batches are kept between products if they fit into `graph_memory` bytes
(estimated from the first batch), which saves a third of the work; they are built anew when the weights have changed.
Memory is else that of one batch's graph, whatever the number of batches. A product goes through all kept graphs at
once: on small networks that takes a quarter less time than batch by batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, TypeVar, cast

from torch import Tensor

from flatmin.curvature.function.arguments import check_vector, of_objective
from flatmin.curvature.function.batches import Batch
from flatmin.curvature.function.objective import Objective
from flatmin.curvature.products.outputs import OutputLoss, output_tensor
from flatmin.curvature.products.seen import seen
from flatmin.curvature.products.space import filled
from flatmin.curvature.products.ways import BatchHessian, Way, check_finite, choose_way
from flatmin.place import num_displaced
from flatmin.vectors import Vector

GRAPH_MEMORY = 2**31


class BatchOperator(Protocol):
    """An operator of one batch."""

    def product(self, v: Sequence[Tensor], *, last: bool = False) -> tuple[Tensor, ...]:
        """A v, one tensor per parameter. After the `last` product nothing more can be asked."""
        ...

    def forms(self, v: Sequence[Tensor]) -> Tensor:
        """v_p' (A v)_p for each parameter p, float64."""
        ...


class Recorded(BatchOperator, Protocol):
    """An operator of one batch that has a graph."""

    @staticmethod
    def sum(parts: Sequence[Any], vectors: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """sum_b A_b v_b, one tensor per parameter, for one pass through all graphs."""
        ...


Curvature = TypeVar("Curvature")


class PerBatch(ABC, Generic[Curvature]):
    """Something of the curvature of each batch, kept between calls if it fits.

    Args:
        objective: what to measure.
        products: how second derivatives are computed: "auto", "autograd", "difference" or "loss" (see `ways`), or
            a `Way` that was found before.
        graph_memory: bytes that kept graphs may take; 0 keeps none.
        seed: of whatever is drawn; `None` is really random.

    Raises:
        ValueError: an unknown or impossible way, or a product that is not finite.
    """

    name = ""
    as_recorded = True  # whether graphs have to consist of torch's own operations

    @of_objective
    def __init__(
        self,
        objective: Objective,
        products: str | Way = "auto",
        *,
        graph_memory: int = GRAPH_MEMORY,
        seed: int | None = 0,
    ):
        seed = objective.members.seed(seed)
        self.objective = objective
        self.way = products if isinstance(products, Way) else choose_way(objective, products, seed=seed)
        self.seed = seed
        self._graph_bytes = int(self.way.graph_bytes * objective.num_samples)
        self._keeps = self.way.name == "autograd" and self._graph_bytes <= graph_memory
        self._kept: list[tuple[Curvature, Batch]] = []
        self._made_of: tuple[Any, ...] = ()

    @property
    def num_params(self) -> int:
        """The size of the matrix."""
        return self.objective.num_params

    @property
    def cost(self) -> float:
        """Gradients of the data per product, about (after the first, where graphs are kept)."""
        return 3.0 if self.way.name == "autograd" and not self._keeps else 2.0

    @property
    def method(self) -> str:
        """What is computed, and how."""
        graphs = f", graphs kept ({self._graph_bytes / 2**20:.3g} MiB)" if self._keeps else ""
        return f"{self.name}; {self.way.text}{graphs}"

    def batches(self) -> Iterator[tuple[Curvature, Batch]]:
        """The curvature of each batch, and the batch. Whoever iterates deletes it before asking for the next."""
        with self._context():
            if self._current():
                yield from self._kept  # inside too: checkpointing evaluates the model again
                return
            self._kept, made_of = [], self._seen()
            kept = []
            for index, batch in enumerate(self.objective.batches()):
                item = [(self._open(batch, self.objective.members.number(index)), batch)]
                if self._keeps:
                    kept += item
                yield item.pop()
        self._kept, self._made_of = kept, made_of

    def _context(self) -> AbstractContextManager[None]:
        return self.way.context(self.objective, as_recorded=self.as_recorded)

    def _current(self) -> bool:
        """Whether there are graphs of the weights as they are."""
        return bool(self._kept) and self._made_of == self._seen()

    def _seen(self) -> tuple[Any, ...]:
        if not self._keeps:
            return ()
        model = self.objective.model
        # A graph built while the weights were away has versions that count again.
        return seen([*self.objective.params, *model.parameters(), *model.buffers()]), num_displaced()

    def release(self) -> None:
        """Lets go of the graphs that are kept."""
        self._kept = []

    @abstractmethod
    def _open(self, batch: Batch, index: int) -> Curvature: ...


class Operator(PerBatch[BatchOperator]):
    """A symmetric matrix over the parameters of an objective, as a map v -> A v. Arguments are those of `PerBatch`.

    Cost: `cost` gradients of the data for a product. Memory: the graph of one batch, and the graphs kept.
    """

    def product(self, v: Vector) -> Vector:
        """A v, a Vector with an entry for each of `objective.params`, in its shape; so is `v`, in which `None` is zero.

        Raises:
            ValueError: if `v` is no such Vector, or the product is not finite.
        """
        check_vector("v", v, self.objective.params)
        full = filled(v, self.objective.params)
        total, count = self._through_kept(full) if self._current() else self._one_by_one(full)
        product = self.objective.mean(total, count)
        check_finite(product.present, self.objective)
        return product

    def _one_by_one(self, v: list[Tensor]) -> tuple[Vector, int]:
        """The sum over samples of A v, and their number."""
        total, count = self.objective.zeros(), 0
        for curvature, batch in self.batches():
            part = curvature.product(v, last=not self._keeps)
            total, count = total.add_(Vector(part), float(batch.size)), count + batch.size
            del curvature, part
        return total, count

    def _through_kept(self, v: list[Tensor]) -> tuple[Vector, int]:
        """The same, from graphs that are there."""
        parts = cast(list[Recorded], [part for part, _ in self._kept])
        sizes = [batch.size for _, batch in self._kept]
        unit = sizes[0]  # so that v need not be multiplied, where all have this size
        weighted = {n: v if n == unit else [t * (n / unit) for t in v] for n in set(sizes)}
        with self._context():
            found = type(parts[0]).sum(parts, [weighted[n] for n in sizes])
        return Vector(found) * float(unit), sum(sizes)

    def gradient(self) -> Vector:
        """The gradient of the objective, wherever the operator comes by it most cheaply."""
        return self.objective.gradient()


class HessianOperator(Operator):
    """The Hessian of the objective, H = d2 L / d w2.

    Args:
        objective: what to measure.
        products: how second derivatives are computed: "auto", "autograd", "difference" or "loss" (see `ways`).
        graph_memory: bytes that kept graphs may take; 0 keeps none.
        seed: of the vector that the first product is checked with; `None` is really random.

    Cost: about two gradients of the data for a product where graphs are kept, else about three; two for differences of
    gradients. Memory: the graph of one batch, and the graphs kept.

    Raises:
        ValueError: a model in place of the Objective, an unknown or impossible way, or a product that is not finite.

    Source: Pearlmutter 1994 for products by a second differentiation.

    Example:
        operator = HessianOperator(objective)
        operator.product(v), operator.cost, operator.method
    """

    name = "Hessian"
    as_recorded = False

    def _open(self, batch: Batch, index: int) -> BatchOperator:
        return self.way.curvature(lambda: batch.evaluate().loss, self.objective.params)

    def gradient(self) -> Vector:
        """The gradient of the objective: where graphs will be kept, while they are built and at no cost but theirs."""
        if not self._keeps or self._current() or self.objective.group is not None:  # others of it may keep none
            return self.objective.gradient()
        total, count = self.objective.zeros(), 0
        for curvature, batch in self.batches():
            assert isinstance(curvature, BatchHessian)
            total, count = total.add_(Vector(curvature.take_gradient()), float(batch.size)), count + batch.size
            del curvature
        return self.objective.mean(total, count)


class ResidualOperator(Operator):
    """H - G, the Hessian without its Gauss-Newton part: that of the outputs, weighted with the loss's slope in them.

    It is the Hessian of w -> <c, f(w)> with c = d loss / d outputs held constant, so a product costs what one with the
    Hessian does.
    """

    name = "Hessian - Gauss-Newton"
    as_recorded = False

    def _open(self, batch: Batch, index: int) -> BatchOperator:
        first = [OutputLoss.of(self.objective, batch)]
        slope = first[0].slope.detach()  # at the weights as they are, also where a difference displaces them

        def scalar() -> Tensor:
            outputs = first.pop().outputs if first else output_tensor(batch.evaluate().outputs)
            return (outputs * slope).sum()

        if self.way.name != "autograd":
            first.clear()
        return self.way.curvature(scalar, self.objective.params)
