"""Whether a displacement arrives at weights that are stored in 16 bits.

Next to a weight w the numbers that bf16 has are |w| / 256 apart or more, and a way of less than half of that leads back
to w.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flatmin.notices import warn
from flatmin.shards import parts
from flatmin.vectors import Displacement

NARROW = (torch.bfloat16, torch.float16)
TOLERATED = 0.5  # of the length of a displacement; 1 where nothing of it arrives


def warn_if_lost(displacement: Displacement, params: Sequence[Tensor], name: str, radius_name: str) -> None:
    """Warns if a displacement of the 16-bit ones of `params` would not arrive for rounding, or as another one.

    Cost: a copy of the parameters for a moment, and a host synchronisation; nothing without such parameters.
    """
    narrow = [i for i in displacement.support if params[i].dtype in NARROW]
    if not narrow:
        return
    error = rounding_error(displacement, params, narrow)
    if error > TOLERATED:
        kind = str(params[narrow[0]].dtype).removeprefix("torch.")
        warn(
            f"{name}: weights are stored in {kind}, and rounding changes the displacement by {error:.0%} of its length "
            f"(by 100% where nothing of it arrives, and the step is a plain one). Keep the weights in float32 and "
            f"compute in {kind} (torch.autocast), or take a larger {radius_name}.",
            RuntimeWarning,
        )


def rounding_error(displacement: Displacement, params: Sequence[Tensor], which: Sequence[int]) -> float:
    """|(W + d as it is stored) - W - d| / |d| over the parameters `which`, of this process; 0 for d = 0."""
    moved = set(displacement.support)
    trial = [p.detach().clone() if i in moved else p.detach() for i, p in enumerate(params)]
    displacement.add_to(trial)
    for i in moved:
        trial[i].sub_(params[i].detach())  # exact: these numbers are near each other
    displacement.add_to(trial, sign=-1.0)
    missing = _length([trial[i] for i in which])
    for i in moved:
        trial[i].zero_()
    displacement.add_to(trial)
    whole = _length([trial[i] for i in which])
    return missing / whole if whole else 0.0


def _length(tensors: Sequence[Tensor]) -> float:
    return math.hypot(*[torch.linalg.vector_norm(t, dtype=torch.float32).item() for t in parts(tensors)])
