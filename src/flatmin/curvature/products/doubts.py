"""Whether what products are taken with is the Hessian of the loss: what is looked at on the first batch, and said.

What autograd calls the gradient is not the gradient of the loss where something on the way stops, scales, clips or
reverses gradients: `detach()`, a hook, a custom function. The matrix that products are then taken with is the Jacobian
of another field, and no Hessian, however well they agree.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flatmin.curvature.products.differences import (
    GradientDifference,
    Scalar,
    at_best_length,
    dots,
    lengths,
    relative_difference,
)
from flatmin.notices import warn
from flatmin.place import displaced
from flatmin.radii import Step
from flatmin.vectors import Vector

FACTORS = (0.1, 0.02, 0.004)  # of |w| eps^(1/3): the lengths to try
OFF = 0.05  # relative difference of slopes from which on a warning is due
AGREE = 0.5  # to what part of what they are off by two lengths must agree
NEAR = 0.1  # relative difference of double backward and differences up to which they are said to agree
KINKED = 0.3  # relative difference of differences of two lengths from which on a warning is due
SYMMETRIC = 0.02  # by how much products may fail to be, relative to one, beyond what two lengths differ by
ROUNDING = 16  # units in the last place, of the losses

OF_A_FIELD = (
    "Traces and eigenvalues are those of that field, not of the loss; noise_stability and ascent_sharpness look at the "
    "loss itself."
)


def slope_ratio(scalar: Scalar, params: Sequence[Tensor], gradient: Vector, rounding: float = 0.0) -> float:
    """The slope of `scalar` along `gradient`, over the gradient's norm: 1 if it is the gradient, up to rounding.

        [f(w + s u) - f(w - s u)] / (2 s |g|)    with u = g / |g|

    A long difference sees higher derivatives, a short one rounding, so it takes two lengths that agree
    to say that it is another number.

    Args:
        scalar: the loss of a batch.
        params: by which the gradient is.
        gradient: what autograd gives.
        rounding: relative, of what the loss is computed with, if that is coarser than the parameters.

    Cost: two forward passes, and four more if these are far from 1.
    """
    size, weights = float(gradient.norm()), float(Vector([p.detach() for p in params]).norm())
    if not (0 < size < math.inf) or weights == 0:
        return 1.0
    eps = max(torch.finfo(p.dtype).eps for p in params)
    ratios: list[float] = []
    for factor in FACTORS:
        length = weights * eps ** (1 / 3) * factor
        rise, noise = _rise(scalar, params, gradient, length / size, max(eps, rounding))
        expected = 2 * length * size
        if abs(rise - expected) <= OFF * max(abs(rise), expected) + noise:
            return 1.0
        ratios.append(rise / expected)
    for longer, shorter in itertools.pairwise(ratios):
        if abs(longer - shorter) <= AGREE * min(abs(longer - 1), abs(shorter - 1)):
            return shorter
    return 1.0


@torch.no_grad()
def _rise(
    scalar: Scalar, params: Sequence[Tensor], gradient: Vector, step: float, rounding: float
) -> tuple[float, float]:
    """How much the loss rises over two steps, and what rounding may add to that."""
    with displaced(params) as place:
        losses = []
        for sign in (1, -1):
            place.move(Step(gradient, [sign * step] * len(params)))
            losses.append(float(scalar().double()))
    return losses[0] - losses[1], ROUNDING * rounding * (1 + sum(map(abs, losses)))


def warn_if_no_gradient(ratio: float) -> None:
    """Warns (RuntimeWarning) if what autograd gives is not the gradient."""
    if ratio != 1:
        warn(
            "what autograd gives is not the gradient of the loss: along it, the loss of one batch changes "
            f"{ratio:.2g} times as fast as it says. Something stops, scales, clips or reverses gradients (detach(), a "
            "hook on a tensor or parameter, Embedding(max_norm=), a custom autograd function). " + OF_A_FIELD,
            RuntimeWarning,
        )


def check_of_smooth(scalar: Scalar, params: Sequence[Tensor], v: list[Tensor], product: Vector) -> float:
    """The difference to differences of the best length; warns where that is none of theirs.

    A Python function whose backward saves what it has computed has a wrong second derivative, and a right first one.
    """
    _, best, gap = at_best_length(
        lambda length: Vector(GradientDifference(scalar, params, length).product(v)), lengths(params, 1 / 3)
    )
    check = relative_difference(best, product)
    if check > max(NEAR, 10 * gap):
        warn(
            f"double backward and differences of gradients differ by {check:.1g} on one batch, though no operation "
            "with a kink was recorded: the second derivative of a custom autograd function may be wrong. What is "
            'measured is as uncertain as that; products="difference" does without it.',
            RuntimeWarning,
        )
    return check


def warn_if_kinked(what: str, check: float | None) -> None:
    """Warns (RuntimeWarning) where differences of two lengths disagree, which are all that there is."""
    if check is not None and check > KINKED:
        warn(
            f"{what} of other lengths are off by {check:.1g} on one batch: the loss has kinks near the weights, "
            "or single precision is too coarse. What is measured is as uncertain as that, and no standard error covers "
            "it. A loss that can be differentiated twice, or float64, mends it.",
            RuntimeWarning,
        )


def warn_if_not_symmetric(
    way: GradientDifference, u: list[Tensor], v: list[Tensor], product: Vector, gap: float
) -> None:
    """Warns (RuntimeWarning) if u' H v, from the `product` H v, is not v' H u; lengths differ by `gap`."""
    there, back = (float(dots(a, b).sum()) for a, b in ((u, product.present), (v, way.product(u))))
    if abs(there - back) > max(SYMMETRIC, 10 * gap) * float(product.norm()):
        warn(
            "products by differences of gradients are not symmetric, so that what autograd gives is not the gradient "
            f"of any function (Embedding(scale_grad_by_freq=True) is such a case, or a hook that clips). {OF_A_FIELD}",
            RuntimeWarning,
        )
