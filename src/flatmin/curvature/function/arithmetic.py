"""In what arithmetic a model computes: how coarse its numbers are, and that it computes the same way every time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook


def rounding_of(value: object) -> float:
    """The relative rounding of a floating-point tensor."""
    return torch.finfo(value.dtype).eps if isinstance(value, Tensor) and value.is_floating_point() else 0.0


@contextmanager
def listening(hook: Callable[..., None]) -> Iterator[None]:
    """Inside, every module's outputs are shown to `hook`: under autocast their numbers are coarser than the loss."""
    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def one_path() -> Iterator[None]:
    """Inside, torch's transformer layers compute the same with gradients and without.

    Their fast path, which is taken without, gives other outputs at padded positions.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
