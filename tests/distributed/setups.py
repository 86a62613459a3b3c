"""A model, its optimizer and a joint batch, of which each rank has a part; functions of one seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import flatmin
from tests.contracts.cases import build

BATCH = 32
METHODS = [name for name in flatmin.methods() if name != "base"]
BASES: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "plain": lambda params: SGD(params, lr=0.1),
    "adamw": lambda params: AdamW(params, lr=1e-2),
}


def make_model() -> nn.Module:
    """Odd sizes, so that shards are uneven; a parameter of one number; a convolution."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(1, 3, 3), nn.Flatten(), nn.Tanh(), nn.Linear(12, 7), nn.PReLU(), nn.LayerNorm(7), nn.Linear(7, 3)
    ).double()


def make_smooth_model() -> nn.Module:
    """Without kinks, so that second derivatives and differences agree; odd sizes; a bias of one number."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 3)
    ).double()


def make_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, 1, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (BATCH,), generator=generator)


def share(rank: int, world_size: int = 2) -> slice:
    """The rows of the joint batch that a rank has."""
    size = BATCH // world_size
    return slice(rank * size, (rank + 1) * size)


def wrap(model: nn.Module, how: str) -> nn.Module:
    """The model as `how` trains it: "alone", "ddp", "fsdp", or "hsdp", replicas of shards.

    "root" is FSDP2 with most of the weights in the root, which keeps them gathered after a forward without a backward.
    """
    if how == "ddp":
        return DistributedDataParallel(model)
    if how in ("fsdp", "hsdp", "root"):
        size = distributed.get_world_size()
        shape, names = ((size,), ("shard",)) if how != "hsdp" else ((size, 1), ("replicate", "shard"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        layers = [layer for layer in model if list(layer.parameters())]  # type: ignore[union-attr]
        for layer in layers[:1] if how == "root" else layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


class Run:
    """Training on some rows of the joint batch."""

    def __init__(self, method: str, how: str = "alone", rows: Any = slice(None), base: str = "sgd", **options: Any):
        self.plain = make_model()
        self.model = wrap(self.plain, how)
        self.rows = rows
        self.method = method
        self.optimizer: Any = build(method, BASES[base](self.model.parameters()), **options)
        self.probes = 0

    def evaluate(self) -> Tensor:
        x, y = self.optimizer.take(*(t[self.rows] for t in make_batch()))
        loss = self.optimizer.mean(F.cross_entropy(self.model(x), y, reduction="none"))
        loss.backward()
        self.probes += 1
        return loss

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        return self.evaluate()

    def step(self, form: str = "loop") -> Any:
        if form == "closure":
            return self.optimizer.step(self.closure)
        for _ in self.optimizer.probes():
            self.evaluate()
        return self.optimizer.step()

    def run(self, steps: int, form: str = "loop") -> Run:
        for _ in range(steps):
            self.step(form)
        return self

    def weights(self) -> dict[str, Tensor]:
        """All of them, gathered, under the names of the plain model."""
        return {name: whole(p) for name, p in self.plain.named_parameters()}


def whole(p: Any) -> Tensor:
    """A copy of all of a tensor, sharded or not."""
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()


def assert_near(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 1e-10) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
