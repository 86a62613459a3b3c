"""Finding our optimizer inside a framework's wrappers."""

from __future__ import annotations

from typing import Any

from flatmin.optim.engine.optimizer import FlatOptimizer

NOT_OURS = (
    "{where} needs a flatmin optimizer, got {name}. Wrap the one that you have: "
    "flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)."
)


def flat_optimizer(optimizer: Any, where: str) -> FlatOptimizer:
    """The `FlatOptimizer` inside `optimizer`, which may be wrapped by Accelerate or Lightning.

    Raises:
        ValueError: if there is none.
    """
    inner = optimizer
    while not isinstance(inner, FlatOptimizer):
        inner = getattr(inner, "optimizer", None) or getattr(inner, "_optimizer", None)
        if inner is None:
            raise ValueError(NOT_OURS.format(where=where, name=type(optimizer).__name__))
    return inner
