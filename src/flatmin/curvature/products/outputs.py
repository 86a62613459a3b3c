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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flatmin.curvature.function.batches import Batch
from flatmin.curvature.function.objective import Objective
from flatmin.curvature.products.graph import check_differentiable
from flatmin.noise import draw_like

BESIDE_OUTPUTS = (
    "the loss depends on the parameters not only through the outputs (a penalty in the criterion?), and Gauss-Newton "
    "and Fisher would leave that part out. The Hessian does not: trace(method='hutchinson'), HessianOperator."
)
LINEAR = (
    "targets cannot be drawn for this criterion: it is linear in the outputs (NLLLoss of log-probabilities?), so that "
    "its second derivative, the covariance of what would be drawn, is zero. Let the outputs be those before "
    "log_softmax, with CrossEntropyLoss."
)
FAR = 1e4  # in units of the outputs
MAX_OUTPUTS = 64  # outputs per sample up to which A is written down


class Kind(NamedTuple):
    """What A does: "softmax" (classes along `dim`), "diagonal", "blocks" or "coupled"."""

    name: str
    dim: int = 1


class Point:
    """The slope and the curvature of a batch's loss at one value of the outputs."""

    def __init__(self, objective: Objective, outputs: Tensor, targets: Any, size: int):
        with torch.enable_grad():
            self.outputs = outputs.requires_grad_()
            loss = objective.batch_loss(self.outputs, targets, size)
            check_differentiable([loss])
            inputs = [self.outputs, *objective.params]
            self.slope, *beside = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
            if self.slope is None:
                self.slope = torch.zeros_like(self.outputs)
        if any(part is not None for part in beside):
            raise ValueError(BESIDE_OUTPUTS)

    def curvature(self, u: Tensor) -> Tensor:
        """A u, of the shape of the outputs."""
        if not self.slope.requires_grad:
            return torch.zeros_like(u)
        return torch.autograd.grad(
            self.slope, self.outputs, grad_outputs=u, retain_graph=True, allow_unused=True, materialize_grads=True
        )[0]

    @cached_property
    def diagonal(self) -> Tensor:
        """A 1: the diagonal of A, if it is diagonal."""
        return self.curvature(torch.ones_like(self.outputs))

    @cached_property
    def blocks(self) -> Tensor:
        """A_i for each sample, if A acts within samples: (samples, outputs, outputs)."""
        columns = []
        for k in range(self.outputs[0].numel()):
            unit = self.outputs.new_zeros(len(self.outputs), self.outputs[0].numel())
            unit[:, k] = 1.0
            columns.append(self.curvature(unit.view(self.outputs.shape)).reshape(len(unit), -1))
        return torch.stack(columns, 2)


