"""Random displacements that can be drawn again.

Every law here is symmetric about 0 with unit variance, so that with U = sigma z the smoothed loss is

    E f(W + U) = f(W) + sigma^2 / 2 tr(Hessian f(W)) + O(sigma^4)

whatever the law, for f four times differentiable. A draw is a pure function of (seed, step, index): a resumed run
continues the same stream from a step count alone, the global random state is never touched, and `-u` is the same draw
with the other sign.

Which number an element of a parameter gets does not depend on how many processes share the parameter out among them
(flatmin.slabs): a process draws what it needs a part of, and keeps its part.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from flatmin.radii import Radii
from flatmin.shards import any_sharded, is_sharded, local, made_of, part_of, summed_apart, whole_rows
from flatmin.slabs import BLOCK, SMALL, Piece, Slab, cut, kinds, slabs
from flatmin.vectors import Vector

Law = Literal["normal", "uniform", "laplace", "rademacher", "binomial"]


Scale = Literal["absolute", "filter"]

CPU = torch.device("cpu")
LEAST = torch.iinfo(torch.int64).min  # from it, without an end: all 64 bits of a word are random


def _normal(out: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    return out.normal_(0.0, scale, generator=generator)


def _uniform(out: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    return out.uniform_(-math.sqrt(3) * scale, math.sqrt(3) * scale, generator=generator)


def _rademacher(out: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    return out.fill_(scale).copysign_(_signs(out.numel(), generator).view(out.shape))


def _signs(number: int, generator: torch.Generator) -> Tensor:
    """Numbers of random sign (and of any size, or none: NaN has a sign, too): each bit of the generator makes one.

    An integer for each sign, as torch draws them, takes as long as a normal number.
    """
    words = torch.empty(-(-number // 64), dtype=torch.int64, device=generator.device)
    words.random_(LEAST, None, generator=generator)
    shifts = SHIFTS if generator.device == CPU else _shifts(generator.device)
    return (words.view(torch.int32) << shifts).view(torch.float32).flatten()[:number]


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(32, dtype=torch.int32, device=device)[:, None]


SHIFTS = _shifts(CPU)  # made once where that takes as long as the use of it


def _laplace(out: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    # A random sign times an exponential of mean 1/sqrt(2) has variance 2 * (1/sqrt(2))^2 = 1.
    signs = _rademacher(torch.empty_like(out), scale, generator)
    return out.exponential_(math.sqrt(2), generator=generator).mul_(signs)


def _binomial(out: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    # Four fair coins less their mean: -2 .. 2, mean 0, variance 4 * 1/4 = 1. The published code forgets the mean.
    coins = _rademacher(out.new_empty(4, *out.shape), 0.5, generator)
    return torch.sum(coins, 0, out=out).mul_(scale)


Draw = Callable[[Tensor, float, torch.Generator], Tensor]
_DRAW: dict[str, Draw] = {
    "normal": _normal,
    "uniform": _uniform,
    "laplace": _laplace,
    "rademacher": _rademacher,
    "binomial": _binomial,
}


def check_law(law: str) -> str:
    """Returns `law` if it is known, else raises a `ValueError` that lists the known ones."""
    if law == "cauchy":
        raise ValueError(
            "law='cauchy' is refused: a Cauchy variable has no variance, so there is no trace penalty that "
            f"sigma could scale. Known laws: {', '.join(get_args(Law))}."
        )
    if law not in _DRAW:
        raise ValueError(f"unknown noise law {law!r}. Known laws: {', '.join(get_args(Law))}.")
    return law


def draw_like(tensor: Tensor, law: str, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """One draw from `law` (mean 0, standard deviation `scale`) with the shape, dtype and device of `tensor`.

    If it is sharded all of it is drawn, tensor by tensor, and each process keeps its part: the numbers are those that
    one process draws.
    """
    if is_sharded(tensor):
        part = local(tensor)
        return part_of(_fill(part.new_empty(tensor.shape, requires_grad=False), law, scale, generator), tensor)
    return _fill(torch.empty_like(tensor, requires_grad=False), law, scale, generator)


def _fill(out: Tensor, law: str, scale: float, generator: torch.Generator) -> Tensor:
    """Draws into `out`; a complex number is two real ones, each with that standard deviation."""
    _DRAW[law](torch.view_as_real(out) if out.is_complex() else out, scale, generator)
    return out


class _ForCPU(threading.local):
    """A generator for the CPU, seeded anew before each use. Made once: that takes as long as a thousand numbers."""

    def __init__(self) -> None:
        self.generator = torch.Generator("cpu")


_FOR_CPU = _ForCPU()


def mix_seeds(*seeds: int) -> int:
    """A 63-bit seed in which each input matters (SplitMix64's finaliser over the running sum)."""
    mask, z = 2**64 - 1, 0
    for seed in seeds:
        z = (z + (seed & mask) + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
    return z >> 1


class Noise:
    """The displacement `sign * sigma * z` with `z` drawn from `law` and a seed.

    Args:
        like: the parameters; entry `i` is drawn with the shape, dtype and device of `like[i]`.
        sigma: standard deviation per parameter. Entries with 0 are not moved.
        law: "normal", "uniform", "laplace", "rademacher" or "binomial"; all have mean 0 and variance 1.
        seed: the whole draw is a function of it.
        scale: "absolute", or "filter": sigma is then in units of the norm of the filter that an entry belongs to (its
            row along the leading dimension; all of a vector), as it is when the noise is made.
        keep: hold the draw in memory (one copy of the parameters) so that `-u` costs nothing; `False` draws it
            again at every use, tensor by tensor.
    """

    def __init__(
        self,
        like: Sequence[Tensor],
        sigma: Radii,
        law: str,
        seed: int,
        *,
        scale: Scale = "absolute",
        keep: bool = True,
    ):
        self._like = like
        self._sigma = sigma
        self._law = law
        self._seed = seed
        self._keep = keep
        self._sharded = any_sharded(like)
        self._support = [i for i, one in enumerate(sigma.values) if one > 0]
        self._norms: dict[int, Tensor] | None = None
        if scale == "filter":  # of those that are moved: others may be of a type that has no norm
            self._norms = dict(zip(self._support, filter_norms([like[i] for i in self._support]), strict=True))
        self._sign = 1.0
        self._drawn: list[Vector] = []  # shared with -self, so that one draw serves both

    def __neg__(self) -> Noise:
        other = Noise.__new__(Noise)
        other.__dict__.update(self.__dict__)
        other._sign = -self._sign
        return other

    @property
    def support(self) -> list[int]:
        """The indices of the parameters that are moved."""
        return self._support

    def vector(self) -> Vector:
        """The displacement as a dense Vector (the draw times sigma times the sign)."""
        return self._scaled_draw() * self._sign

    def add_to(self, params: Sequence[Tensor], sign: float = 1.0) -> None:
        """Adds `sign` times this displacement to `params` in place."""
        if self._keep:
            self._scaled_draw().add_to(params, sign * self._sign)
        else:
            for i, z in self._draws():
                local(params[i]).add_(local(z), alpha=sign * self._sign)

    def put(self, params: Sequence[Tensor], origin: Mapping[int, Tensor], sign: float = 1.0) -> bool:
        """Writes `origin` plus `sign` times this displacement to `params`, if they are ordinary; whether it has."""
        if self._keep:
            return self._scaled_draw().put(params, origin, sign * self._sign)
        if self._sharded:
            return False
        for i, z in self._draws():
            torch.add(origin[i], z, alpha=sign * self._sign, out=params[i])
        return True

    def _scaled_draw(self) -> Vector:
        if self._drawn:
            return self._drawn[0]
        entries: list[Tensor | None] = [None] * len(self._like)
        for i, z in self._draws():
            entries[i] = z
        vector = Vector(entries)
        if self._keep:
            self._drawn.append(vector)
        return vector

    def _draws(self) -> Iterator[tuple[int, Tensor]]:
        of_kinds = kinds(self._like, sharded=self._sharded)
        generators: dict[torch.device, torch.Generator] = {CPU: _FOR_CPU.generator}
        for slab in slabs(of_kinds, tuple(self._support), SMALL, BLOCK):
            device = of_kinds[slab.order[0]][2]
            if device not in generators:
                generators[device] = torch.Generator(device)
            for i, z in zip(slab.order, self._draw_slab(slab, generators[device]), strict=True):
                if self._norms is not None:
                    z.mul_(self._norms[i])
                yield i, made_of(z, self._like[i]) if self._sharded else z

    def _draw_slab(self, slab: Slab, generator: torch.Generator) -> Sequence[Tensor]:
        """This process's parts of the draws in `slab`."""
        law, scale = self._law, self._sigma.values[slab.order[0]]
        if slab.simple:
            generator.manual_seed(mix_seeds(self._seed + slab.pieces[0].key))
            return (_fill(torch.empty_like(self._like[slab.order[0]], requires_grad=False), law, scale, generator),)
        members, scales = [self._like[i] for i in slab.order], [self._sigma.values[i] for i in slab.order]
        alike = scales.count(scale) == len(scales)
        first = local(members[0]) if self._sharded else members[0]
        flat = first.new_empty(sum(slab.sizes), requires_grad=False)
        outs = (flat,) if len(slab.pieces) == 1 else flat.split_with_sizes(slab.sizes)
        for piece, out in zip(slab.pieces, outs, strict=True):
            generator.manual_seed(mix_seeds(self._seed + piece.key))
            _draw_piece(out, piece, law, scale if alike else 1.0, generator)
        if slab.views is not None:
            draws = [flat.as_strided(*view) for view in slab.views]
        else:
            draws = [cut(flat, at, like) for at, like in zip(slab.offsets, members, strict=True)]
        if not alike:
            for z, factor in zip(draws, scales, strict=True):
                z.mul_(factor)
        return draws


def _draw_piece(out: Tensor, piece: Piece, law: str, scale: float, generator: torch.Generator) -> None:
    if out.numel() == piece.numel:
        _fill(out, law, scale, generator)
    else:
        out.copy_(_fill(out.new_empty(piece.numel), law, scale, generator)[piece.first : piece.last])


def filter_norms(weights: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each filter (row along the leading dimension; all of a vector), to multiply this process's part.

    Cost: nothing is exchanged for whole rows. All vectors that are cut into shards: one all-reduce, a number each.
    """
    norms = [_row_norms(w.detach()) for w in weights]
    cut = [i for i, w in enumerate(weights) if w.ndim < 2 and is_sharded(w)]
    squares = summed_apart([norms[i].square() for i in cut], [weights[i] for i in cut])
    for i, square in zip(cut, squares, strict=True):
        norms[i] = square.sqrt()
    return norms


def times_norms(v: Vector, norms: Sequence[Tensor]) -> Vector:
    """Each entry of `v`, which has all of them, times numbers of its filters, such as `filter_norms` gives."""
    return Vector(made_of(local(t) * n, t) for t, n in zip(v.present, norms, strict=True))


def _row_norms(weight: Tensor) -> Tensor:
    if weight.ndim < 2:
        return torch.linalg.vector_norm(local(weight))
    dims = tuple(range(1, weight.ndim))
    return torch.linalg.vector_norm(whole_rows(weight), dim=dims, keepdim=True)
