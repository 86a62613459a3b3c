"""How a Hessian product is computed: double backward, with attention in its differentiable form.

Fused attention kernels have no second derivative, so every forward pass here runs attention in math mode. A parameter
that the loss does not use, or uses linearly, contributes zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatmin.curvature.objective import Objective
from flatmin.vectors import Vector

METHOD = "double backward"


@contextmanager
def differentiable_twice(objective: Objective) -> Iterator[None]:
    """Inside, the losses of `objective` can be differentiated twice; nothing is changed on leaving."""
    with objective.quiet(), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        yield


class BatchHessian:
    """The Hessian of one batch's loss, as a map v -> H v; the graph is built once and used for every product.

    Cost: one gradient to build, about two per product.
    """

    def __init__(self, loss: Tensor, params: Sequence[Tensor]):
        self._params = params
        grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True, materialize_grads=True)
        self._curved = [i for i, g in enumerate(grads) if g.requires_grad]
        self._grads = [grads[i] for i in self._curved]

    def product(self, v: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """H v, one tensor per parameter."""
        if not self._curved:
            return tuple(torch.zeros_like(p) for p in self._params)
        return torch.autograd.grad(
            self._grads,
            self._params,
            grad_outputs=[v[i] for i in self._curved],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )


def hessian_product(objective: Objective, v: Vector) -> Vector:
    """H v over the whole data, sample-weighted.

    Cost: about three gradients of the data. Memory: the graph of one batch.

    Raises:
        ValueError: if the product is not finite; it names the first parameter where.
    """
    total, count = objective.zeros(), 0
    with differentiable_twice(objective):
        for loss, n in objective.batch_losses():
            part = BatchHessian(loss, objective.params).product(v.present)
            total, count = total.add_(Vector(part) * float(n)), count + n
            del loss, part
    product = objective.mean(total, count)
    check_finite([t.isfinite().all() for t in product.present], objective)
    return product


def check_finite(finite: Sequence[Tensor], objective: Objective) -> None:
    """Refuses a product that is not finite; `finite` says so for each parameter. One synchronisation."""
    if not (good := torch.stack([f.to(finite[0].device) for f in finite])).all():
        name = objective.names[int(good.logical_not().nonzero()[0, 0])]
        raise ValueError(
            f"the Hessian is not finite: its product with a vector is not, at parameter {name!r}. The loss is, so it "
            "has no second derivative here (a norm or a square root at zero?) or overflows. Leave the parameter out "
            "with params=, or measure at another point."
        )
