"""The loss of a batch as a function of the model's outputs: its slope, and its curvature A = d2 loss / d outputs2.

What kind of curvature it is, is found by what it does to a random vector, not by the name of the criterion. With
p = softmax(outputs) over the classes and s >= 0 a number for each prediction (1/n, class weights, 0 where ignored):

    "softmax"     A u = s (p u - p <p, u>)     cross-entropy, with class weights, label smoothing, ignored targets
    "diagonal"    A u = d u                    squared error, logistic, Huber, Poisson
    "blocks"      A acts within each sample    any other loss of single samples with few outputs
    "coupled"     neither was found            a contrastive loss, say
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flatmin.curvature.objective import Batch, Objective
from flatmin.noise import draw_like

MAX_OUTPUTS = 64  # outputs per sample up to which A is written down


class OutputLoss:
    """The loss of one batch as a function of its outputs, at the outputs that the model gives.

    Args:
        objective: whose criterion it is.
        outputs: of the model, with their graph.
        targets: of the batch.
        size: samples in the batch.
    """

    def __init__(self, objective: Objective, outputs: Tensor, targets: Any, size: int):
        self.outputs, self.size = outputs, size
        with torch.enable_grad():
            self._leaf = outputs.detach().requires_grad_()
            loss = objective.batch_loss(self._leaf, targets, size)
            self.slope: Tensor = torch.autograd.grad(loss, self._leaf, create_graph=True)[0]

    @staticmethod
    def of(objective: Objective, batch: Batch) -> OutputLoss:
        """Evaluates the batch."""
        if objective.criterion is None:
            raise ValueError(
                "Gauss-Newton and Fisher need the outputs of the model and a criterion of them; this objective has "
                "criterion=None (the model returns its own loss). Pass criterion= and forward=."
            )
        evaluated = batch.evaluate()
        return OutputLoss(objective, output_tensor(evaluated.outputs), evaluated.targets, batch.size)

    def curvature(self, u: Tensor) -> Tensor:
        """A u, of the shape of the outputs."""
        if not self.slope.requires_grad:
            return torch.zeros_like(u)
        return torch.autograd.grad(
            self.slope, self._leaf, grad_outputs=u, retain_graph=True, allow_unused=True, materialize_grads=True
        )[0]

    @property
    def rows(self) -> bool:
        """Whether the outputs have a row for each sample."""
        return self._leaf.ndim > 0 and self._leaf.shape[0] == self.size

    @cached_property
    def kind(self) -> str:
        """What A does: "softmax", "diagonal", "blocks" or "coupled"."""
        if not self.rows:
            return "coupled"
        if self._equals(lambda u: self._diagonal * u):
            return "diagonal"
        if self._softmax_dim is not None:
            return "softmax"
        if self._leaf[0].numel() <= MAX_OUTPUTS and self._equals(self._by_blocks):
            return "blocks"
        return "coupled"

    def draw(self, generator: torch.Generator) -> Tensor | None:
        """A random a with E a a' = A, different predictions independent; `None` if that cannot be done."""
        if self.kind == "softmax":
            p, scale, dim = self._softmax
            spread = p.sqrt() * draw_like(p, "rademacher", generator)
            return scale.sqrt() * (spread - p * spread.sum(dim, keepdim=True))
        if self.kind == "diagonal" and bool((self._diagonal >= 0).all()):
            return self._diagonal.sqrt() * draw_like(self._leaf, "rademacher", generator)
        return None

    def draw_scores(self, generator: torch.Generator) -> Tensor:
        """The slope for a drawn target, with covariance A: of a class, or Gaussian where A is diagonal.

        Raises:
            ValueError: if the loss is none of these.
        """
        if self.kind == "softmax":
            p, scale, dim = self._softmax
            classes = p.movedim(dim, -1)
            drawn = torch.multinomial(classes.reshape(-1, classes.shape[-1]), 1, generator=generator)
            chosen = torch.zeros_like(classes).scatter_(-1, drawn.view(*classes.shape[:-1], 1), 1.0).movedim(-1, dim)
            return scale.sqrt() * (chosen - p)
        if self.kind == "diagonal" and bool((self._diagonal >= 0).all()):
            return self._diagonal.sqrt() * draw_like(self._leaf, "normal", generator)
        raise ValueError(
            "targets cannot be drawn for this criterion: its second derivative by the outputs is neither that of "
            "softmax cross-entropy nor diagonal and positive. Use FisherOperator(kind='empirical') or Gauss-Newton."
        )

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Vectors u (k, *outputs) and signs s (k, samples) with A_i = sum_k s_ik u_ik u_ik'; `None` if not possible.

        Those that carry less than 1e-9 of the whole (softmax has one that carries nothing) are left out.
        """
        if not self.rows or self._leaf[0].numel() > MAX_OUTPUTS or self.kind == "coupled":
            return None
        values, vectors = torch.linalg.eigh(self._blocks.double())
        order = values.abs().argsort(1, descending=True)
        values = values.gather(1, order)
        vectors = vectors.gather(2, order.unsqueeze(1).expand_as(vectors))
        sizes = values.abs().sum(0)
        count = max(int((sizes > 1e-9 * sizes.sum()).sum()), 1)
        scaled = (vectors * values.abs().sqrt().unsqueeze(1))[..., :count]
        return scaled.permute(2, 0, 1).reshape(count, *self._leaf.shape).to(self._leaf.dtype), values[
            :, :count
        ].T.sign()

    @cached_property
    def _probe(self) -> tuple[Tensor, Tensor]:
        """A random vector u, and A u."""
        u = draw_like(self._leaf, "normal", torch.Generator(self._leaf.device).manual_seed(0))
        return u, self.curvature(u)

    def _equals(self, candidate: Any) -> bool:
        """Whether `candidate` does to the random vector what A does, to rounding."""
        u, truth = self._probe
        eps = torch.finfo(truth.dtype).eps
        return bool((candidate(u) - truth).norm() <= min(1e3 * eps, 1e-2) * truth.norm())

    @cached_property
    def _diagonal(self) -> Tensor:
        return self.curvature(torch.ones_like(self._leaf))

    @cached_property
    def _blocks(self) -> Tensor:
        """A_i for each sample: (samples, outputs, outputs)."""
        columns = []
        for k in range(self._leaf[0].numel()):
            unit = torch.zeros_like(self._leaf)
            unit.view(self.size, -1)[:, k] = 1.0
            columns.append(self.curvature(unit).reshape(self.size, -1))
        return torch.stack(columns, 2)

    def _by_blocks(self, u: Tensor) -> Tensor:
        return (self._blocks @ u.reshape(self.size, -1, 1)).view_as(u)

    @cached_property
    def _softmax_dim(self) -> int | None:
        """The dimension of the classes, if A is that of softmax cross-entropy."""
        for dim in dict.fromkeys((1, self._leaf.ndim - 1)):
            if 0 < dim < self._leaf.ndim and self._equals(lambda u, dim=dim: self._softmax_product(u, dim)):
                return dim
        return None

    @property
    def _softmax(self) -> tuple[Tensor, Tensor, int]:
        """The probabilities, the factors s, and the dimension of the classes."""
        assert self._softmax_dim is not None
        return (*self._softmax_parts(self._softmax_dim), self._softmax_dim)

    def _softmax_parts(self, dim: int) -> tuple[Tensor, Tensor]:
        u, truth = self._probe
        p = self._leaf.detach().softmax(dim)
        centred = p * (u - (p * u).sum(dim, keepdim=True))
        scale = (truth * centred).sum(dim, keepdim=True) / centred.square().sum(dim, keepdim=True)
        return p, torch.nan_to_num(scale, nan=0.0, posinf=0.0, neginf=0.0).clamp(min=0.0)

    def _softmax_product(self, u: Tensor, dim: int) -> Tensor:
        p, scale = self._softmax_parts(dim)
        return scale * p * (u - (p * u).sum(dim, keepdim=True))


def output_tensor(outputs: Any) -> Tensor:
    """The outputs, if they are one tensor."""
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"Gauss-Newton and Fisher need outputs that are one tensor, got {type(outputs).__name__}. Let "
            "forward=lambda model, batch: (outputs, targets) return one."
        )
    return outputs
