"""Changing tensors and changing them back, unseen by autograd."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


@contextmanager
def unversioned(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Inside, `tensors` may be changed in place if they have their values again on leaving: no new version is counted.

    A graph that saved one of them before finds the value that it saved, and stays valid.
    """
    with ExitStack() as stack:
        for tensor in tensors:
            if not tensor.is_inference():  # it has no version
                stack.enter_context(torch.autograd._unsafe_preserve_version_counter(tensor))
        yield
