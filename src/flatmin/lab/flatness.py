"""How flat a model is on its training data: what a run of a comparison ends with."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from flatmin.curvature import Objective, ascent_sharpness, measure

# The ball |d / w| <= 1/2, ASAM's own radius, in which one ascent of ten steps finds nearly what more find.
ADAPTIVE: dict[str, Any] = {"rho": 0.5, "metric": "adaptive", "num_starts": 1, "num_steps": 10}


def flatness_of(model: nn.Module, criterion: nn.Module, data: tuple[Tensor, Tensor], seed: int) -> dict[str, Any]:
    """Entries of a run's result: trace and largest eigenvalue, and a rise that the scale of the weights has no part in.

    Cost: that of `measure`, and at most twelve gradients of the data.

    Raises:
        ValueError: for numbers that are not finite. Weights that are may still have no finite Hessian.
    """
    report = measure(model, criterion, [data], seed=seed)
    for name in ("trace", "top_eigenvalue"):
        value = getattr(report, name).value
        if not math.isfinite(value):
            raise ValueError(f"the {name} is {value}")
    rise = ascent_sharpness(Objective(model, criterion, [data]), seed=seed, **ADAPTIVE)
    return {"flatness": report.to_dict(), "adaptive_sharpness": rise.value}
