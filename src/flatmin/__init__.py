"""flatmin: find flat minima of PyTorch models, and measure how flat they are.

Training    NSO, RSP, SAP, SAM, MongeSAM and SAM's relatives around any `torch.optim` optimizer; `methods()` lists them
Averaging   `Averager(model)`, the mean of the path of any of them, or of the base optimizer alone
Beside      `DistancePenalty`, `DistanceProjection`, `mixup`: what goes together with any of them
Measuring   `measure(model, criterion, data)`, or `Objective` with `trace`, `top_eigenvalues`, `noise_stability`, ...;
            matrices as products: `HessianOperator`, `GaussNewtonOperator`, `FisherOperator`, of a `Vector`
Bounds      `bounds`: PAC-Bayes bounds as functions of the numbers measured
Problems    functions with known gradients, Hessians and spectra
"""

from typing import TYPE_CHECKING

from flatmin import bounds, problems
from flatmin.curvature import (
    AscentResult,
    DensityResult,
    EigenResult,
    FisherOperator,
    FlatMinimum,
    FlatMinimumEstimate,
    FlatnessReport,
    FreeTrace,
    GaussNewtonOperator,
    HessianOperator,
    LossSlice,
    MatchedComparison,
    Measurement,
    Objective,
    RayleighSum,
    SharpnessResult,
    TraceResult,
    Tracker,
    TrackPoint,
    ascent_sharpness,
    average_sharpness,
    block_eigenvalues,
    compare_at_matched_loss,
    direction_to,
    flat_minimum,
    flat_minimum_estimate,
    layerwise_rayleigh_sum,
    limit_map,
    loss_slice,
    measure,
    model_function,
    noise_stability,
    random_direction,
    spectral_density,
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
    DistancePenalty,
    DistanceProjection,
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
    mixup,
    norm_parameters,
)
from flatmin.optim.engine.migration import not_here
from flatmin.vectors import Vector

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
    "AscentResult",
    "Averager",
    "DensityResult",
    "DistancePenalty",
    "DistanceProjection",
    "EigenResult",
    "EigenSAM",
    "FisherOperator",
    "FisherSAM",
    "FlatMinimum",
    "FlatMinimumEstimate",
    "FlatOptimizer",
    "FlatnessReport",
    "FreeTrace",
    "FriendlySAM",
    "GaussNewtonOperator",
    "HessianOperator",
    "LookSAM",
    "LossSlice",
    "MatchedComparison",
    "Measurement",
    "MomentumSAM",
    "MongeSAM",
    "Objective",
    "Probe",
    "RandomSAM",
    "RayleighSum",
    "SharpnessResult",
    "TraceResult",
    "TrackPoint",
    "Tracker",
    "Vector",
    "ascent_sharpness",
    "average_sharpness",
    "block_eigenvalues",
    "bounds",
    "compare_at_matched_loss",
    "direction_to",
    "flat_minimum",
    "flat_minimum_estimate",
    "layerwise_rayleigh_sum",
    "limit_map",
    "loss_slice",
    "measure",
    "methods",
    "mixup",
    "model_function",
    "noise_stability",
    "norm_parameters",
    "problems",
    "random_direction",
    "spectral_density",
    "top_eigenvalues",
    "trace",
]

if not TYPE_CHECKING:  # to a type checker, a module with __getattr__ has every name

    def __getattr__(name):
        raise not_here(name)
