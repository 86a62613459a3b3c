"""Parameter space with flat vectors: all entries that this process holds in one tensor.

These are all there are, unless the parameters are sharded (FSDP2). Then flat vectors are sharded with them, arithmetic
is local, and an inner product is one all-reduce of one number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flatmin.noise import draw_like
from flatmin.shards import any_sharded, local, made_of, summed
from flatmin.vectors import Vector

NUDGE = 0.01  # share of a random vector in a start that is known from before, so that the search can turn elsewhere


class Space:
    """What flat vectors have in common.

    Args:
        params: what the vectors are shaped like.

    Attributes:
        params: the same.
        dim: the number of entries, of all processes together.
        like: a flat vector without values: its size on this process, its dtype (fp32 or wider) and device.
    """

    def __init__(self, params: Sequence[Tensor]):
        self.params = params
        self.dim = sum(p.numel() for p in params)
        self.like = torch.empty(
            sum(local(p).numel() for p in params),
            dtype=torch.promote_types(params[0].dtype, torch.float32),
            device=params[0].device,
        )

    def summed(self, terms: Tensor) -> Tensor:
        """Adds up what the processes computed from their entries: one all-reduce, none without shards."""
        return summed([terms], self.params[:1])

    def dot(self, a: Tensor, b: Tensor) -> float:
        """Added up in double: in single precision a sum over a million entries loses three more digits."""
        return float(self.summed((a * b).sum(dtype=torch.float64)))

    def norm(self, v: Tensor) -> float:
        """|v|, from a sum in double."""
        return math.sqrt(self.dot(v, v))

    def nudged(self, v: Tensor, share: float, seed: int) -> Tensor:
        """`v + share z / |z|` for a random z, so that a search that begins there can turn elsewhere."""
        z = self.random(torch.Generator(v.device).manual_seed(seed))
        return v + share * z / self.norm(z)

    def random(self, generator: torch.Generator) -> Tensor:
        """A vector with independent normal entries, which do not depend on the number of processes."""
        if any_sharded(self.params):
            return flatten(Vector(draw_like(p, "normal", generator) for p in self.params)).to(self.like)
        return draw_like(self.like, "normal", generator)


def filled(v: Vector, params: Sequence[Tensor]) -> list[Tensor]:
    """The entries of a vector, with zeros for those that are missing."""
    return [
        torch.zeros_like(p, requires_grad=False) if t is None else t for t, p in zip(v.tensors, params, strict=True)
    ]


def flatten(v: Vector) -> Tensor:
    """The entries of a vector that this process holds, in one tensor."""
    return torch.cat([local(t).flatten() for t in v.present])


def shaped(flat: Tensor, params: Sequence[Tensor]) -> Vector:
    """The vector of parameter space with these entries."""
    own = [local(p) for p in params]
    parts = flat.split([p.numel() for p in own])
    entries = [part.view_as(p).to(p.dtype) for part, p in zip(parts, own, strict=True)]
    return Vector(made_of(entry, p) for entry, p in zip(entries, params, strict=True))
