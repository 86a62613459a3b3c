"""Measuring: an objective, Hessian products, and what is estimated from them, each with its error."""

from flatmin.curvature.flat import FlatMinimumEstimate, flat_minimum_estimate, model_function
from flatmin.curvature.function.objective import Objective
from flatmin.curvature.manifold import FlatMinimum, flat_minimum, limit_map
from flatmin.curvature.matched import MatchedComparison, compare_at_matched_loss
from flatmin.curvature.products.factored import FisherOperator, GaussNewtonOperator
from flatmin.curvature.products.operators import HessianOperator, Operator, ResidualOperator
from flatmin.curvature.report import FlatnessReport, measure
from flatmin.curvature.results import EigenResult, Estimate, Measurement, TraceResult
from flatmin.curvature.sharpness.ascent import AscentResult, ascent_sharpness
from flatmin.curvature.sharpness.average import SharpnessResult, average_sharpness, noise_stability
from flatmin.curvature.sharpness.slices import LossSlice, direction_to, loss_slice, random_direction
from flatmin.curvature.spectra.blocks import RayleighSum, block_eigenvalues, layerwise_rayleigh_sum
from flatmin.curvature.spectra.density import DensityResult, spectral_density
from flatmin.curvature.spectra.eigen import top_eigenvalues
from flatmin.curvature.traces.trace import trace
from flatmin.curvature.tracker import FreeTrace, Tracker, TrackPoint

__all__ = [
    "AscentResult",
    "DensityResult",
    "EigenResult",
    "Estimate",
    "FisherOperator",
    "FlatMinimum",
    "FlatMinimumEstimate",
    "FlatnessReport",
    "FreeTrace",
    "GaussNewtonOperator",
    "HessianOperator",
    "LossSlice",
    "MatchedComparison",
    "Measurement",
    "Objective",
    "Operator",
    "RayleighSum",
    "ResidualOperator",
    "SharpnessResult",
    "TraceResult",
    "TrackPoint",
    "Tracker",
    "ascent_sharpness",
    "average_sharpness",
    "block_eigenvalues",
    "compare_at_matched_loss",
    "direction_to",
    "flat_minimum",
    "flat_minimum_estimate",
    "layerwise_rayleigh_sum",
    "limit_map",
    "loss_slice",
    "measure",
    "model_function",
    "noise_stability",
    "random_direction",
    "spectral_density",
    "top_eigenvalues",
    "trace",
]
