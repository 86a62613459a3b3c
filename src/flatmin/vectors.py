"""Points and directions in parameter space.

    Vector          a list of tensors, one per parameter, with the arithmetic of one long vector and *the* global norm
    Displacement    whatever can add itself to parameters

A missing entry (`None`) is a zero that takes no memory: a parameter that the loss does not use, or one that a
method leaves alone. This module, on top of `entries`, is the only one that knows about `foreach` kernels, sparse
gradients and low precision; it knows nothing of models, losses or optimizers. Entries may be sharded over processes
(flatmin.shards): norms and inner products are over all of them, so every process must ask for them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, reduce
from typing import Protocol

import torch
from torch import Tensor

from flatmin.entries import STRIDED, add_in_place, added, inner, scaled, size_in_units, stacked, total, values
from flatmin.shards import ORDINARY, any_sharded, local, parts

SQUARABLE = 1e-15  # a norm above it has lost nothing to squares that underflow in fp32
COUNTABLE = (torch.float32, torch.float64)  # a norm of such tensors on the CPU can be had as a number without cost


class _Flags(threading.local):
    """What GradScaler's kernel needs: a flag that it sets, and a factor."""

    def __init__(self) -> None:
        with torch.inference_mode(False):  # of whoever asks first in this thread
            self.found, self.one = torch.zeros((), device="cpu"), torch.ones((), device="cpu")


_FLAGS = _Flags()


