"""Random displacements that can be drawn again.

Every law here is symmetric about 0 with unit variance, so that with U = sigma z the smoothed loss is

    E f(W + U) = f(W) + sigma^2 / 2 tr(Hessian f(W)) + O(sigma^4)

whatever the law. A draw is a pure function of (seed, step, index): a resumed run continues the same stream from a
step count alone, the global random state is never touched, and `-u` is the same draw with the other sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from flatmin.vectors import Radii, Vector

Law = Literal["normal", "uniform", "laplace", "rademacher", "binomial"]


Scale = Literal["absolute", "filter"]


def _normal(out: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    return out.normal_(0.0, scale, generator=generator)


def _uniform(out: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    return out.uniform_(-math.sqrt(3) * scale, math.sqrt(3) * scale, generator=generator)


def _rademacher(out: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    return out.random_(0, 2, generator=generator).mul_(2 * scale).sub_(scale)


def _laplace(out: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    # A random sign times an exponential of mean 1/sqrt(2) has variance 2 * (1/sqrt(2))^2 = 1.
    signs = _rademacher(torch.empty_like(out), scale, generator)
    return out.exponential_(math.sqrt(2), generator=generator).mul_(signs)


def _binomial(out: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    # Four fair coins less their mean: -2 .. 2, mean 0, variance 4 * 1/4 = 1. The published code forgets the mean.
    coins = out.random_(0, 16, generator=generator).to(torch.int32)
    ones = sum((coins >> bit) & 1 for bit in range(4))
    return out.copy_(ones - 2).mul_(scale)  # type: ignore[operator]


_DRAW: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
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
    """One draw from `law` (mean 0, standard deviation `scale`) with the shape, dtype and device of `tensor`."""
    return _DRAW[law](torch.empty_like(tensor, requires_grad=False), scale, generator)


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
        self._norms = [filter_norms(p) for p in like] if scale == "filter" else None
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
        return [i for i, sigma in enumerate(self._sigma.values) if sigma > 0]

    def vector(self) -> Vector:
        """The displacement as a dense Vector (the draw times sigma times the sign)."""
        return self._scaled_draw() * self._sign

    def add_to(self, params: Sequence[Tensor], sign: float = 1.0) -> None:
        """Adds `sign` times this displacement to `params` in place."""
        if self._keep:
            self._scaled_draw().add_to(params, sign * self._sign)
        else:
            for i, z in self._draws():
                params[i].add_(z, alpha=sign * self._sign)

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

    def _draws(self):
        generators: dict[torch.device, torch.Generator] = {}
        for i in self.support:
            device = self._like[i].device
            if device not in generators:
                generator = torch.Generator(device)
                # The count keeps the streams of several devices apart.
                generator.manual_seed(mix_seeds(self._seed, len(generators)))
                generators[device] = generator
            z = draw_like(self._like[i], self._law, generators[device], self._sigma.values[i])
            yield i, z if self._norms is None else z.mul_(self._norms[i])


def filter_norms(weight: Tensor) -> Tensor:
    """The norm of each filter, of a shape that multiplies `weight`."""
    dims = tuple(range(1, weight.ndim)) if weight.ndim > 1 else None
    return torch.linalg.vector_norm(weight.detach(), dim=dims, keepdim=weight.ndim > 1)
