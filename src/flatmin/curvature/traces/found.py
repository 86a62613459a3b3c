"""What a way to a trace has found."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Found:
    """A trace: `constant`, known exactly for each parameter, and the mean of `samples` (probes, parameters)."""

    method: str
    constant: np.ndarray | float = 0.0
    samples: np.ndarray = field(default_factory=lambda: np.empty((0, 1)))
    num_products: int = 0
    num_gradients: float = 0.0

    @property
    def exact(self) -> float:
        """The part of the value that has no error."""
        return float(np.sum(self.constant))
