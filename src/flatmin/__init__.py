"""flatmin: find flat minima of PyTorch models, and measure how flat they are.

Training    NSO, SAM around any `torch.optim` optimizer; `methods()` lists them by name
Measuring   `measure(model, criterion, data)`, or `Objective` with `trace` and `top_eigenvalues`
Problems    functions with known gradients, Hessians and spectra
"""

from flatmin import problems
from flatmin.curvature import (
    EigenResult,
    FlatnessReport,
    Measurement,
    Objective,
    TraceResult,
    measure,
    top_eigenvalues,
    trace,
)
from flatmin.optim import NSO, SAM, FlatOptimizer, Probe, methods

__version__ = "0.1.0"

__all__ = [
    "NSO",
    "SAM",
    "EigenResult",
    "FlatOptimizer",
    "FlatnessReport",
    "Measurement",
    "Objective",
    "Probe",
    "TraceResult",
    "measure",
    "methods",
    "problems",
    "top_eigenvalues",
    "trace",
]
