"""Moving parameters away from the weights and bringing them back, bit for bit.

Whoever moves the parameters puts them back: in place (`data_ptr` never changes), for every moved parameter, whatever
happened in between. Two ways, one choice:

    exact       a copy of the moved parameters is kept while they are away; coming back is a copy: no drift, ever
    recompute   nothing is kept; the displacement is subtracted again. Saves one copy of the parameters and costs
                rounding: each return is off by up to one unit in the last place of W + U, so fp32 weights drift by
                about 1e-7 |W| sqrt(steps) and bf16 weights by 4e-3 |W| sqrt(steps) (do not use it there). An
                exception in the caller's code is undone; an interrupt in the very middle of a move cannot be
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from flatmin.optim.rule import Displacement
from flatmin.vectors import Vector

Restore = Literal["exact", "recompute"]


def check_restore(restore: str) -> str:
    """Returns `restore` if it is known, else raises a `ValueError`."""
    if restore not in get_args(Restore):
        raise ValueError(f"restore must be 'exact' or 'recompute', got {restore!r}.")
    return restore


class Place:
    """Where the parameters are. `home()` may be called at any time and any number of times."""

    def __init__(self, params: Sequence[Tensor], restore: str = "exact"):
        self._params = params
        self._exact = restore == "exact"
        self._saved = Vector([None] * len(params))
        self._moved = False
        self._away: Displacement | None = None  # kept only where it is needed for the way back

    @torch.no_grad()
    def move(self, displacement: Displacement | None) -> None:
        """Puts the parameters at `W + displacement`, wherever they were (`None`: at W)."""
        self._return()
        if displacement is None:
            return
        if self._exact:
            self._save(displacement.support)
        else:
            self._away = displacement
        self._moved = True  # first: whatever happens during the next line, home() undoes it
        displacement.add_to(self._params)
        torch.clear_autocast_cache()

    @torch.no_grad()
    def home(self) -> None:
        """Puts the parameters back at W and forgets the copy."""
        self._return()
        self._saved = Vector([None] * len(self._params))

    def _save(self, support: list[int]) -> None:
        entries = list(self._saved.tensors)
        for i in support:
            if entries[i] is None:
                entries[i] = self._params[i].detach().clone()
        self._saved = Vector(entries)

    def _return(self) -> None:
        if not self._moved:
            return
        if self._away is None:
            self._saved.copy_to(self._params)
        else:
            self._away.add_to(self._params, sign=-1.0)
        self._moved, self._away = False, None
        torch.clear_autocast_cache()
