"""Which use of a parameter a recorded operation is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flatmin.curvature.per_sample.uses import (
    BroadcastUse,
    ChannelUse,
    ConvolutionUse,
    EmbeddingUse,
    LinearUse,
    LookupUse,
    SumUse,
    Uncovered,
    Use,
)
from flatmin.curvature.products.graph import Node, kind

LOOKUPS = {"Embedding", "Slice", "Alias"}
TRANSPOSED = {"T", "Transpose", "Permute"}  # operations that transpose a matrix


def uses_of(node: Node, params: Mapping[int, int], shapes: Mapping[int, torch.Size]) -> list[Use]:
    """How `node` uses parameters: `params` maps the position of an argument to the index of a parameter.

    Raises:
        Uncovered: if it is not known how.
    """
    make = _KNOWN.get(kind(node))
    if make is None:
        raise Uncovered(f"a parameter enters by {kind(node)}")
    uses = [make(node, position, param, shapes[param]) for position, param in params.items()]
    for use in uses:
        use.shape = tuple(shapes[use.param])
    return uses


def lookup_of(node: Node, param: int, shape: torch.Size, above: Mapping[Node, list[Node]], samples: int) -> Use | None:
    """The use of a table that is looked up or cut once, and then added or expanded for each sample, if it is one.

    The gradient by what was looked up is a sum over samples; by what it was added to it is not.

    Args:
        node: takes the parameter.
        param: its index.
        shape: of the parameter.
        above: for each operation those that take its result.
        samples: in the batch.
    """
    index = torch.arange(shape.numel()).view(shape)
    while kind(node) in ("Slice", "Alias"):
        if kind(node) == "Slice":
            cut = [slice(None)] * index.ndim
            cut[node._saved_dim] = slice(node._saved_start, node._saved_end, node._saved_step)
            index = index[tuple(cut)]
        if len(above[node]) != 1:
            return None
        (node,) = above[node]
    if kind(node) == "Embedding":
        rows = node._saved_indices
        if len(above[node]) != 1 or bool((rows == node._saved_padding_idx).any()):
            return None
        index = index[rows.cpu()]
        (node,) = above[node]
    if kind(node) not in ("Add", "Expand") or getattr(node, "_saved_alpha", 1) != 1:
        return None
    result = node._input_metadata[0].shape
    once = (1,) * (len(result) - index.ndim) + tuple(index.shape)
    if once != (1, *result[1:]) or result[0] != samples or samples == 1:
        return None
    use = LookupUse(param, node, index.flatten().to(node._input_metadata[0].device))
    use.shape = tuple(shape)
    return use


def _addmm(node: Node, position: int, param: int, shape: torch.Size) -> Use:
    if position == 0:
        if len(shape) != 1 or node._saved_beta != 1:
            raise Uncovered("a parameter enters by addmm")
        return SumUse(param, node, None)
    return _product(node, position == 2, param, node._saved_mat1)


def _mm(node: Node, position: int, param: int, shape: torch.Size) -> Use:
    return _product(node, position == 1, param, node._saved_self)


def _product(node: Node, right: bool, param: int, inputs: Tensor | None) -> Use:
    if not right or inputs is None:
        raise Uncovered("a parameter stands on the left of a matrix product")
    return LinearUse(param, node, inputs, kind(node.next_functions[-1][0]) in TRANSPOSED)


def _convolution(node: Node, position: int, param: int, shape: torch.Size) -> Use:
    if position == 2:
        return ChannelUse(param, node, None)
    if position != 1 or node._saved_transposed or len(shape) > 4:
        raise Uncovered("a parameter enters by a transposed or three-dimensional convolution")
    return ConvolutionUse(param, node)


def _batch_norm(node: Node, position: int, param: int, shape: torch.Size) -> Use:
    if node._saved_training:
        raise Uncovered("batch norm in training mode mixes samples")
    if position == 2:
        return ChannelUse(param, node, None)
    x = node._saved_input
    shape = torch.Size([-1, *([1] * (x.ndim - 2))])
    eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
    scale = (node._saved_running_var + eps).rsqrt()
    return ChannelUse(param, node, (x - node._saved_running_mean.view(shape)) * scale.view(shape))


def _layer_norm(node: Node, position: int, param: int, shape: torch.Size) -> Use:
    if len(shape) != 1:
        raise Uncovered("layer norm over several dimensions")
    if position == 2:
        return SumUse(param, node, None)
    return SumUse(param, node, (node._saved_input - node._saved_result1) * node._saved_result2)


def _group_norm(node: Node, position: int, param: int, shape: torch.Size) -> Use:
    if position == 2:
        return ChannelUse(param, node, None)
    x = node._saved_input
    groups = x.reshape(x.shape[0], node._saved_group, -1)
    normal = (groups - node._saved_result1.unsqueeze(2)) * node._saved_result2.unsqueeze(2)
    return ChannelUse(param, node, normal.view_as(x))


def _add(node: Node, position: int, param: int, shape: torch.Size) -> Use:
    factor = float(node._saved_alpha) if position == 1 else 1.0
    if factor == 1.0 and len(shape) == 1 and shape[0] > 1:
        return SumUse(param, node, None)
    return BroadcastUse(param, node, shape, factor)


def _multiply(node: Node, position: int, param: int, shape: torch.Size) -> Use:
    return BroadcastUse(param, node, shape, node._saved_self if position == 1 else node._saved_other)


_KNOWN: dict[str, Callable[[Node, int, int, torch.Size], Use]] = {
    "Addmm": _addmm,
    "Mm": _mm,
    "Convolution": _convolution,
    "NativeBatchNorm": _batch_norm,
    "CudnnBatchNorm": _batch_norm,
    "NativeLayerNorm": _layer_norm,
    "NativeGroupNorm": _group_norm,
    "Embedding": lambda node, position, param, shape: EmbeddingUse(param, node, shape),
    "Add": _add,
    "Mul": _multiply,
    "Expand": lambda node, position, param, shape: BroadcastUse(param, node, shape, 1.0),
}
