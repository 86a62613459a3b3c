"""What every method takes beside its own arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

from torch import Tensor, nn

from flatmin.place import Restore


class EngineOptions(TypedDict, total=False):
    """What every method takes beside its own arguments.

    model: the model, needed only where it cannot be found by itself (a compiled one, see flatmin.quiet). Then only what
        is in it is looked after: `nn.ModuleList([model, criterion])` for a loss with buffers.
    perturb: the parameters that may be moved, e.g. `flatmin.norm_parameters(model)`; `None` for all. All of them are
        trained; the norm is over the moved ones.
    restore: "exact" (default) keeps one copy of the moved parameters while they are away; "recompute" keeps none
        and costs rounding (see flatmin.place). It pays for NSO (with `low_memory`), RSP, SAP, GSAM, WSAM and BSAM; the
        others hold the displacement instead, which is as large.
    low_memory: draw noise again from its seed instead of holding it: one copy of the parameters less. Up to 65,536
        elements are drawn together in any case, so that a small network gains nothing.
    guard: skip the step, count it and warn when a loss or the direction is not finite (one host synchronisation).
    every, start, stop: perturb only at steps t with start <= t < stop and (t - start) % every == 0; the other steps
        are the base optimizer's.
    """

    model: nn.Module | None
    perturb: Iterable[Tensor] | None
    restore: Restore
    low_memory: bool
    guard: bool
    every: int
    start: int
    stop: int | None
