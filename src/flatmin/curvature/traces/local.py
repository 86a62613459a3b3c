"""Probes of the outputs of operations in place of the parameters: fresh for every sample, at the cost of a product.

Let phi be a sum over samples and z = B p + (what does not depend on p) the output of the one operation that takes the
parameter p, with B = dz / dp. Then the block of p in the Hessian of phi is B' Phi B with Phi = d2 phi / dz2, and

    tr B' Phi B = tr Phi B B' = E e' Phi e        for any random e with E e e' = B B'

Of the e that have this covariance those are drawn that vary little and cost little (`uses`): independent for every
sample, since Phi has no entries between samples, with random signs within a sample. The errors of v' H v come from the
samples of a batch too, which share v, and from pairs of parameters of different operations; here the first average out
and the second are smaller. Phi e is a second backward pass; it computes no weight gradients, but the e have to be
drawn.

Source: the covariance argument is the local reparametrisation of Kingma, Salimans and Welling 2015; the probes here are
this library's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flatmin.curvature.function.batches import Batch
from flatmin.curvature.function.objective import Objective
from flatmin.curvature.per_sample.norms import PerSample
from flatmin.curvature.per_sample.uses import Layout, Uncovered
from flatmin.curvature.products.differences import dots
from flatmin.curvature.products.graph import first_line
from flatmin.curvature.products.operators import GRAPH_MEMORY, PerBatch
from flatmin.curvature.products.outputs import OutputLoss
from flatmin.curvature.products.probes import Probes
from flatmin.curvature.products.ways import NOT_DIFFERENTIABLE, Way, differentiable_twice
from flatmin.noise import draw_like, mix_seeds

CHECKS = 2  # parameter tensors for which the forms are compared with products, at most


class BatchLocal:
    """e' Phi e of one batch, for phi = <c, outputs> with c the slope of the loss in the outputs, held constant.

    Cost: about one gradient to build, and two for each draw.

    Raises:
        Uncovered: if the operations are not known, samples are mixed, or a parameter enters several operations (one of
            them may act on the result of another).
    """

    def __init__(self, loss: OutputLoss, params: Sequence[Tensor], layouts: Sequence[Layout] | None):
        uses = PerSample(loss.outputs, params, layouts)
        if max(Counter(use.param for use in uses.uses).values(), default=1) > 1:
            raise Uncovered("a parameter enters several operations")
        self._uses, self._at, self._edges = uses.uses, uses.at, uses.edges
        self._num_params = len(params)
        scalar = (loss.outputs * loss.slope.detach()).sum()
        self._deltas = torch.autograd.grad(scalar, self._edges, create_graph=True)

    @property
    def params(self) -> list[int]:
        """The parameters that the outputs depend on, by index."""
        return [use.param for use in self._uses]

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> Tensor:
        """The forms e_p' Phi e for each parameter p: (parameters,), float64."""
        return self._forms([use.perturbation(self._like(i), generator) for i, use in enumerate(self._uses)])

    @torch.no_grad()
    def form(self, param: int, v: Tensor) -> float:
        """The form v' R v where only `param` changes, by the same `v` for every sample."""
        changes = []
        for i, use in enumerate(self._uses):
            like = self._like(i)
            same = v.expand(use.samples, *v.shape)
            changes.append(use.changes(same, like) if use.param == param else torch.zeros_like(like))
        return float(self._forms(changes)[param])

    def _like(self, use: int) -> Tensor:
        return self._deltas[self._at[use]].detach()

    def _forms(self, changes: list[Tensor]) -> Tensor:
        """The forms e_p' Phi e for each parameter p, with e the sum of all e_p."""
        found = torch.zeros(self._num_params, dtype=torch.float64, device=changes[0].device if changes else None)
        along = [torch.zeros_like(delta, requires_grad=False) for delta in self._deltas]
        for at, change in zip(self._at, changes, strict=True):
            along[at] += change
        curved = [i for i, delta in enumerate(self._deltas) if delta.requires_grad]
        if not curved:
            return found
        bent = torch.autograd.grad(
            [self._deltas[i] for i in curved],
            self._edges,
            grad_outputs=[along[i] for i in curved],
            retain_graph=True,
            allow_unused=True,
        )
        for use, at, change in zip(self._uses, self._at, changes, strict=True):
            if bent[at] is not None:
                found[use.param] = dots([change], [bent[at]])[0]
        return found


