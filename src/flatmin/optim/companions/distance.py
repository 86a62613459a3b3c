"""Staying near the initialisation: a penalty on the distance, or a projection onto a ball.

Both go around any optimizer, and together with any method. In fine-tuning W_0 is the pretrained model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flatmin.checks import check_choice, check_number, check_positive
from flatmin.vectors import Vector

Norm = Literal["frobenius", "mars"]


class _Anchor:
    """Parameters and where they started; the start is saved and resumed."""

    def __init__(self, params: Iterable[Tensor], start: Iterable[Tensor] | None):
        self._params = [p for p in params if p.is_floating_point()]
        if not self._params:
            raise ValueError("no floating-point parameters to keep near their start.")
        self._start = self._checked(self._params if start is None else list(start))

    def _checked(self, start: Sequence[Tensor]) -> list[Tensor]:
        """Copies of `start` beside the parameters, if they have their shapes."""
        shapes = [tuple(p.shape) for p in self._params], [tuple(s.shape) for s in start]
        if shapes[0] != shapes[1]:
            raise ValueError(f"start must have the shapes of the parameters, {shapes[0]}, got {shapes[1]}.")
        return [s.detach().clone().to(p) for s, p in zip(start, self._params, strict=True)]

    def distance(self) -> Tensor:
        """|W - W_0| over all tensors together (Frobenius), a 0-dim tensor (fp32 or wider)."""
        with torch.no_grad():
            return Vector(p - s for p, s in self._pairs()).norm()

    def state_dict(self) -> dict[str, Any]:
        """The start."""
        return {"start": list(self._start)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on around the start that `state_dict` gave.

        Raises:
            ValueError: if it is of other shapes.
        """
        self._start = self._checked(state_dict["start"])

    def _pairs(self) -> Iterable[tuple[Tensor, Tensor]]:
        return zip(self._params, self._start, strict=True)


class DistancePenalty(_Anchor):
    """strength * |W - W_0|_F^2, a term to add to the loss (L2-SP).

    Example:
        penalty = flatmin.DistancePenalty(model.backbone.parameters(), strength=1e-3)
        loss = loss_fn(model(x), y) + penalty()

    Inside a probe it is evaluated at the displaced weights. For symmetric noise its gradient averages to that at W.

    Args:
        params: the parameters to hold, e.g. those of the pretrained part.
        strength: >= 0, in units of the loss per squared unit of the weights.
        start: W_0; `None` is where the parameters are now. Zeros for a new head give weight decay.

    Cost: one pass over the weights; memory: one copy of them.

    Raises:
        ValueError: negative strength, no parameters, a start of other shapes.

    Source: Li, Grandvalet, Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", ICML
    2018 (L2-SP); the penalty that the NSO paper combines with noise.
    """

    def __init__(self, params: Iterable[Tensor], strength: float, start: Iterable[Tensor] | None = None):
        self.strength = check_number("strength", strength, 0.0)
        super().__init__(params, start)

    def __call__(self) -> Tensor:
        """The penalty at the present weights, with its graph."""
        first, *others = [(p - s).square().sum() for p, s in self._pairs()]
        return self.strength * sum(others, first)


class DistanceProjection(_Anchor):
    """Keeps every tensor within `radius` of its start: `W <- W_0 + pi(W - W_0)` after each step.

        frobenius   pi(D) = D min(1, radius / |D|_F)                                  tensor by tensor
        mars        pi(D)_i = D_i min(1, radius / |D_i|_1), row by row                the infinity operator norm

    Example:
        ball = flatmin.DistanceProjection(model.backbone.parameters(), radius=5.0)
        ...
        opt.step()
        ball.project()

    Args:
        params: the parameters to hold.
        radius: > 0, in units of the weights.
        norm: "frobenius", or "mars" (maximum absolute row sum; a row is what feeds one output unit).
        start: W_0; `None` is where the parameters are now.

    Cost: one pass over the weights; memory: one copy of them.

    Raises:
        ValueError: a radius that is not positive, an unknown norm, no parameters, a start of other shapes.

    Source: Gouk, Hospedales, Pontil, "Distance-Based Regularisation of Deep Networks for Fine-Tuning", ICLR 2021.
    """

    def __init__(
        self, params: Iterable[Tensor], radius: float, norm: Norm = "frobenius", start: Iterable[Tensor] | None = None
    ):
        self.radius, self.norm = check_positive("radius", radius), check_choice("norm", norm, get_args(Norm))
        super().__init__(params, start)

    @torch.no_grad()
    def project(self) -> None:
        """Call it after each step. Tensors (or rows) inside the ball keep their bits."""
        for p, start in self._pairs():
            delta = p - start
            size = self._size(delta)
            outside = size > self.radius
            p.copy_(torch.where(outside, start + delta * (self.radius / size), p))

    def _size(self, delta: Tensor) -> Tensor:
        if self.norm == "frobenius" or delta.ndim == 0:
            return torch.linalg.vector_norm(delta)
        if delta.ndim == 1:
            return delta.abs()  # each entry is a row: it feeds one output unit
        return delta.abs().sum(tuple(range(1, delta.ndim)), keepdim=True)
