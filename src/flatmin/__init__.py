"""flatmin: find flat minima of PyTorch models, and measure how flat they are.

Training    NSO, RSP, SAP, SAM, MongeSAM and SAM's relatives around any `torch.optim` optimizer; `methods()` lists them
Averaging   `Averager(model)`, the mean of the path of any of them, or of the base optimizer alone
Measuring   `measure(model, criterion, data)`, or `Objective` with `trace` and `top_eigenvalues`; matrices as products:
            `HessianOperator`, `GaussNewtonOperator`, `FisherOperator`
Problems    functions with known gradients, Hessians and spectra
"""

from flatmin import problems
from flatmin.curvature import (
    EigenResult,
    FisherOperator,
    FlatMinimum,
    FlatnessReport,
    GaussNewtonOperator,
    HessianOperator,
    Measurement,
    Objective,
    TraceResult,
    flat_minimum,
    limit_map,
    measure,
    top_eigenvalues,
    trace,
)
from flatmin.optim import (
    BSAM,
    ESAM,
    GSAM,
    NSO,
    RSP,
    SAM,
    SAP,
    WSAM,
    Averager,
    EigenSAM,
    FisherSAM,
    FlatOptimizer,
    FriendlySAM,
    LookSAM,
    MomentumSAM,
    MongeSAM,
    Probe,
    RandomSAM,
    methods,
    norm_parameters,
)

__version__ = "0.1.0"

__all__ = [
    "BSAM",
    "ESAM",
    "GSAM",
    "NSO",
    "RSP",
    "SAM",
    "SAP",
    "WSAM",
    "Averager",
    "EigenResult",
    "EigenSAM",
    "FisherOperator",
    "FisherSAM",
    "FlatMinimum",
    "FlatOptimizer",
    "FlatnessReport",
    "FriendlySAM",
    "GaussNewtonOperator",
    "HessianOperator",
    "LookSAM",
    "Measurement",
    "MomentumSAM",
    "MongeSAM",
    "Objective",
    "Probe",
    "RandomSAM",
    "TraceResult",
    "flat_minimum",
    "limit_map",
    "measure",
    "methods",
    "norm_parameters",
    "problems",
    "top_eigenvalues",
    "trace",
]
