"""Functions whose gradient, Hessian, spectrum and smoothed value are known in closed form.

Tests, documentation and claims share them. A problem is a function of one vector `x` of shape (dim,); all formulas
work in the dtype of `x`. `module()` turns it into an `nn.Module` for optimizers and measures.

    quadratic, ill_conditioned, rank_deficient    x^T A x / 2 + b^T x, with any spectrum
    cubic, quartic, hyperbola                     the simplest ones whose Hessian changes from place to place
    matrix_sensing                                flat minima are those that generalise
    hard_quadratic, rate_bound, best_step         how fast a stationary point can be found
    smoothed_by_steps                             what SGD with a constant step descends

Nothing here draws from torch's global random state: what is random has a `seed`.
"""

from flatmin.problems.analytic import (
    Problem,
    cubic,
    hyperbola,
    ill_conditioned,
    quadratic,
    quartic,
    rank_deficient,
)
from flatmin.problems.rates import HardQuadratic, best_step, hard_quadratic, rate_bound
from flatmin.problems.sensing import MatrixSensing, matrix_sensing
from flatmin.problems.smoothing import smoothed_by_steps

__all__ = [
    "HardQuadratic",
    "MatrixSensing",
    "Problem",
    "best_step",
    "cubic",
    "hard_quadratic",
    "hyperbola",
    "ill_conditioned",
    "matrix_sensing",
    "quadratic",
    "quartic",
    "rank_deficient",
    "rate_bound",
    "smoothed_by_steps",
]
