"""What a list of tensors has in common, asked once, so that the usual case takes no further questions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flatmin.shards import ORDINARY

_kind = attrgetter("__class__", "layout", "is_cpu", "dtype", "requires_grad")
_ABSENT = (type(None), None, True, None, False)


class Traits(NamedTuple):
    """What the entries of a vector allow.

    Attributes:
        plain: every entry is present, dense, and whole on this process: nearly always.
        countable: the norm can be had as a number without cost, on the CPU.
        historic: an entry has a history in a graph.
    """

    plain: bool
    countable: bool
    historic: bool


def traits_of(tensors: Sequence[Tensor | None]) -> Traits:
    """The traits of entries of which some may be missing."""
    try:
        return _traits(frozenset(map(_kind, tensors)))
    except AttributeError:  # one is missing
        return _traits(frozenset(_ABSENT if t is None else _kind(t) for t in tensors))


@lru_cache(maxsize=256)
def _traits(kinds: frozenset[tuple[Any, ...]]) -> Traits:
    def is_countable(type_: type, layout: Any, on_cpu: bool, dtype: Any, _: bool) -> bool:
        dense = layout is torch.strided and on_cpu
        return type_ is type(None) or (dense and dtype in (torch.float32, torch.float64))

    return Traits(
        plain=all(type_ in ORDINARY and layout is torch.strided for type_, layout, *_ in kinds),
        countable=all(is_countable(*kind) for kind in kinds),
        historic=any(history for *_, history in kinds),
    )
