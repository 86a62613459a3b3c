"""Puts the operations of `second.py` in place of torch's, for what is evaluated inside `Swapped()`.

A torch function mode sees every call of `torch.conv2d`, `F.layer_norm`, ... that Python code makes, as all modules do.
What the operations do not cover is left to torch: autocast, half precision, vmap, statistics of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flatmin.curvature.products.graph import kind, nodes
from flatmin.curvature.products.second import BatchNorm, Convolution, Given, LayerNorm, Pointwise
from flatmin.shards import ORDINARY

KINDS = {"Convolution", "NativeBatchNorm", "CudnnBatchNorm", "NativeLayerNorm", "Gelu", "Silu", "WeightNormInterface"}
PRECISE = (torch.float32, torch.float64)


def worthwhile(losses: Iterable[Tensor]) -> bool:
    """Whether anything was recorded for `losses` that may be swapped."""
    return any(kind(node) in KINDS for node in nodes(losses))


class Swapped(TorchFunctionMode):
    """Inside, operations are recorded with the second derivatives of `second.py`, where it has them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`, or what stands for it."""
        better = BETTER.get(func)
        found = None if better is None else better(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if found is None else found


def _covered(*tensors: Given) -> bool:
    """Whether these are ordinary tensors of one kind, at a place where a graph is recorded."""
    first = tensors[0]
    if not torch.is_grad_enabled() or first is None or first.dtype not in PRECISE:
        return False
    if torch.is_autocast_enabled(first.device.type) or torch._C._are_functorch_transforms_active():
        return False
    given = [t for t in tensors if t is not None]
    return all(type(t) in ORDINARY and t.dtype == first.dtype and t.layout == torch.strided for t in given)


def _convolution(dims: int) -> Callable[..., Given]:
    """Stands for `torch.conv1d`, `torch.conv2d` or `torch.conv3d`."""

    def convolve(
        input: Tensor,
        weight: Tensor,
        bias: Given = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Given:
        if isinstance(padding, str) or input.ndim != dims + 2 or not _covered(input, weight, bias):
            return None
        sizes = [[n] * dims if isinstance(n, int) else list(n) for n in (stride, padding, dilation)]
        return Convolution.apply(input, weight, bias, (*sizes, False, [0] * dims, groups))

    return convolve


def _batch_norm(
    input: Tensor,
    running_mean: Given,
    running_var: Given,
    weight: Given = None,
    bias: Given = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Given:
    """Stands for `F.batch_norm`."""
    if training or running_mean is None or running_var is None:
        return None
    if not _covered(input, weight, bias, running_mean, running_var):
        return None
    return BatchNorm.apply(input, weight, bias, running_mean, running_var, eps)


def _layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Given = None, bias: Given = None, eps: float = 1e-5
) -> Given:
    """Stands for `F.layer_norm`."""
    whole = tuple(input.shape[-len(normalized_shape) :]) == tuple(normalized_shape)
    if not whole or not input.numel() or not _covered(input, weight, bias):
        return None
    size = math.prod(normalized_shape)
    flat = [None if t is None else t.reshape(size) for t in (weight, bias)]
    return LayerNorm.apply(input.reshape(-1, size), *flat, eps).view(input.shape)


def _gelu(input: Tensor, *, approximate: str = "none") -> Given:
    """Stands for `F.gelu`."""
    return Pointwise.apply(input, "gelu") if approximate == "none" and _covered(input) else None


def _silu(input: Tensor, inplace: bool = False) -> Given:
    """Stands for `F.silu`."""
    return Pointwise.apply(input, "silu") if not inplace and _covered(input) else None


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Given:
    """Stands for `torch._weight_norm`, whose second derivative is wrong in torch 2.13 (the matrix is not symmetric)."""
    return v * (g / torch.norm_except_dim(v, 2, dim)) if _covered(v, g) else None


BETTER: dict[Callable[..., Any], Callable[..., Given]] = {
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
    torch.conv3d: _convolution(3),
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.gelu: _gelu,
    F.silu: _silu,
    torch._weight_norm: _weight_norm,
}
