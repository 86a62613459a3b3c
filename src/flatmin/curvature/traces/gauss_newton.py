"""The trace of the Gauss-Newton matrix, and what is left of the Hessian's.

    H = G + R,    G = 1/N sum_i J_i' A_i J_i,    R = 1/N sum_i sum_k (d loss_i / d f_ik) (second derivative of f_ik)

with A_i = sum_k u_ik u_ik' the second derivative of a sample's loss by the outputs f_i, so that

    tr G = 1/N sum_i sum_k |J_i' u_ik|^2          exactly: one backward pass for each k, and per-sample norms
    tr G = E 1/N sum_i |J_i' a_i|^2               for random a_i with E a_i a_i' = A_i: one backward pass, with an error

Neither needs a second derivative. If the outputs are piecewise linear in every parameter tensor, the others held fixed
(ReLU, max-pool, convolution, batch norm in evaluation mode; no weight used twice in a row), then tr R = 0 and
tr H = tr G. That is read off the recorded operations, not off the names of modules, and verified by products with R.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatmin.curvature.function.objective import Objective
from flatmin.curvature.per_sample.norms import PerSample
from flatmin.curvature.per_sample.uses import Layout, Uncovered
from flatmin.curvature.products.differences import dots
from flatmin.curvature.products.graph import check_not_reentrant, curved
from flatmin.curvature.products.outputs import MAX_OUTPUTS, Kind, OutputLoss
from flatmin.curvature.products.ways import check_finite, derivative, differentiable_twice
from flatmin.noise import draw_like, mix_seeds

CHECKS = 4  # parameter tensors for which R is verified to be zero, at most


@dataclass(frozen=True, kw_only=True)
class Split:
    """What the first batch says about tr H = tr G + tr R.

    Attributes:
        num_vectors: how many u_k there are; 0 if A cannot be written down.
        kind: what A does.
        layouts: for the per-sample norms; `None` if there are none.
        reason: why tr G cannot be had exactly; empty if it can.
        curved: parameters in which the outputs are not (known to be) piecewise linear.
        checked: names of the parameters for which that was verified.
    """

    num_vectors: int
    kind: Kind
    layouts: Sequence[Layout] | None
    reason: str
    curved: tuple[str, ...]
    checked: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether tr G can be had exactly."""
        return not self.reason

    @property
    def piecewise_linear(self) -> bool:
        """Whether tr R = 0."""
        return not self.curved

    @property
    def cost(self) -> float:
        """Gradients of the data for an exact tr G, about."""
        return (1 + 2 * (self.num_vectors + 1)) / 3 if self.exact else math.inf


def split_of(objective: Objective, *, seed: int = 0) -> Split:
    """What can be done for this objective, from its first batch.

    Cost: about one and a half gradients of the first batch, and up to four more if all looks piecewise linear.

    Raises:
        ValueError: if the objective has no criterion, or outputs that are not one tensor.
    """
    with objective.quiet(), torch.enable_grad():
        batch = next(iter(objective.batches()))
        loss = OutputLoss.of(objective, batch)
        check_not_reentrant([loss.outputs])
        bent = curved(loss.outputs, objective.params)
        layouts, reason, number = None, "", 0
        if not loss.rows:
            reason = "the outputs have no row for each sample"
        else:
            try:
                layouts = PerSample(loss.outputs, objective.params).layouts
            except Uncovered as error:
                reason = str(error)
        if not reason:
            factors = loss.factors()
            number = 0 if factors is None else len(factors[0])
            if factors is None:
                reason = f"a sample has more than {MAX_OUTPUTS} outputs, or its loss depends on others"
            del factors
        kind = loss.kind
        del loss  # before the batch is evaluated again: one graph at a time
    names = [objective.names[i] for i in sorted(bent)]
    checked: list[str] = []
    if not bent:
        names, checked = _verify(objective, seed)
    return Split(
        num_vectors=number, kind=kind, layouts=layouts, reason=reason, curved=tuple(names), checked=tuple(checked)
    )


