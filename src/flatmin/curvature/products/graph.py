"""What autograd recorded: the operations between parameters and a result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import CheckpointFunction

Node = Any  # torch.autograd.graph.Node

# Piecewise linear in all inputs together.
_LINEAR = (
    "AccumulateGrad Add Sub Rsub Neg View UnsafeView Reshape ReshapeAlias Alias Clone ToCopy T Transpose Permute "
    "Expand Squeeze Unsqueeze Select Slice Split SplitWithSizes Unbind Cat Stack Sum Mean Relu LeakyRelu Threshold "
    "Hardtanh MaxPool2DWithIndices MaxPool3DWithIndices MkldnnMaxPool2D AvgPool2D AvgPool3D AdaptiveAvgPool2D "
    "AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D Amax Max Abs ConstantPadNd ReflectionPad1D "
    "ReflectionPad2D ReplicationPad1D ReplicationPad2D UpsampleNearest1D UpsampleNearest2D UpsampleBilinear2D "
    "Index IndexSelect Gather MaskedFill Where PixelShuffle Flip Roll Repeat Embedding"
)
LINEAR = frozenset(_LINEAR.split())
# Those whose slope jumps somewhere, and what may choose between branches.
_KINKED = (
    "Relu LeakyRelu Prelu PreluKernel Rrelu RreluWithNoise Threshold Hardtanh Hardswish Hardsigmoid Hardshrink "
    "Softshrink Elu Abs Sgn Sign Clamp ClampMin ClampMax Max Min Amax Amin Maximum Minimum Fmax Fmin Sort Topk Median "
    "Kthvalue Cummax Cummin Where MaskedFill Round Floor Ceil Trunc Frac Remainder L1Loss SmoothL1Loss HuberLoss Norm "
    "LinalgVectorNorm Dist Cdist MultiMarginLoss MultilabelMarginLoss AdaptiveMaxPool2D AdaptiveMaxPool3D "
    "MaxPool2DWithIndices MaxPool3DWithIndices MkldnnMaxPool2D"
)
KINKED = frozenset(_KINKED.split())
# Linear in each of the inputs; those after the first two are added (bias).
BILINEAR = {"Mul", "Mm", "Bmm", "Mv", "Dot", "Convolution", "NativeBatchNorm", "CudnnBatchNorm", "Prelu", "PreluKernel"}


def first_line(error: Exception) -> str:
    """What an error says first, or its class if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


def kind(node: Node) -> str:
    """The name of an operation, without namespace, number or "Backward"; of a Python function "custom"."""
    if hasattr(node, "_forward_cls"):
        return "custom"  # whatever it is called
    return node.name().rpartition("::")[2].rstrip("0123456789").removesuffix("Backward")


def nodes(results: Iterable[Tensor]) -> Iterator[Node]:
    """All recorded operations that `results` depend on, each once, in an order that depends on the operations only."""
    waiting = [t.grad_fn for t in results if t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)


def may_have_kinks(results: Iterable[Tensor]) -> bool:
    """Whether an operation was recorded whose slope may jump."""
    return any(kind(node) in KINKED for node in nodes(results))


def check_not_reentrant(results: Iterable[Tensor]) -> None:
    """Raises a ValueError where parameters are hidden: reentrant checkpointing does not show what is inside."""
    if any(getattr(node, "_forward_cls", None) is CheckpointFunction for node in nodes(results)):
        raise ValueError(
            "the model uses reentrant checkpointing, which hides its parameters from torch.autograd.grad: their "
            "derivatives would be taken for zero. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )


def check_differentiable(results: Iterable[Tensor]) -> None:
    """Raises where a loss or its gradient passed through a function marked `once_differentiable`.

    Its error node would raise when it is run. But it is no ancestor of the parameters, so `torch.autograd.grad` leaves
    it out, and with it a part of the derivative: the result is wrong, and nothing is said. As the last operation of a
    loss it leaves no error node in the gradient at all, and is seen in the loss only.
    """
    if any(node.name().endswith("::Error") or _is_once_differentiable(node) for node in nodes(results)):
        raise RuntimeError("an operation is once_differentiable")


def _is_once_differentiable(node: Node) -> bool:
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    marked = getattr(backward, "__wrapped__", None) is not None
    return marked and backward.__code__.co_filename == once_differentiable.__code__.co_filename  # type: ignore[union-attr]


def curved(result: Tensor, params: Sequence[Tensor]) -> set[int]:
    """The indices of the parameters in which `result` is not known to be (piecewise) affine, one tensor at a time.

    Each recorded operation is linear, or linear in each of two inputs, or unknown. A parameter is curved if it reaches
    an unknown operation, or both inputs of a product (weights used twice in a row). If none is, the second derivative
    of `result` by any parameter tensor with itself is zero, and so is its trace.
    """
    index = {p: i for i, p in enumerate(params)}
    above: dict[Node, int] = {}  # which parameters an operation depends on, as bits
    found = 0
    for node in _children_first(result):
        inputs = [above[child] if child is not None else 0 for child, _ in node.next_functions]
        union = 0
        for bits in inputs:
            union |= bits
        if (variable := getattr(node, "variable", None)) is not None and variable in index:
            union |= 1 << index[variable]
        above[node] = union
        found |= _curved_here(node, inputs, union)
    return {i for i in range(len(params)) if found >> i & 1}


def _curved_here(node: Node, inputs: list[int], union: int) -> int:
    name = kind(node)
    if name == "Abs" and _of_complex(node):
        return union
    if name in LINEAR:
        return 0
    if name == "Div" and len(inputs) > 0:
        return inputs[1] if len(inputs) > 1 else 0
    if name == "Addmm":
        return inputs[1] & inputs[2]
    if name in BILINEAR and not getattr(node, "_saved_training", False):
        return inputs[0] & inputs[1] if len(inputs) > 1 else 0
    return union


def _of_complex(node: Node) -> bool:
    given = getattr(node, "_saved_self", None)
    return isinstance(given, Tensor) and given.is_complex()


def _children_first(result: Tensor) -> Iterator[Node]:
    done: set[Node] = set()
    waiting = [(result.grad_fn, False)] if result.grad_fn is not None else []
    while waiting:
        node, expanded = waiting.pop()
        if expanded:
            yield node
        elif node not in done:
            done.add(node)
            waiting.append((node, True))
            waiting += [(child, False) for child, _ in node.next_functions if child is not None and child not in done]
