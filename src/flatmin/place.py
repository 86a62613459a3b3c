"""Moving parameters away from the weights and bringing them back, bit for bit.

Whoever moves the parameters puts them back: in place (`data_ptr` never changes), for every moved parameter, whatever
happened in between. Two ways, one choice:

    exact       a copy of the moved parameters is kept while they are away; coming back is a copy: no drift, ever
    recompute   nothing is kept; the displacement is subtracted again. Saves one copy of the parameters, where the
                displacement is held anyway or can be drawn again, and costs rounding: each return is off by up to one
                unit in the last place of W + U, so fp32 weights drift by about 1e-7 |W| sqrt(steps) and bf16 weights
                by 4e-3 |W| sqrt(steps) (do not use it there). An exception in the caller's code is undone; an
                interrupt in the very middle of a move cannot be
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from flatmin.notices import warn
from flatmin.shards import is_sharded, parts
from flatmin.vectors import Displacement, Vector
from flatmin.versions import unversioned

_num_displaced = 0
_announced: dict[int, Place] = {}  # those of loops that are under way
_worn: dict[int, Place] = {}  # those where a model shows other weights for a while

Restore = Literal["exact", "recompute"]


@contextmanager
def displaced(params: Sequence[Tensor]) -> Iterator[Place]:
    """Inside, `params` can be moved; on leaving they are home, and nobody can tell that they were away.

    Not even a graph that saved them before (but of shards, which are gathered anew, a new version is counted).
    """
    global _num_displaced
    place = Place(params)
    with unversioned(p for p in params if not is_sharded(p)):
        try:
            try:
                yield place
            finally:
                _num_displaced += 1
                place.home()
        finally:  # an interrupt inside the first one is undone here
            place.home()


def num_displaced() -> int:
    """How often anything was `displaced`: versions do not tell a graph that was built in the meantime from others."""
    return _num_displaced


def warn_if_away(params: Iterable[Tensor], what: str) -> None:
    """Warns if some of `params` are displaced by a training step that is under way."""
    if not _announced:
        return
    asked = {id(p) for p in params}
    if any(id(p) in asked for place in _announced.values() if place._moved for p in place._params):
        warn(
            f"{what} inside the body of a probes() loop: the weights are displaced there, so it is not about your "
            "model. Move it after the loop.",
            RuntimeWarning,
        )


def refuse_if_worn(params: Iterable[Tensor]) -> None:
    """Raises a `ValueError` if some of `params` show an average: what a step does to them there would be undone."""
    if _worn:
        worn = {id(p) for place in _worn.values() for p in place._params}
        if any(id(p) in worn for p in params):
            raise ValueError(
                "a training step inside averager.applied(): the weights there are the average, and the step would be "
                "undone on leaving. Move it out of the block."
            )


def refuse_if_cached() -> None:
    """Raises a `ValueError` inside `parametrize.cached()`: what is computed from weights there stays."""
    if getattr(parametrize, "_cache_enabled", 0):
        raise ValueError(
            "inside torch.nn.utils.parametrize.cached() parametrized weights stay as they were computed, so that "
            "moving their originals changes nothing. Leave the block first, or enter it for single forward passes."
        )


class Place:
    """Where the parameters are. `home()` may be called at any time and any number of times."""

    def __init__(self, params: Sequence[Tensor], restore: str = "exact"):
        self._params = params
        self._exact = restore == "exact"
        self._saved: dict[int, Tensor] = {}
        self._moved = False
        self._away: Displacement | None = None  # kept only where it is needed for the way back

    def move(self, displacement: Displacement | None) -> None:
        """Puts the parameters at `W + displacement`, wherever they were (`None`: at W)."""
        if self._moved:
            if displacement is not None and self._crosses_to(displacement):
                return
            self._return()
        if displacement is None:
            return
        values = self._values()
        if not self._exact:
            self._away = displacement = _own(_finite(displacement))
        elif len(self._saved) < len(values):
            self._save(values, displacement.support)
        self._moved = True  # first: whatever happens during the next line, home() undoes it
        displacement.add_to(values)
        torch.clear_autocast_cache()

    def announce(self, *, worn: bool = False) -> None:
        """Lets `warn_if_away` (or, if `worn`, `refuse_if_worn`) know of it, until `withdraw`."""
        (_worn if worn else _announced)[id(self)] = self

    def withdraw(self) -> None:
        """Takes back what `announce` said."""
        _announced.pop(id(self), None)
        _worn.pop(id(self), None)

    def home(self) -> None:
        """Puts the parameters back at W and forgets the copy."""
        if self._moved:
            self._return()
        self._saved = {}

    def _values(self) -> list[Tensor]:
        # Without a history. An interrupt at the end of `no_grad` could leave gradients switched off.
        return [p.detach() for p in self._params]

    def _crosses_to(self, displacement: Displacement) -> bool:
        """Goes from one place away to another, not by way of W: one pass over the memory instead of two."""
        put = getattr(displacement, "put", None)
        if put is None or not self._exact or displacement.support != [*self._saved]:
            return False
        if not put(self._values(), self._saved):
            return False
        torch.clear_autocast_cache()
        return True

    def _save(self, values: list[Tensor], support: list[int]) -> None:
        here = parts(values)
        for i in support:
            if i not in self._saved:
                self._saved[i] = here[i].clone()

    def _return(self) -> None:
        if self._away is not None:
            self._away.add_to(self._values(), sign=-1.0)
        elif self._saved:
            away = [self._params[i].detach() for i in self._saved]
            torch._foreach_copy_(parts(away), [*self._saved.values()])
        self._moved, self._away = False, None
        torch.clear_autocast_cache()


def _finite(displacement: Displacement) -> Displacement:
    """Without a copy of the weights a displacement that is not finite could not be taken back."""
    is_finite = getattr(displacement, "isfinite", None)  # noise has none: it is
    return displacement if is_finite is None or is_finite() else Vector([])


def _own(displacement: Displacement) -> Displacement:
    """What is needed for the way back must not lie where others write, as a gradient may."""
    copy = getattr(displacement, "copy", None)
    return displacement if copy is None else copy()
