"""flatmin: find flat minima of PyTorch models, and measure how flat they are."""

from flatmin import problems
from flatmin.optim import NSO, SAM, FlatOptimizer, methods

__version__ = "0.1.0"

__all__ = [
    "NSO",
    "SAM",
    "FlatOptimizer",
    "methods",
    "problems",
]
