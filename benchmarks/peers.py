"""Hessian products by other tools, in the environment that they need; absent ones are left out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measured import Batches

Product = Callable[[Tensor], Tensor]  # of a flat vector
BLOCK = 8  # columns that curvlinops multiplies at once in its best case


def _pyhessian(model: nn.Module, batches: Batches) -> Product:
    tool: Any = importlib.import_module("pyhessian")
    operator = tool.hessian(model, nn.CrossEntropyLoss(), dataloader=batches, cuda=False)

    def product(v: Tensor) -> Tensor:
        return flat(operator.dataloader_hv_product(unflat(v, operator.params))[1])

    return product


def _eigenthings(model: nn.Module, batches: Batches) -> Product:
    tool: Any = importlib.import_module("hessian_eigenthings")
    return tool.HessianOperator(model, batches, tool.supervised_loss(nn.CrossEntropyLoss())).matvec


def _curvlinops(model: nn.Module, batches: Batches) -> Product:
    tool: Any = importlib.import_module("curvlinops")
    params = [p for p in model.parameters() if p.requires_grad]
    operator = tool.HessianLinearOperator(model, nn.CrossEntropyLoss(), params, batches, check_deterministic=False)
    return lambda v: operator @ v


PEERS: dict[str, tuple[Callable[[nn.Module, Batches], Product], str]] = {
    "PyHessian": (_pyhessian, "pyhessian"),
    "hessian-eigenthings": (_eigenthings, "hessian-eigenthings"),
    "curvlinops": (_curvlinops, "curvlinops-for-pytorch"),
}


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def unflat(v: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    return [part.view_as(p) for part, p in zip(v.split([p.numel() for p in like]), like, strict=True)]