@lru_cache(maxsize=64)
def _number(value: float, dtype: torch.dtype) -> Tensor:
    """A number as kernels on the CPU take it: from one in Python each call for each tensor makes such a tensor anew."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


class Displacement(Protocol):
    """Something that can add itself to parameters in place: a Vector, or noise drawn from a seed."""

    @property
    def support(self) -> list[int]:
        """The indices of the parameters that are moved."""
        ...

    def add_to(self, params: Sequence[Tensor], sign: float = 1.0) -> None:
        """Adds `sign` times the displacement to `params` in place."""
        ...


class Vector:
    """A point or direction in parameter space: `tensors[i]` belongs to parameter `i`, and `None` is zero.

        v + w, v - w, -v, 2 * v, v / 2      entry by entry; a factor may be a 0-dim tensor, which stays on its device
        v.dot(w)                            sum_i <v_i, w_i> over the entries that both have, a 0-dim tensor
        v.norm()                            sqrt(sum_i |v_i|^2), one norm over all entries, a 0-dim tensor
        v.unit()                            v / |v|; a zero vector stays zero
        v.times(w)                          v_i w_i, entry by entry
        v.reject(w)                         v - (v.w / w.w) w, the part orthogonal to w

    These leave their operands alone (an entry that one operand lacks may be shared with the other); methods that end
    in an underscore do not. Gradients (`objective.gradient()`), products (`operator.product(v)`), eigenvectors
    (`result.vectors`) and directions (`random_direction(objective)`) are Vectors, in the order of `objective.params`.
    Of parameters that are sharded (FSDP2) `dot` and `norm` are over all shards, and every process must ask for them.

    Args:
        tensors: one for each parameter, of its shape; they are kept, not copied.
        plain: whether all are there, dense and whole, if that is known.

    Cost: one pass over the memory, and one copy of the entries for each result that is a Vector.

    Raises:
        ValueError: for two vectors with different numbers of entries.

    Example:
        v = flatmin.random_direction(objective).unit()
        curvature_along_v = v.dot(flatmin.HessianOperator(objective).product(v))
    """

    __slots__ = ("__weakref__", "_countable", "_plain", "tensors")

    def __init__(self, tensors: Iterable[Tensor | None], plain: bool | None = None):
        self.tensors: tuple[Tensor | None, ...] = tuple(tensors)
        self._plain = plain  # `None`: not known yet
        self._countable: bool | None = None

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        shapes = [None if t is None else tuple(t.shape) for t in self.tensors]
        return f"Vector({shapes})"

    @property
    def plain(self) -> bool:
        """Whether every entry is present, dense, and whole on this process: nearly always."""
        if self._plain is None:
            self._look()
        return self._plain  # type: ignore[return-value]

    @property
    def countable(self) -> bool:
        """Whether it is plain, and a norm can be had as a number without cost: fp32 or wider, on the CPU."""
        if self._countable is None:
            self._look()
        return self._countable  # type: ignore[return-value]

    def _look(self) -> None:
        self._plain = self._countable = True
        for t in self.tensors:
            if type(t) not in ORDINARY or t.layout is not STRIDED:  # type: ignore[union-attr]
                self._plain = self._countable = False
                return
            if not t.is_cpu or t.dtype not in COUNTABLE:  # type: ignore[union-attr]
                self._countable = False

    @property
    def support(self) -> list[int]:
        """The indices of the entries that are present."""
        if self.plain:
            return list(range(len(self.tensors)))
        return [i for i, t in enumerate(self.tensors) if t is not None]

    @property
    def present(self) -> list[Tensor]:
        """The entries that are present, in order."""
        if self.plain:
            return list(self.tensors)  # type: ignore[arg-type]
        return [t for t in self.tensors if t is not None]

    @property
    def complete(self) -> bool:
        """Whether no entry is missing."""
        return self.plain or all(t is not None for t in self.tensors)

    def with_present(self, tensors: Iterable[Tensor]) -> Vector:
        """A vector with the same support as this one and the given entries."""
        entries = iter(tensors)
        return Vector(entries if self.complete else [None if t is None else next(entries) for t in self.tensors])

    def __mul__(self, scalar: float | Tensor) -> Vector:
        if self.plain and self.tensors and not isinstance(scalar, Tensor):
            return Vector(torch._foreach_mul(self.tensors, self._factor(scalar)), plain=True)  # type: ignore[arg-type]
        return self.with_present(scaled(self.present, scalar))

    __rmul__ = __mul__

    def __truediv__(self, scalar: float | Tensor) -> Vector:
        return self * (1.0 / scalar)

    def __neg__(self) -> Vector:
        return self * -1.0

    def __add__(self, other: Vector) -> Vector:
        return self._plus(other, 1.0)

    def __sub__(self, other: Vector) -> Vector:
        return self._plus(other, -1.0)

    def _plus(self, other: Vector, alpha: float) -> Vector:
        _same_length(self, other)
        pairs = [(a, b) for a, b in zip(self.tensors, other.tensors, strict=True)]
        both = [(a, b) for a, b in pairs if a is not None and b is not None]
        sums = iter(added([a for a, _ in both], [b for _, b in both], alpha))
        return Vector(
            next(sums) if a is not None and b is not None else a if a is not None else None if b is None else b * alpha
            for a, b in pairs
        )

    def times(self, other: Vector) -> Vector:
        """The product entry by entry; a missing entry of either is zero."""
        _same_length(self, other)
        return Vector(
            None if a is None or b is None else a * b for a, b in zip(self.tensors, other.tensors, strict=True)
        )

    def apply(self, function: Callable[[Tensor], Tensor]) -> Vector:
        """`function` of every present entry; it must map zero to zero if missing entries are to stay right."""
        return self.with_present(function(t) for t in self.present)

    def within(self, other: Vector) -> Vector:
        """The entries that `other` has too; nothing is copied."""
        if other.complete:
            return self
        return Vector(None if b is None else a for a, b in zip(self.tensors, other.tensors, strict=True))

    def reject(self, other: Vector) -> Vector:
        """The part orthogonal to `other`: `v - (v.o / o.o) o`; all of it where `other` is zero."""
        share = self.dot(other) / other.dot(other)
        return self - other * torch.nan_to_num(share, nan=0.0, posinf=0.0, neginf=0.0)

    def dot(self, other: Vector) -> Tensor:
        """The inner product over the common support, a 0-dim tensor (fp32 or wider); of complex entries as pairs."""
        _same_length(self, other)
        pairs = zip(self.tensors, other.tensors, strict=True)
        common = [(a, b) for a, b in pairs if a is not None and b is not None]
        terms = [inner(local(a), local(b)) for a, b in common]
        return total(terms, [a for a, _ in common])

    def norm(self) -> Tensor:
        """The Euclidean norm over all present entries together, a 0-dim tensor (fp32 or wider)."""
        tensors = [values(t) for t in parts(self.present)]
        if not tensors:
            return torch.zeros((), device="cpu")
        dtypes = {t.dtype for t in tensors}
        dtype = torch.float32 if dtypes == {torch.float32} else reduce(torch.promote_types, dtypes, torch.float32)
        norms = torch._foreach_norm(tensors, 2, dtype)
        if any_sharded(self.present):
            return total([n.double().square() for n in norms], self.present).sqrt().to(dtype)
        return torch.linalg.vector_norm(stacked(norms))

    def inverse_norm(self) -> Tensor:
        """1 / |v|, a 0-dim tensor; 0 for a zero vector, which times that stays zero."""
        return self.norm().reciprocal().nan_to_num(nan=0.0, posinf=0.0)

    def unit(self) -> Vector:
        """The vector of norm 1 in this direction; a zero vector stays zero."""
        return self * self.inverse_norm()

    def size(self) -> float | Tensor:
        """`norm()`, as a number where that costs nothing (on the CPU), and else as a tensor on its device."""
        if self.countable:
            size = math.hypot(*[torch.linalg.vector_norm(t).item() for t in self.tensors])  # type: ignore[arg-type]
            return size if SQUARABLE < size < math.inf else size_in_units(self.present)
        norm, tensors = self.norm(), self.present
        if not all(t.is_cpu and t.dtype in COUNTABLE for t in tensors):
            return norm
        size = norm.item()
        if SQUARABLE < size < math.inf or any_sharded(tensors):
            return size
        return size_in_units([values(t) for t in tensors])

    def isfinite(self) -> bool:
        """Whether every entry is finite. One host synchronisation; a second look if the norm overflows."""
        if math.isfinite(self.size()):
            return True
        bad = [torch.isfinite(values(t)).logical_not().sum() for t in parts(self.present)]
        return not bool(total(bad, self.present))

    def isfinite_(self) -> bool:
        """The same at less cost on the CPU, in one call for all entries; it may write over them what they are."""
        if not self.countable:
            return self.isfinite()
        found = _FLAGS.found
        try:
            torch._amp_foreach_non_finite_check_and_unscale_(self.tensors, found, _FLAGS.one)  # type: ignore[arg-type]
            if not found.item():
                return True
        except RuntimeError:  # it refuses expanded memory, perhaps half way
            pass
        found.zero_()
        return self.isfinite()  # a second look: an interrupt may have left the flag set

    def add_to(self, params: Sequence[Tensor], sign: float = 1.0) -> None:
        """Adds `sign` times this vector to `params` in place (the Displacement protocol)."""
        if self.plain:
            if self.tensors:
                torch._foreach_add_(params, self.tensors, alpha=sign)  # type: ignore[arg-type]
        else:
            add_in_place([params[i] for i in self.support], self.present, sign)

    def put(self, params: Sequence[Tensor], origin: Mapping[int, Tensor], sign: float = 1.0) -> bool:
        """Writes `origin + sign * self` to `params`, if every entry is present and ordinary; whether it has."""
        if self.plain:
            for i, t in enumerate(self.tensors):
                torch.add(origin[i], t, alpha=sign, out=params[i])  # type: ignore[call-overload]
        return self.plain

    def add_(self, other: Vector, scale: float = 1.0) -> Vector:
        """`self + scale * other`, in the memory of this vector, which must not be used afterwards."""
        _same_length(self, other)
        if self.plain and other.plain:
            other.add_to(self.tensors, scale)  # type: ignore[arg-type]
            return self
        if self.complete and other.complete:
            add_in_place(self.present, other.present, scale)
            return self
        pairs = list(zip(self.tensors, other.tensors, strict=True))
        both = [(a, b) for a, b in pairs if a is not None and b is not None]
        Vector(b for _, b in both).add_to([a for a, _ in both], scale)
        return Vector(a if b is None or a is not None else b * scale for a, b in pairs)

    def copy(self) -> Vector:
        """The same vector in memory of its own."""
        return self.apply(lambda t: t.detach().clone())

    def own_(self) -> None:
        """Moves the entries to memory that nobody else writes to."""
        self.tensors = self.copy().tensors

    def scale_(self, factor: float) -> None:
        """Multiplies the entries by `factor` in place."""
        if self.support and factor != 1.0:
            torch._foreach_mul_(parts(self.present), self._factor(factor))

    def _factor(self, number: float) -> float | Tensor:
        """The same number in the form that multiplies the entries soonest."""
        if self.countable and len({t.dtype for t in self.tensors}) == 1:  # type: ignore[union-attr]
            return _number(number, self.tensors[0].dtype)  # type: ignore[union-attr]
        return number


def _same_length(a: object, b: object) -> None:
    if len(a) != len(b):  # type: ignore[arg-type]
        raise ValueError(f"vectors of different spaces: {len(a)} entries against {len(b)}.")  # type: ignore[arg-type]
