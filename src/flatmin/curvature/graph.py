"""What autograd recorded: the operations between parameters and a result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

Node = Any  # torch.autograd.graph.Node


def nodes(results: Iterable[Tensor]) -> Iterator[Node]:
    """All recorded operations that `results` depend on, each once."""
    waiting = [t.grad_fn for t in results if t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        new = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= new
        waiting += new


def check_differentiable(results: Iterable[Tensor]) -> None:
    """Raises where a gradient passed through a function marked `once_differentiable`.

    Its error node would raise when it is run. But it is no ancestor of the parameters, so `torch.autograd.grad` leaves
    it out, and with it a part of the derivative: the result is wrong, and nothing is said.
    """
    if any(node.name().endswith("::Error") for node in nodes(results)):
        raise RuntimeError("an operation is once_differentiable")