class OutputLoss:
    """The loss of one batch as a function of its outputs, at the outputs that the model gives.

    Args:
        objective: whose criterion it is.
        outputs: of the model, with their graph.
        targets: of the batch.
        size: samples in the batch.
        kind: what A does in another batch, to be tried first.
    """

    def __init__(self, objective: Objective, outputs: Tensor, targets: Any, size: int, kind: Kind | None = None):
        self.outputs, self.size = outputs, size
        self._known = kind
        self._here = Point(objective, outputs.detach(), targets, size)
        self.slope, self.curvature = self._here.slope, self._here.curvature
        self._objective, self._targets = objective, targets

    @staticmethod
    def of(objective: Objective, batch: Batch, kind: Kind | None = None) -> OutputLoss:
        """Evaluates the batch."""
        objective.refuse_sharded("a derivative by the outputs")
        if objective.criterion is None:
            raise ValueError(
                "Gauss-Newton and Fisher need the outputs of the model and a criterion of them; this objective has "
                "criterion=None (the model returns its own loss). Pass criterion= and forward=."
            )
        evaluated = batch.evaluate()
        return OutputLoss(objective, output_tensor(evaluated.outputs), evaluated.targets, batch.size, kind)

    @property
    def rows(self) -> bool:
        """Whether the outputs have a row for each sample."""
        return self._here.outputs.ndim > 0 and self._here.outputs.shape[0] == self.size

    @cached_property
    def kind(self) -> Kind:
        """What A does: found at random outputs, and verified at those of the model."""
        if not self.rows:
            return Kind("coupled")
        if self._known is not None and self._acts_as(self._known, self._here):
            return self._known
        softmax = [
            Kind("softmax", dim) for dim in dict.fromkeys((1, self.outputs.ndim - 1)) if 0 < dim < self.outputs.ndim
        ]
        blocks = [Kind("blocks")] if self.outputs[0].numel() <= MAX_OUTPUTS else []
        for kind in [Kind("diagonal"), *softmax, *blocks]:
            if all(self._acts_as(kind, point) for point in (self._there, self._here)):
                return kind
        return Kind("coupled")

    def draw(self, generator: torch.Generator) -> Tensor | None:
        """A random a with E a a' = A, different predictions independent; `None` if that cannot be done."""
        if self.kind.name == "softmax":
            p, scale, dim = self._softmax
            spread = p.sqrt() * draw_like(p, "rademacher", generator)
            return scale.sqrt() * (spread - p * spread.sum(dim, keepdim=True))
        if self.kind.name == "diagonal" and bool((self._here.diagonal >= 0).all()):
            return self._here.diagonal.sqrt() * draw_like(self._here.outputs, "rademacher", generator)
        return None

    def draw_scores(self, generator: torch.Generator) -> Tensor:
        """The slope for a drawn target, with covariance A: of a class, or Gaussian where A is diagonal.

        Raises:
            ValueError: if the loss is none of these, or linear.
        """
        if self.kind.name == "softmax":
            p, scale, dim = self._softmax
            classes = p.movedim(dim, -1)
            drawn = torch.multinomial(classes.reshape(-1, classes.shape[-1]), 1, generator=generator)
            chosen = torch.zeros_like(classes).scatter_(-1, drawn.view(*classes.shape[:-1], 1), 1.0).movedim(-1, dim)
            return scale.sqrt() * (chosen - p)
        if self.kind.name == "diagonal" and bool((self._here.diagonal >= 0).all()):
            if self._is_linear:
                raise ValueError(LINEAR)
            return self._here.diagonal.sqrt() * draw_like(self._here.outputs, "normal", generator)
        raise ValueError(
            "targets cannot be drawn for this criterion: its second derivative by the outputs is neither that of "
            "softmax cross-entropy nor diagonal and positive. Use FisherOperator(kind='empirical') or Gauss-Newton."
        )

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Vectors u (k, *outputs) and signs s (k, samples) with A_i = sum_k s_ik u_ik u_ik'; `None` if not possible."""
        outputs = self._here.outputs[0].numel() if self.rows else 0
        if not 0 < outputs <= MAX_OUTPUTS or self.kind.name == "coupled":
            return None
        if self.kind.name == "diagonal":
            vectors = torch.diag_embed(self._here.diagonal.reshape(self.size, -1).abs().sqrt()).transpose(0, 1)
            signs = self._here.diagonal.reshape(self.size, -1).T.sign()
        elif self.kind.name == "softmax" and self._here.outputs.ndim == 2:
            vectors, signs = self._softmax_factors()
        else:
            values, columns = torch.linalg.eigh(self._here.blocks.double())
            vectors, signs = (columns * values.abs().sqrt().unsqueeze(1)).permute(2, 0, 1), values.T.sign()
        return vectors.reshape(-1, *self._here.outputs.shape).to(self._here.outputs.dtype), signs

    def _softmax_factors(self) -> tuple[Tensor, Tensor]:
        """The Cholesky factor of s (diag p - p p'), in closed form.

        With r_k the probability of the classes after k,

        L_kk = sqrt(p_k r_k / r_{k-1}),    L_ik = -p_i sqrt(p_k / (r_{k-1} r_k)) for i > k
        """
        p, scale, _ = self._softmax
        p = p.double()
        rest = p.flip(1).cumsum(1).flip(1)  # r_{k-1}: summed from the small end, so that none cancels
        before, after = rest[:, :-1], rest[:, 1:]
        column = (p[:, :-1] / (before * after)).sqrt()
        factor = torch.tril(-p.unsqueeze(2) * column.unsqueeze(1), -1)
        factor.diagonal(dim1=1, dim2=2).copy_(column * after)
        vectors = torch.nan_to_num(factor * scale.double().sqrt().unsqueeze(2), nan=0.0, posinf=0.0, neginf=0.0)
        return vectors.permute(2, 0, 1), torch.ones(p.shape[1] - 1, self.size, dtype=p.dtype, device=p.device)

    @cached_property
    def _there(self) -> Point:
        """Where the kind is found: at random outputs, since at those of a well-trained model A may be all rounding."""
        generator = torch.Generator(self.outputs.device).manual_seed(1)
        try:
            outputs = draw_like(self.outputs, "normal", generator)
            return Point(self._objective, outputs, self._targets, self.size)
        except (ValueError, RuntimeError):  # the criterion wants probabilities, say
            return self._here

    @property
    def _is_linear(self) -> bool:
        """Whether the slope is one and the same far off in opposite directions, where that of a Huber loss is not."""
        if self._here.diagonal.any() or not self.slope.any():
            return False
        try:
            there = [self.outputs.detach() + far * self._probe for far in (FAR, -FAR)]
            slopes = [Point(self._objective, outputs, self._targets, self.size).slope for outputs in there]
        except (ValueError, RuntimeError):  # not finite there
            return False
        return torch.equal(*slopes)

    @cached_property
    def _probe(self) -> Tensor:
        """A random vector u."""
        return draw_like(self.outputs, "normal", torch.Generator(self.outputs.device).manual_seed(0))

    @cached_property
    def _elsewhere(self) -> Tensor:
        """A u at random outputs."""
        return self._there.curvature(self._probe)

    def _acts_as(self, kind: Kind, point: Point) -> bool:
        """Whether A at `point` does to the random vector what `kind` says, to rounding."""
        u = self._probe
        if kind.name == "coupled":
            return False
        truth = self._elsewhere if point is self._there else point.curvature(u)
        if kind.name == "diagonal":
            found = point.diagonal * u
        elif kind.name == "blocks":
            found = (point.blocks @ u.reshape(self.size, -1, 1)).view_as(u)
        else:
            p = point.outputs.detach().softmax(kind.dim)
            found = self._scale(kind.dim) * p * (u - (p * u).sum(kind.dim, keepdim=True))
        eps = torch.finfo(truth.dtype).eps
        gap = (found - truth).norm() - min(1e3 * eps, 1e-2) * truth.norm()
        # Of a well-trained model A is nearly zero, and all rounding beside what it is elsewhere.
        return bool(gap <= 0) or bool(gap <= 10 * eps * self._elsewhere.norm())

    @property
    def _softmax(self) -> tuple[Tensor, Tensor, int]:
        """The probabilities, the factors s, and the dimension of the classes."""
        dim = self.kind.dim
        return self.outputs.detach().softmax(dim), self._scale(dim), dim

    def _scale(self, dim: int) -> Tensor:
        """The factors s, which do not depend on the outputs."""
        u, truth = self._probe, self._elsewhere
        p = self._there.outputs.detach().softmax(dim)
        centred = p * (u - (p * u).sum(dim, keepdim=True))
        scale = (truth * centred).sum(dim, keepdim=True) / centred.square().sum(dim, keepdim=True)
        return torch.nan_to_num(scale, nan=0.0, posinf=0.0, neginf=0.0).clamp(min=0.0)


def output_tensor(outputs: Any) -> Tensor:
    """The outputs, if they are one tensor."""
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"Gauss-Newton and Fisher need outputs that are one tensor, got {type(outputs).__name__}. Let "
            "forward=lambda model, batch: (outputs, targets) return one."
        )
    return outputs
