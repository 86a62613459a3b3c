"""Symmetric matrices that are products: J' B J, with J the outputs by the parameters and B acting within the outputs.

GaussNewtonOperator   G = 1/N sum_i J_i' A_i J_i         A_i: loss by outputs, twice
FisherOperator        F = 1/N sum_i g_i g_i'             g_i: gradient of a sample's loss; "mc": for a drawn target
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from flatmin.checks import check_choice
from flatmin.curvature.function.arguments import of_objective
from flatmin.curvature.function.batches import Batch
from flatmin.curvature.function.objective import Objective
from flatmin.curvature.products.differences import dots
from flatmin.curvature.products.operators import GRAPH_MEMORY, BatchOperator, Operator
from flatmin.curvature.products.outputs import OutputLoss
from flatmin.curvature.products.pairing import Pairing
from flatmin.curvature.products.ways import derivative
from flatmin.noise import mix_seeds

NO_ROWS = (
    "the empirical Fisher matrix needs a row of outputs for each sample, and the outputs of {size} samples have the "
    "shape {shape}. Let forward= return them batch first."
)


class _Factored(Operator):
    """sum_i J_i' B_i J_i, with B_i over the outputs of a sample."""

    @of_objective
    def __init__(self, objective: Objective, *, graph_memory: int = GRAPH_MEMORY, seed: int | None = 0):
        super().__init__(objective, "autograd", graph_memory=graph_memory, seed=seed)

    def _open(self, batch: Batch, index: int) -> BatchOperator:
        loss = OutputLoss.of(self.objective, batch)
        return BatchFactored(loss.outputs, self.objective.params, self._middle(loss, index))

    @abstractmethod
    def _middle(self, loss: OutputLoss, index: int) -> Callable[[Tensor], Tensor]: ...


class GaussNewtonOperator(_Factored):
    """The generalised Gauss-Newton matrix: J' (d2 loss / d outputs2) J. Needs a criterion and one tensor of outputs.

    Args:
        objective: what to measure.
        graph_memory: bytes that kept graphs may take; 0 keeps none.
        seed: of the vector that double backward is tried with; `None` is really random.

    Cost: two gradients of the data for the graphs, about two for a product. Memory: the graph of one batch, and those
    kept.

    Raises:
        ValueError: for a model that returns its own loss, outputs that are not one tensor, a criterion that uses the
            parameters themselves, or a model that FSDP2 shards.

    Source: Schraudolph 2002.
    """

    name = "Gauss-Newton"

    def _middle(self, loss: OutputLoss, index: int) -> Callable[[Tensor], Tensor]:
        return loss.curvature


class FisherOperator(_Factored):
    """The Fisher information as a mean of g g' over the samples.

    Args:
        objective: what to measure; needs a criterion and one tensor of outputs.
        kind: "mc": g for a target drawn from the model's own distribution (one draw per sample, fixed by `seed` for
            data in a fixed order), whose expectation is the Gauss-Newton matrix. "empirical": g for the targets given,
            which is another matrix (Kunstner et al. 2019).
        graph_memory: bytes that kept graphs may take.
        seed: of the draws; `None` is really random.

    Cost: two gradients of the data for the graphs, about two for a product. Memory: the graph of one batch, and those
    kept.

    Raises:
        ValueError: an unknown kind; "empirical" for outputs without a row for each sample; "mc" for a loss that is no
            likelihood that is known here (softmax cross-entropy, or a loss whose second derivative is diagonal in the
            outputs: squared error, logistic), or that is linear in the outputs, such as `NLLLoss` of log-probabilities.

    Source: Amari 1998; Martens 2020 for why the expectation of "mc" is the Gauss-Newton matrix; Kunstner, Hennig,
    Balles 2019 for what "empirical" is not.
    """

    @of_objective
    def __init__(
        self,
        objective: Objective,
        kind: Literal["mc", "empirical"] = "mc",
        *,
        graph_memory: int = GRAPH_MEMORY,
        seed: int | None = 0,
    ):
        check_choice("kind", kind, ("mc", "empirical"))
        self.kind = kind
        self.name = f"Fisher ({kind})"
        super().__init__(objective, graph_memory=graph_memory, seed=seed)

    def _middle(self, loss: OutputLoss, index: int) -> Callable[[Tensor], Tensor]:
        if self.kind == "empirical":
            if not loss.rows:
                raise ValueError(NO_ROWS.format(shape=tuple(loss.outputs.shape), size=loss.size))
            scores = loss.slope.detach() * math.sqrt(loss.size)  # the slope of a mean loss: 1/N once, not twice
        else:
            generator = torch.Generator(loss.outputs.device).manual_seed(mix_seeds(self.seed, index))
            scores = loss.draw_scores(generator)
        rows = scores.reshape(loss.size, -1)

        def middle(u: Tensor) -> Tensor:
            along = (rows * u.reshape(loss.size, -1)).sum(1, keepdim=True)
            return (rows * along).view_as(u)

        return middle


class BatchFactored:
    """J' B J of one batch. J v is the derivative of u -> J' u in the direction v: two backward passes, no forward mode.

    Cost: two gradients to build, about two per product.
    """

    def __init__(self, outputs: Tensor, params: Sequence[Tensor], middle: Callable[[Tensor], Tensor]):
        self._outputs, self._params, self._middle = outputs, params, middle
        self._dual = torch.zeros_like(outputs, requires_grad=True)
        options = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
        grads = torch.autograd.grad(outputs, params, grad_outputs=self._dual, **options)
        self._used = [i for i, g in enumerate(grads) if g.requires_grad]
        self._pairing = Pairing([grads[i] for i in self._used]) if self._used else None

    def product(self, v: Sequence[Tensor], *, last: bool = False) -> tuple[Tensor, ...]:
        """J' B J v, one tensor per parameter. After the `last` product the graph is gone."""
        return BatchFactored.sum([self], [v], last=last)

    @staticmethod
    def sum(
        parts: Sequence[BatchFactored], vectors: Sequence[Sequence[Tensor]], *, last: bool = False
    ) -> tuple[Tensor, ...]:
        """sum_b J_b' B_b J_b v_b, one tensor per parameter, for two passes through all graphs."""
        params = parts[0]._params
        used = [(part, v) for part, v in zip(parts, vectors, strict=True) if part._used]
        if not used:
            return tuple(torch.zeros_like(p) for p in params)
        parts = [part for part, _ in used]
        changes = BatchFactored._pushed(parts, [v for _, v in used])
        back = [part._middle(change) for part, change in zip(parts, changes, strict=True)]
        return derivative([part._outputs for part in parts], params, back, last=last)

    @staticmethod
    def _pushed(parts: Sequence[BatchFactored], vectors: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """J_b v_b for each part, of the shape of its outputs."""
        pairings = [part._pairing for part in parts if part._pairing is not None]
        numbers = [
            pairing.along([v[i] for i in part._used]) for part, pairing, v in zip(parts, pairings, vectors, strict=True)
        ]
        try:
            return torch.autograd.grad(numbers, [part._dual for part in parts], retain_graph=True)
        finally:
            for pairing in pairings:
                pairing.forget()

    def forms(self, v: Sequence[Tensor]) -> Tensor:
        """v_p' (J' B J v)_p for each parameter p, float64."""
        return dots(v, self.product(v))
