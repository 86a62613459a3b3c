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

ORDINARY = {Tensor, torch.nn.Parameter}

PARTIAL = (
    "a gradient is a partial sum, spread over the processes (tensor parallelism leaves some so), and has no norm "
    "before it is added up. Redistribute it to the placements of its parameter first."
)


def is_sharded(tensor: object) -> bool:
    """Whether `tensor` is a DTensor."""
    # Importing DTensor takes a second, and as long as nobody has done so no tensor is one.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Iterable[object]) -> bool:
    """Whether one of them is a DTensor."""
    kinds = set(map(type, tensors))
    if kinds <= ORDINARY:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(issubclass(kind, module.DTensor) for kind in kinds)


def local(tensor: Any) -> Tensor:
    """The part of `tensor` on this process, in the same memory; all of an ordinary tensor."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():  # with gradients, the part would be a view with a history
        return tensor.to_local()


def parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The part of each on this process."""
    return [t if type(t) in ORDINARY else local(t) for t in tensors]


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


def part_of(whole: Tensor, like: Any) -> Tensor:
    """`whole`, which every process has, sharded as `like` is: each keeps a copy of its part."""
    for dim, (size, start) in enumerate(zip(*place_of(like), strict=True)):
        whole = whole.narrow(dim, min(start, whole.shape[dim]), size)
    return made_of(whole.clone(), like)


def whole_rows(tensor: Any) -> Tensor:
    """This process's rows along the leading dimension, all of each row: gathered if they are cut along another one."""
    if is_sharded(tensor) and any(p.is_shard() and p.dim != 0 for p in tensor.placements):
        replicate = sys.modules["torch.distributed.tensor"].Replicate()
        tensor = tensor.redistribute(placements=[p if p.is_shard(0) else replicate for p in tensor.placements])
    return local(tensor)


def summed(terms: Sequence[Tensor], owners: Sequence[Any]) -> Tensor:
    """Adds up what the local parts of the `owners` contribute, over owners and processes.

    Args:
        terms: tensors of one shape on one device, `terms[i]` computed from the local part of `owners[i]`.
        owners: tells what is shared out over which processes. An ordinary tensor counts once, not once a process.

    Cost: one all-reduce of the size of a term for each set of processes (one, with FSDP2; none without DTensor).
    """
    totals = [_all_reduced(torch.stack([terms[i] for i in at]).sum(0), groups) for groups, at in _sets(owners)]
    return torch.stack(totals).sum(0)


def summed_apart(terms: Sequence[Tensor], owners: Sequence[Any]) -> list[Tensor]:
    """The same for each owner by itself: over processes only. Cost: one all-reduce of all terms together."""
    totals = list(terms)
    for groups, at in _sets(owners):
        for i, total in zip(at, _all_reduced(torch.stack([terms[i] for i in at]), groups), strict=True):
            totals[i] = total
    return totals


def _all_reduced(tensor: Tensor, groups: Iterable[Any]) -> Tensor:
    for group in groups:
        distributed.all_reduce(tensor, group=group)
    return tensor


def _sets(owners: Sequence[Any]) -> list[tuple[tuple[Any, ...], list[int]]]:
    """The owners' indices, by the groups of processes that hold different parts of them."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for i, owner in enumerate(owners):
        found.setdefault(_spread(owner), []).append(i)
    return list(found.items())


def _spread(tensor: Any) -> tuple[Any, ...]:
    """The groups of processes that hold different parts of `tensor`."""
    if not is_sharded(tensor):
        return ()
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(PARTIAL)
    mesh = tensor.device_mesh
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(tensor.placements) if not placement.is_replicate())
