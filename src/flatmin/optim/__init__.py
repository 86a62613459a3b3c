"""Training: rules, the engine that runs them, and the registry of methods."""

from flatmin.optim.companions.averaging import Averager
from flatmin.optim.companions.distance import DistancePenalty, DistanceProjection
from flatmin.optim.companions.mixup import mixup
from flatmin.optim.engine.optimizer import FlatOptimizer
from flatmin.optim.escape import RSP, SAP
from flatmin.optim.monge import MongeSAM
from flatmin.optim.nso import NSO
from flatmin.optim.options import EngineOptions
from flatmin.optim.registry import Method, get_method, methods, register
from flatmin.optim.relatives import (
    BSAM,
    ESAM,
    GSAM,
    WSAM,
    EigenSAM,
    FisherSAM,
    FriendlySAM,
    LookSAM,
    MomentumSAM,
    RandomSAM,
)
from flatmin.optim.rule import HERE, Displacement, Probe, Rule, drive
from flatmin.optim.sam import SAM
from flatmin.optim.select import norm_parameters

__all__ = [
    "BSAM",
    "ESAM",
    "GSAM",
    "HERE",
    "NSO",
    "RSP",
    "SAM",
    "SAP",
    "WSAM",
    "Averager",
    "Displacement",
    "DistancePenalty",
    "DistanceProjection",
    "EigenSAM",
    "EngineOptions",
    "FisherSAM",
    "FlatOptimizer",
    "FriendlySAM",
    "LookSAM",
    "Method",
    "MomentumSAM",
    "MongeSAM",
    "Probe",
    "RandomSAM",
    "Rule",
    "drive",
    "get_method",
    "methods",
    "mixup",
    "norm_parameters",
    "register",
]
