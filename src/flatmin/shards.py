"""Tensors of which every process holds a part (DTensor, as FSDP2 makes them): this process's part, sums over all.

Arithmetic entry by entry is DTensor's own. What is here is the rest: a sum over all entries is one all-reduce of one
number, never a gathering of tensors, and what changes a tensor in place works on the part alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

PARTIAL = (
    "a gradient is a partial sum, spread over the processes (tensor parallelism leaves some so), and has no norm before "
    "it is added up. Redistribute it to the placements of its parameter first."
)


def is_sharded(tensor: object) -> bool:
    """Whether `tensor` is a DTensor."""
    # Importing DTensor takes a second, and as long as nobody has done so no tensor is one.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Iterable[object]) -> bool:
    """Whether one of them is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(t, module.DTensor) for t in tensors)


def local(tensor: Any) -> Tensor:
    """The part of `tensor` on this process, in the same memory; all of an ordinary tensor."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():  # with gradients, the part would be a view with a history
        return tensor.to_local()


def parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The part of each on this process."""
    return [local(t) for t in tensors] if any_sharded(tensors) else list(tensors)


def made_of(part: Tensor, like: Any) -> Tensor:
    """The tensor that is sharded as `like` is and of which this process holds `part`."""
    if not is_sharded(like):
        return part
    kind = sys.modules["torch.distributed.tensor"].DTensor
    return kind.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def place_of(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offset of this process's part within the whole `tensor`."""
    if not is_sharded(tensor):
        return tuple(tensor.shape), (0,) * tensor.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)  # type: ignore[return-value]


def summed(terms: Sequence[Tensor], owners: Sequence[Any]) -> Tensor:
    """Adds up what the local parts of the `owners` contribute, elementwise, over owners and processes.

    Args:
        terms: tensors of one shape on one device, `terms[i]` computed from the local part of `owners[i]`.
        owners: tells what is shared out over which processes. An ordinary tensor counts once, not once a process.

    Cost: one all-reduce of the size of a term for each set of processes (one, with FSDP2; none without DTensor).
    """
    buckets: dict[tuple[Any, ...], list[Tensor]] = {}
    for term, owner in zip(terms, owners, strict=True):
        buckets.setdefault(_spread(owner), []).append(term)
    totals = []
    for groups, members in buckets.items():
        total = torch.stack(members).sum(0)
        for group in groups:
            distributed.all_reduce(total, group=group)
        totals.append(total)
    return torch.stack(totals).sum(0)


def _spread(tensor: Any) -> tuple[Any, ...]:
    """The groups of processes that hold different parts of `tensor`."""
    if not is_sharded(tensor):
        return ()
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(PARTIAL)
    mesh = tensor.device_mesh
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(tensor.placements) if not placement.is_replicate())
