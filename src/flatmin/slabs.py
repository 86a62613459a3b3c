"""How one draw for many parameters is divided: which elements come from one seed, and which lie in one piece of memory.

    piece    elements that come from one seed: neighbouring small parameters together, a large one block by block
    slab     pieces that lie in one piece of memory

Which number an element gets depends on the whole parameters alone, not on which part of them this process holds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from flatmin.shards import is_sharded, local, place_of

BLOCK = 2**20  # elements of a large tensor with one seed: many, for its cost; few, for who needs a part of them only
SMALL = 2**16  # elements of small tensors with one seed: many, for its cost; few, as they take memory together


class Kind(NamedTuple):
    """What has to be known of a parameter to lay out a draw for it.

    Attributes:
        shape: of the whole.
        dtype: of its elements.
        device: where it is.
        contiguous: whether its elements lie in order.
        rows: the elements of the whole between which the rows of this process lie; `None` if it is not sharded.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    contiguous: bool
    rows: tuple[int, int] | None

    @property
    def numel(self) -> int:
        """The number of elements of the whole."""
        return math.prod(self.shape)


Fields = tuple[torch.Size, torch.dtype, torch.device, bool, tuple[int, int] | None]  # those of a Kind


class Piece(NamedTuple):
    """Elements with one seed.

    Attributes:
        key: to be added to the seed of the draw.
        numel: how many elements the seed is for.
        first: the first of them that is wanted here.
        last: the last one that is wanted here, and one.
    """

    key: int
    numel: int
    first: int
    last: int


class Slab(NamedTuple):
    """One piece of memory.

    Attributes:
        order: the parameters that lie in it, by index, one after the other.
        pieces: what it is filled with.
        sizes: their sizes in memory.
        offsets: where each parameter would begin in it, if all of it were there.
        views: shape, strides and offset of each parameter in it, if every one is whole and contiguous.
        simple: whether it is one such parameter, with one seed.
    """

    order: tuple[int, ...]
    pieces: tuple[Piece, ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    views: tuple[tuple[torch.Size, tuple[int, ...], int], ...] | None
    simple: bool


def kinds(like: Sequence[Tensor], *, sharded: bool) -> tuple[Fields, ...]:
    """What `slabs` has to know of the parameters; `sharded` if one of them may be."""
    # At every draw: bare tuples, which are made and compared without Python code of ours.
    if sharded:
        return tuple([(t.shape, t.dtype, t.device, t.is_contiguous(), _rows(t)) for t in like])
    return tuple([(t.shape, t.dtype, t.device, t.is_contiguous(), None) for t in like])


def _rows(like: Tensor) -> tuple[int, int] | None:
    return rows_of(like)[:2] if is_sharded(like) else None


@lru_cache(maxsize=64)
def slabs(fields: tuple[Fields, ...], support: tuple[int, ...], small: int, block: int) -> tuple[Slab, ...]:
    """The slabs of a draw for the parameters in `support`, made once for parameters of these kinds.

    Args:
        fields: the kinds of all parameters.
        support: those that are drawn for, by index.
        small: elements of neighbours that have one seed together, and lie in one piece of memory.
        block: elements of one parameter that have one seed.
    """
    like = [Kind(*of_one) for of_one in fields]
    return tuple(_slab(together, like, block) for together in _joined(support, like, small))


def _slab(order: list[int], like: Sequence[Kind], block: int) -> Slab:
    rows = like[order[0]].rows if len(order) == 1 else None
    # Of a large parameter only what this process holds; small ones are drawn together and cut afterwards.
    numel = sum(like[i].numel for i in order)
    start, stop = rows or (0, numel)
    pieces = tuple(_pieces(order[0], start, stop, numel, block))
    offsets = tuple(itertools.accumulate((like[i].numel for i in order[:-1]), initial=-start))
    in_order = all(like[i].contiguous and like[i].rows is None for i in order)
    views = tuple((like[i].shape, _strides(like[i].shape), at) for i, at in zip(order, offsets, strict=True))
    return Slab(
        tuple(order),
        pieces,
        sizes=tuple(piece.last - piece.first for piece in pieces),
        offsets=offsets,
        views=views if in_order else None,
        simple=in_order and len(order) == len(pieces) == 1,
    )


def _strides(shape: torch.Size) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _pieces(unit: int, start: int, stop: int, size: int, block: int) -> Iterator[Piece]:
    """The elements from `start` to `stop` of a unit of `size` elements."""
    for number in range(start // block, -(-stop // block)):
        low, high = number * block, min((number + 1) * block, size)
        yield Piece((unit << 40) + number, high - low, max(low, start) - low, min(high, stop) - low)


def _joined(support: Sequence[int], like: Sequence[Kind], limit: int) -> list[list[int]]:
    """Neighbours that are of one kind, and of no more than `limit` elements together if there are several."""
    found: list[list[int]] = []
    of_these, room = None, 0
    for i in support:
        size, own = like[i].numel, (like[i].dtype, like[i].device)
        if size > room or of_these != own:
            found.append([])
            of_these, room = own, limit
        found[-1].append(i)
        room -= size
    return found


def rows_of(like: Tensor) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """The elements of all of `like` between which this process's rows lie, and shape and offset of its part."""
    shape, offset = place_of(like)
    if not shape:
        return 0, 1, shape, offset
    row = math.prod(like.shape[1:])
    return offset[0] * row, (offset[0] + shape[0]) * row, shape, offset


def cut(flat: Tensor, at: int, like: Tensor) -> Tensor:
    """This process's part of `like`, from a draw in which all of `like` would begin at `at`."""
    first, last, shape, offset = rows_of(like)
    z = flat[at + first : at + last].view(shape[:1] + like.shape[1:])
    for dim in range(1, len(shape)):
        z = z.narrow(dim, offset[dim], shape[dim])
    part = local(like)
    return z if z.stride() == part.stride() else torch.empty_like(part, requires_grad=False).copy_(z)