def _verify(objective: Objective, seed: int) -> tuple[list[str], list[str]]:
    """Whether the blocks of R on the diagonal are zero to rounding: those that are not, and all that were tried."""
    generator = torch.Generator("cpu").manual_seed(mix_seeds(seed, 1))
    tried = torch.randperm(len(objective.params), generator=generator, device="cpu")[:CHECKS].tolist()
    params = [objective.params[i] for i in tried]
    with differentiable_twice(objective):
        batch = next(iter(objective.batches()))
        loss = OutputLoss.of(objective, batch)
        scalar = (loss.outputs * loss.slope.detach()).sum()
        options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
        grads = torch.autograd.grad(scalar, params, create_graph=True, **options)
        wrong = []
        for i, p, g in zip(tried, params, grads, strict=True):
            if g.requires_grad:
                v = draw_like(p, "rademacher", torch.Generator(p.device).manual_seed(mix_seeds(seed, i)))
                (product,) = torch.autograd.grad(g, p, grad_outputs=v, retain_graph=True, **options)
                scale = g.norm() * v.norm() / p.norm().clamp(min=1e-30)
                if product.norm() > 1e3 * torch.finfo(p.dtype).eps * scale:
                    wrong.append(objective.names[i])
    return wrong, [objective.names[i] for i in tried]


def _check_linear(loss: OutputLoss, split: Split, params: Sequence[Tensor]) -> None:
    """Refuses a batch that is computed otherwise than the first one, if that was piecewise linear."""
    if split.piecewise_linear and curved(loss.outputs, params):
        raise Uncovered("another batch is not piecewise linear")


def exact_trace(objective: Objective, split: Split) -> Tensor:
    """Tr G for each parameter tensor, float64. The layouts of `split` hold for batches of the same model.

    Cost: `split.cost` gradients of the data. Memory: the graph of one batch, and gradients by its operations.
    """
    params = objective.params
    total, count = torch.zeros(len(params), dtype=torch.float64, device=params[0].device), 0
    with objective.quiet(), torch.enable_grad():
        for batch in objective.batches():
            loss = OutputLoss.of(objective, batch, split.kind)
            _check_linear(loss, split, params)
            factors = loss.factors()
            if factors is None:
                raise Uncovered("another batch has more outputs, or a loss that couples samples")
            total += batch.size * PerSample(loss.outputs, params, split.layouts).squared_norms(*factors).sum(0)
            count += batch.size
            del loss, factors
    check_finite(list(total), objective)
    return objective.mean(total, count)


class ClassVectors:
    """Random estimates of tr G: fresh random vectors for every sample.

    With per-sample norms, the samples' own errors are all there is; without, |sum_i J_i' a_i|^2 is taken, whose terms
    between samples are zero in expectation.

    Cost: two thirds of a gradient of the data for each, and one third for each call.
    """

    cost = 2 / 3

    def __init__(self, objective: Objective, split: Split, seed: int):
        self._objective, self._split, self._seed = objective, split, seed

    def draw(self, first: int, size: int) -> Tensor:
        """The estimates with the numbers `first` ... `first + size - 1`, for each parameter: (size, parameters)."""
        objective = self._objective
        device = objective.params[0].device
        total, count = torch.zeros(size, len(objective.params), dtype=torch.float64, device=device), 0
        with objective.quiet(), torch.enable_grad():
            for index, batch in enumerate(objective.batches()):
                loss = OutputLoss.of(objective, batch, self._split.kind)
                _check_linear(loss, self._split, objective.params)
                norms = self._norms(loss)
                for row in range(size):
                    seed = mix_seeds(self._seed, first + row, index, 2)
                    total[row] += batch.size * norms(torch.Generator(device).manual_seed(seed))
                count += batch.size
                del loss, norms
        check_finite(list(total.T), objective)
        return total / count

    def _norms(self, loss: OutputLoss) -> Callable[[torch.Generator], Tensor]:
        """An estimate for this batch from random numbers."""
        params = self._objective.params

        def pull(u: Tensor) -> tuple[Tensor, ...]:
            return derivative([loss.outputs], params, [u])

        layouts = self._split.layouts
        single = None if layouts is None else PerSample(loss.outputs, params, layouts)
        ones = torch.ones(1, loss.size, dtype=torch.float64, device=loss.outputs.device)

        def norms(generator: torch.Generator) -> Tensor:
            a = loss.draw(generator)
            if a is None:  # E <J' A u, J' u>
                u = draw_like(loss.outputs, "rademacher", generator)
                return dots(pull(loss.curvature(u)), pull(u))
            if single is not None:
                return single.squared_norms(a.unsqueeze(0), ones)[0]
            pulled = pull(a)
            return dots(pulled, pulled)

        return norms