class LocalResidual(PerBatch[BatchLocal]):
    """H - G, batch by batch, for local probes.

    Args:
        objective: what to measure; needs a criterion and outputs with a row for each sample.
        way: by double backward.
        layouts: of the operations' outputs, from another batch, if they are known.
        graph_memory: bytes that kept graphs may take.
    """

    name = "Hessian - Gauss-Newton by outputs of operations"

    def __init__(
        self, objective: Objective, way: Way, layouts: Sequence[Layout] | None, *, graph_memory: int = GRAPH_MEMORY
    ):
        super().__init__(objective, way, graph_memory=graph_memory)
        self._layouts = layouts

    def _open(self, batch: Batch, index: int) -> BatchLocal:
        return BatchLocal(OutputLoss.of(self.objective, batch), self.objective.params, self._layouts)


class LocalProbes(Probes[BatchLocal]):
    """The forms e_p' Phi e for each parameter p, whose mean is the trace of its block."""

    text = "local probes, fresh for every sample"

    def _forms(self, curvature: BatchLocal, generator: torch.Generator) -> Tensor:
        return curvature.draw(generator)


def why_not(objective: Objective, way: Way, layouts: Sequence[Layout] | None, seed: int) -> str:
    """Why local probes cannot be had, by trial on the first batch; empty if they can.

    For a few parameters p, v' R v with v zero elsewhere is computed from the outputs of operations and from a product.

    Cost: about five gradients of the first batch.
    """
    if way.name != "autograd" or layouts is None:
        return "they need per-sample norms and double backward"
    generator = torch.Generator(objective.params[0].device).manual_seed(mix_seeds(seed, 4))
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    try:
        with differentiable_twice(objective):
            loss = OutputLoss.of(objective, next(iter(objective.batches())))
            local = BatchLocal(loss, objective.params, layouts)
            shuffled = torch.Generator("cpu").manual_seed(mix_seeds(seed, 5))
            order = torch.randperm(len(local.params), generator=shuffled, device="cpu")
            tried = [local.params[i] for i in order[:CHECKS].tolist()]
            params = [objective.params[i] for i in tried]
            vectors = [draw_like(p, "rademacher", generator) for p in params]
            forms = [local.form(i, v) for i, v in zip(tried, vectors, strict=True)]
            del local  # one second-order graph at a time
            scalar = (loss.outputs * loss.slope.detach()).sum()
            grads = torch.autograd.grad(scalar, params, create_graph=True, **options)
            for i, p, g, v, form in zip(tried, params, grads, vectors, forms, strict=True):
                product = torch.autograd.grad(g, p, grad_outputs=v, **options)[0] if g.requires_grad else 0 * v
                if not _agree(form, v, product, g.detach(), p.detach()):
                    return f"for {objective.names[i]} they differ from a product"
    except torch.OutOfMemoryError:
        raise
    except (Uncovered, *NOT_DIFFERENTIABLE) as error:
        return first_line(error)
    return ""


def _agree(form: float, v: Tensor, product: Tensor, gradient: Tensor, weights: Tensor) -> bool:
    """Whether `form` is <v, product>, to rounding; the gradient says how large a product could be."""
    size = product.norm() + gradient.norm() * v.norm() / weights.norm().clamp(min=1e-30)
    return abs(form - float(dots([v], [product])[0])) <= 1e2 * torch.finfo(v.dtype).eps * float(size * v.norm())
