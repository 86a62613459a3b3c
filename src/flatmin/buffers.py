"""Copies of the buffers of modules, and their way back: values, sizes, and which tensor is registered."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from flatmin.versions import unversioned


class _Kept:
    """A buffer as it was."""

    __slots__ = ("buffer", "left", "module", "name", "own", "value")

    def __init__(self, module: nn.Module, name: str, buffer: Tensor | None, *, own: bool):
        self.module, self.name, self.buffer = module, name, buffer
        self.own = own  # whether it is certainly the module's
        self.value = None if buffer is None else buffer.detach().clone()
        self.left = buffer  # what was registered in its place at the end of the forward inside which it was found

    @property
    def came_back(self) -> bool:
        """Whether it belongs where it was. Inside `functional_call` somebody else's buffer is registered.

        What the forward left there is then no longer there: the module's own buffer is.
        """
        return self.own or self.module._buffers.get(self.name) is self.left


class Buffers:
    """Copies of the buffers of modules."""

    def __init__(self, owners: Iterable[nn.Module] = ()):
        self._kept: list[_Kept] = []
        self.copy(owners)

    def copy(self, owners: Iterable[nn.Module], *, inside: bool = False) -> Callable[..., None]:
        """Adds the buffers of `owners`.

        If that is `inside` a forward, what is returned is to be called at its end.
        """
        found = [_Kept(m, name, buffer, own=not inside) for m in owners for name, buffer in m._buffers.items()]
        self._kept += found

        def note(*_: object) -> None:
            for kept in found:
                kept.left = kept.module._buffers.get(kept.name)

        return note

    def put_back(self) -> None:
        """Restores sizes and values, and which tensor is registered; may be called again."""
        pairs = [
            (k.buffer, k.value)
            for k in self._kept
            if k.buffer is not None and k.value is not None and _can_be_written(k.buffer)
        ]
        if pairs:
            buffers, values = zip(*pairs, strict=True)
            with unversioned(buffers):
                for buffer, value in pairs:
                    if buffer.shape != value.shape:
                        buffer.resize_(value.shape)
                _copy([b.detach() for b in buffers], list(values))
        for kept in self._kept:
            if kept.came_back:
                kept.module._buffers[kept.name] = kept.buffer
                kept.left = kept.buffer


def _copy(buffers: list[Tensor], values: list[Tensor]) -> None:
    if len(set(map(type, buffers))) == 1:
        torch._foreach_copy_(buffers, values)
        return
    for buffer, value in zip(buffers, values, strict=True):  # `foreach` refuses shards beside ordinary tensors
        buffer.copy_(value)


def _can_be_written(buffer: Tensor) -> bool:
    """False for tensors that nobody can have changed in place: made in inference mode, or expanded."""
    if buffer.layout is not torch.strided:
        return not buffer.is_inference()
    strides = buffer.stride()
    expanded = 0 in strides and any(n > 1 for n, stride in zip(buffer.shape, strides, strict=True) if stride == 0)
    return not expanded and not buffer.is_inference()
