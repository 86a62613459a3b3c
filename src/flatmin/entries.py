"""Arithmetic on lists of tensors, one for each parameter: what `foreach` kernels cannot do, done one by one.

Sparse gradients, shards, low precision and several devices are dealt with here, once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flatmin.shards import any_sharded, is_sharded, parts, summed

STRIDED = torch.strided


def add_in_place(params: Sequence[Tensor], tensors: Sequence[Tensor], alpha: float) -> None:
    """Adds `alpha` times each of `tensors` to each of `params`."""
    if any_sparse(tensors):
        for param, t in zip(params, tensors, strict=True):
            param.add_(t, alpha=alpha)
    elif params:
        torch._foreach_add_(parts(params), parts(tensors), alpha=alpha)


def scaled(tensors: list[Tensor], scalar: float | Tensor) -> Sequence[Tensor]:
    """Each of `tensors` times `scalar`, in its own dtype."""
    if not tensors:
        return tensors
    if not isinstance(scalar, Tensor):
        return [t * scalar for t in tensors] if one_by_one(tensors) else torch._foreach_mul(tensors, scalar)
    first = tensors[0]
    # A 0-dim factor of another width would take the slow path (and low precision needs it rounded only once).
    scalar = scalar if first.dtype.itemsize < 4 else scalar.to(first.dtype)
    alike = all(t.device == scalar.device and t.dtype == first.dtype for t in tensors) and not one_by_one(tensors)
    products = torch._foreach_mul(tensors, scalar) if alike else [t * scalar.to(t.device) for t in tensors]
    # A 0-dim entry would take the dtype of a wider 0-dim factor.
    return [product.to(t.dtype) for product, t in zip(products, tensors, strict=True)]


def added(a: list[Tensor], b: list[Tensor], alpha: float) -> Sequence[Tensor]:
    """Each of `a` and `alpha` times each of `b`."""
    if one_by_one([*a, *b]):
        return [torch.add(x, y, alpha=alpha) for x, y in zip(a, b, strict=True)]
    return torch._foreach_add(a, b, alpha=alpha) if a else []


def one_by_one(tensors: list[Tensor]) -> bool:
    """Whether `foreach` kernels refuse them: sparse ones, or ordinary ones beside shards."""
    if any_sparse(tensors):
        return True
    return any_sharded(tensors) and not all(is_sharded(t) for t in tensors)


def any_sparse(tensors: Sequence[Tensor]) -> bool:
    """Whether one of them is sparse."""
    return any(t.layout is not STRIDED for t in tensors)


def values(tensor: Tensor) -> Tensor:
    """What there is to add up: the entries of a sparse tensor, two numbers for a complex one."""
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    return torch.view_as_real(values) if values.is_complex() else values


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of two tensors, in fp32 or wider."""
    if a.is_complex():
        a, b = values(a), values(b)
    return (widened(a) * widened(b)).sum()


def widened(tensor: Tensor) -> Tensor:
    """In fp32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def total(terms: list[Tensor], owners: Sequence[Tensor]) -> Tensor:
    """The sum of numbers that the local parts of `owners` gave."""
    if not terms:
        return torch.zeros((), device="cpu")
    if any_sharded(owners):
        return summed(on_one_device(terms), owners)
    return stacked(terms).sum()


def stacked(scalars: Sequence[Tensor]) -> Tensor:
    """One tensor of 0-dim ones, on one device."""
    return torch.stack(on_one_device(scalars))


def size_in_units(tensors: Sequence[Tensor]) -> float:
    """The norm in units of the largest entry: the squares of tiny and huge ones leave the range of numbers."""
    tensors = [t for t in tensors if t.numel()]
    largest = max((t.abs().max().item() for t in tensors), default=0.0)
    if not 0.0 < largest < math.inf:
        return 0.0 if largest == 0.0 else math.nan
    return largest * math.hypot(*[torch.linalg.vector_norm(t / largest).item() for t in tensors])


def on_one_device(scalars: Sequence[Tensor]) -> list[Tensor]:
    """All on the device of the first."""
    device = scalars[0].device
    return [t if t.device == device else t.to(device) for t in scalars]
