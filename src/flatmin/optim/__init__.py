"""Training: rules, the engine that runs them, and the registry of methods."""

from flatmin.optim.engine import FlatOptimizer
from flatmin.optim.nso import NSO
from flatmin.optim.options import EngineOptions
from flatmin.optim.registry import Method, get_method, methods, register
from flatmin.optim.rule import HERE, Displacement, Probe, Rule, drive
from flatmin.optim.sam import SAM

__all__ = [
    "HERE",
    "NSO",
    "SAM",
    "Displacement",
    "EngineOptions",
    "FlatOptimizer",
    "Method",
    "Probe",
    "Rule",
    "drive",
    "get_method",
    "methods",
    "register",
]
