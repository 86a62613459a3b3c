"""Small float64 nets of many kinds, and the dense Hessian by reverse over reverse: the independent truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatmin.curvature.products.differences import dots


class Attention(nn.Module):
    """Embedding, layer norm, `scaled_dot_product_attention` as users have it, and a tied output."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens))
        # With an axis for the heads: without one torch takes the slow path, which hides that fused kernels have no
        # second derivative.
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).squeeze(1).mean(1))


class Conv(nn.Module):
    """Convolution, batch norm, max-pool, weight sharing, and a branch that is never used."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.shared = nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.gelu(self.norm(self.conv(x))), 2).flatten(1)
        return self.head(self.shared(self.shared(x).tanh()).tanh())


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "relu": (lambda: nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)),
             lambda n: torch.randn(n, 5, dtype=torch.float64)),
    "tanh": (lambda: nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 3)),
             lambda n: torch.randn(n, 5, dtype=torch.float64)),
    "conv": (Conv, lambda n: torch.randn(n, 1, 4, 4, dtype=torch.float64)),
    "attention": (Attention, lambda n: torch.randint(7, (n, 5))),
}  # fmt: skip

criterion = nn.CrossEntropyLoss()


def make(name: str, samples: int = 24) -> tuple[nn.Module, Tensor, Tensor]:
    """A lightly trained net and its data."""
    torch.manual_seed(3)
    build, inputs = NETS[name]
    model, x, y = build().double(), inputs(samples), torch.randint(3, (samples,))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


def dense_hessian(model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """The full Hessian of `loss()` by the trainable parameters, row by row, reverse over reverse."""
    params = [p for p in model.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):
        grads = torch.autograd.grad(loss(), params, create_graph=True, allow_unused=True, materialize_grads=True)
        flat = torch.cat([g.flatten() for g in grads])
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        rows = [torch.autograd.grad(g, params, **options) if g.requires_grad else () for g in flat]
        rows = [torch.cat([r.flatten() for r in row]) if row else torch.zeros_like(flat) for row in rows]
    return torch.stack(rows).detach()


class DenseHessian:
    """The Hessian of one batch as a matrix, in place of `BatchHessian`: a product costs a tenth."""

    def __init__(self, matrix: Tensor):
        self.matrix = matrix

    def product(self, v: Sequence[Tensor], *, last: bool = False) -> tuple[Tensor, ...]:
        return DenseHessian.sum([self], [v])

    @staticmethod
    def sum(parts: Sequence[DenseHessian], vectors: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
        total = torch.stack(
            [a.matrix @ torch.cat([t.flatten() for t in v]) for a, v in zip(parts, vectors, strict=True)]
        )
        split = total.sum(0).split([t.numel() for t in vectors[0]])
        return tuple(part.view_as(t) for part, t in zip(split, vectors[0], strict=True))

    def forms(self, v: Sequence[Tensor]) -> Tensor:
        return dots(v, self.product(v))


def dense_jacobian(model: nn.Module, outputs: Callable[[], Tensor]) -> Tensor:
    """d outputs / d trainable parameters, one row per scalar of the outputs."""
    params = [p for p in model.parameters() if p.requires_grad]
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    with sdpa_kernel(SDPBackend.MATH):
        rows = [torch.autograd.grad(z, params, **options) for z in outputs().flatten()]
    return torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])


def dense_gauss_newton(model: nn.Module, outputs: Callable[[], Tensor], loss: Callable[[Tensor], Tensor]) -> Tensor:
    """J' (d2 loss / d outputs2) J."""
    jacobian, z = dense_jacobian(model, outputs), outputs().detach()
    curvature = torch.autograd.functional.hessian(loss, z)
    assert isinstance(curvature, Tensor)
    curvature = curvature.reshape(z.numel(), z.numel())
    return jacobian.T @ curvature @ jacobian
