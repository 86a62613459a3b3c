"""Where the whole step is inside a function that `torch.compile` compiles: our part of it is run as it is.

Compiled, the engine's frames would lose what they write to its attributes, and with it the place in the noise stream.
The model is what pays to compile; compiled by itself it stays so. An exception from the body of a compiled loop keeps a
frame with the loop in its traceback, so that the weights come home when the handler has ended, not when it begins.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback  # type: ignore[import-not-found]


def inside() -> bool:
    """Whether this is being compiled, or frames that are entered now would be."""
    return torch.compiler.is_compiling() or get_eval_frame_callback() is not None


@torch._disable_dynamo  # unlike torch.compiler.disable, it does not import the compiler before it is called
def apart(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, which is not compiled, nor anything that it calls."""
    return function(*args)


def each(begin: Callable[..., Generator[Any, None, None]], *args: Any) -> Generator[Any, None, None]:
    """The items of the generator `begin(*args)`, none of which is computed by compiled frames."""
    return apart(_each, begin, args)


def _each(begin: Callable[..., Generator[Any, None, None]], args: Any) -> Generator[Any, None, None]:
    session = begin(*args)
    try:
        while (item := apart(next, session, None)) is not None:
            yield item
    finally:
        apart(session.close)
