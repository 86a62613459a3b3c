"""Layer by layer: the largest eigenvalue of each block of the Hessian, and a number from the literature.

With H_ll the block of layer l, and v_l the part of a vector v that belongs to it:

    block_eigenvalues           lambda_max(H_ll) for each l                    the others held fixed
    layerwise_rayleigh_sum      max of v^T H v over |v_l| = 1 for every l      what published code calls lambda_max

For a positive semi-definite H with L layers

    lambda_max(H)  <=  sum_l lambda_max(H_ll)  <=  layerwise_rayleigh_sum  <=  L lambda_max(H)

so the last is no eigenvalue, and grows with the number of layers that one counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from flatmin.checks import check_positive, check_whole
from flatmin.curvature.function.arguments import of_objective, of_operator
from flatmin.curvature.function.objective import Objective
from flatmin.curvature.products.operators import Operator
from flatmin.curvature.results import EigenResult, Measurement
from flatmin.curvature.spectra.eigen import as_operator, top_eigenvalues
from flatmin.noise import draw_like
from flatmin.notices import warn
from flatmin.vectors import Vector

STABLE = 3  # steps over which the value must stay


@dataclass(frozen=True, kw_only=True)
class RayleighSum(Measurement):
    """The sum over layers of v_l^T (H v)_l, where every |v_l| is 1. Not an eigenvalue.

    `stderr` is the last change of the iteration.

    Attributes:
        per_layer: layer -> its term of the sum.
        lower_bound: value / number of layers, a Rayleigh quotient of H: lambda_max(H) is at least that.
        converged: whether the value stayed within `tol` over 3 steps.
    """

    per_layer: Mapping[str, float] = field(default_factory=dict)
    lower_bound: float = math.nan
    converged: bool = True


@of_objective
def block_eigenvalues(objective: Objective, k: int = 1, **options: Any) -> dict[str, EigenResult]:
    """The `k` largest eigenvalues of each layer's diagonal block of the Hessian, by layer.

    They are not eigenvalues of the Hessian: for a positive semi-definite one each is at most its lambda_max.

    Args:
        objective: what to measure.
        k: how many of each block; fewer where a block is smaller.
        options: of `top_eigenvalues` (`which`, `tol`, `max_products`, `max_basis`, `seed`).

    Cost: that of `top_eigenvalues` for every layer.

    Raises:
        ValueError: as `top_eigenvalues` does.
    """
    check_whole("k", k, 1)
    layers = dict.fromkeys(objective.layers)
    parts = {
        layer: objective.only(n for n, of in zip(objective.names, objective.layers, strict=True) if of == layer)
        for layer in layers
    }
    return {name: top_eigenvalues(part, min(k, part.num_params), **options) for name, part in parts.items()}


@of_operator
def layerwise_rayleigh_sum(
    objective: Objective | Operator, *, tol: float = 1e-3, max_products: int = 100, seed: int | None = 0
) -> RayleighSum:
    """What the published code of noise stability optimization calls the largest eigenvalue. For comparison only.

    Power iteration in which each layer's part of the vector is normalised by itself,

        v_l <- (H v)_l / |(H v)_l|,        value = sum_l v_l^T (H v)_l

    which ends at a (local) maximum of v^T H v over |v_l| = 1 for every layer. Published tables count the weights of
    convolutions and linear layers only: choose them with `params=` of the Objective for a like comparison.

    Args:
        objective: what to measure: the Hessian of an Objective, or an operator.
        tol: stops when the value has changed by at most this, relatively, over 3 steps.
        max_products: Hessian-vector products over the whole data, at most.
        seed: of the starting vector; `None` is really random.

    Cost: 2 to 3 gradients of the data per product.

    Raises:
        ValueError: `tol` not positive, max_products < 1, data that gives another loss on a second pass, or a Hessian
            that is not finite.

    Source: the measuring script published with Zhang, Li, Ju 2024.
    """
    check_positive("tol", tol)
    check_whole("max_products", max_products, 1)
    operator, seed = as_operator(objective, seed)
    operator.objective.check()
    layers = operator.objective.layers
    generator = torch.Generator(operator.objective.params[0].device).manual_seed(seed)
    v = _normalised(Vector(draw_like(p, "normal", generator) for p in operator.objective.params), layers)
    values: list[float] = []
    converged = False
    terms: dict[str, float] = {}
    while not converged and len(values) < max_products:
        w = operator.product(v)
        terms = {layer: float(part.dot(w)) for layer, part in _parts(v, layers)}
        values.append(math.fsum(terms.values()))
        v = _normalised(w, layers)
        recent = values[-1 - STABLE :]
        converged = len(recent) > STABLE and max(recent) - min(recent) <= tol * abs(values[-1])
    if not converged:
        message = f"layerwise_rayleigh_sum is not converged after {len(values)} products. Raise max_products or tol."
        warn(message, RuntimeWarning)
    return RayleighSum(
        value=values[-1],
        stderr=abs(values[-1] - values[-2]) if len(values) > 1 else math.inf,
        method=f"power iteration, each layer normalised by itself: not an eigenvalue; {operator.method}",
        num_products=len(values),
        num_samples=operator.objective.num_samples,
        seed=seed,
        per_layer=terms,
        lower_bound=values[-1] / len(terms),
        converged=converged,
    )


def _parts(v: Vector, layers: Sequence[str]) -> Iterator[tuple[str, Vector]]:
    """Each layer with its part of the vector."""
    for layer in dict.fromkeys(layers):
        yield layer, Vector(t if of == layer else None for t, of in zip(v.tensors, layers, strict=True))


def _normalised(v: Vector, layers: Sequence[str]) -> Vector:
    """Each layer's part with norm 1; a part that is zero stays zero."""
    sizes = {layer: float(part.norm()) for layer, part in _parts(v, layers)}
    return Vector(
        None if t is None else t / sizes[layer] if sizes[layer] > 0 else t
        for t, layer in zip(v.tensors, layers, strict=True)
    )
