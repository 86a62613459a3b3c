"""Is a model at a flat minimum in the sense of Ahn, Jadbabaie and Sra (`manifold.py`)? What can be said at each size.

    small     flat_minimum(*model_function(objective)): the statement itself, by gradient flow and dense Hessians
    larger    flat_minimum_estimate(objective): tr(H)/d and the gradient of it, with errors, and what is left out

Of the gradient of trbar = tr(H)/d, only the part P grad trbar in the null space of H counts: along the minima. A null
space of thousands of dimensions is out of reach, but its complement begins with the top eigenvectors V. Taking those
out leaves at least as much as P does:

    |P grad trbar|  <=  |(I - V V^T) grad trbar|  <=  |grad trbar|

grad tr(H) = E grad (v^T H v) for random signs v, a third derivative. The squared norm of a mean of m noisy vectors is
too large by their variance over m, so norms come from the products of *different* draws, whose mean is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flatmin.checks import check_whole
from flatmin.curvature.function.arguments import of_objective
from flatmin.curvature.function.objective import Objective
from flatmin.curvature.products.graph import check_differentiable, first_line
from flatmin.curvature.products.operators import HessianOperator
from flatmin.curvature.products.probes import stderr
from flatmin.curvature.products.space import flatten, shaped
from flatmin.curvature.products.ways import NOT_DIFFERENTIABLE, differentiable_twice
from flatmin.curvature.results import Estimate
from flatmin.curvature.spectra.eigen import top_eigenvalues
from flatmin.noise import draw_like, mix_seeds
from flatmin.vectors import Vector

LEFT_OUT = (
    "it is about the weights as they are, not about the minimum that gradient flow would lead them to",
    "the excess over that minimum is only bounded by the loss itself, if the loss cannot be negative",
    "of the directions across the minima only the eigenvectors counted were taken out of the gradient, so the "
    "tangential part may be smaller than said",
)
THIRD = (
    "the model cannot be differentiated three times. What trace(objective) and top_eigenvalues(objective) say needs no "
    "third derivative. torch says:"
)
NO_LOOKUP = (
    "the model does not look its parameters up when it is called (as recurrent layers do not), so there is no function "
    "of them. flat_minimum_estimate(objective) needs none."
)


@dataclass(frozen=True, kw_only=True)
class FlatMinimumEstimate:
    """What can be estimated of the (eps, eps') statement for a model of any size.

    Attributes:
        loss: L(w); at least the excess L(w) - L(minimum) if the loss cannot be negative.
        gradient_norm: |grad L(w)|: 0 at a minimum.
        normalised_trace: tr(H) / d.
        trace_gradient: |grad trbar|.
        tangential_gradient: |(I - V V^T) grad trbar|, at least |P grad trbar|.
        num_eigenvectors: the columns of V.
        num_probes: random vectors.
        left_out: what the numbers do not cover.
    """

    loss: float
    gradient_norm: float
    normalised_trace: Estimate
    trace_gradient: Estimate
    tangential_gradient: Estimate
    num_eigenvectors: int
    num_probes: int
    left_out: tuple[str, ...] = LEFT_OUT

    def __str__(self) -> str:
        return (
            f"tr(H) / d = {self.normalised_trace} at loss {self.loss:.4g}, |gradient| {self.gradient_norm:.3g}; its "
            f"gradient {self.trace_gradient}, along the minima about {self.tangential_gradient} at most"
        )

    def is_flat(self, eps: float, eps_prime: float | None = None) -> bool | None:
        """True if, were w the minimum that gradient flow leads to, it would be flat; else `None`: not known.

        That is: loss <= eps, and the tangential gradient, plus two standard errors, <= eps' (sqrt(eps) if not given).
        Both are bounds from above (see `left_out`), so a no cannot be concluded. A yes is evidence and no proof: the
        definition takes the gradient of trbar at the end of the flow, this takes it at w. See to it that
        `gradient_norm` is small; `flat_minimum` follows the flow.
        """
        eps_prime = math.sqrt(eps) if eps_prime is None else eps_prime
        slope = self.tangential_gradient
        return True if self.loss <= eps and slope.value + 2 * slope.stderr <= eps_prime else None


@of_objective
def flat_minimum_estimate(
    objective: Objective, *, num_probes: int = 16, num_eigenvectors: int = 5, seed: int | None = 0
) -> FlatMinimumEstimate:
    """The normalised trace, its gradient, and an upper bound of the part of it along the minima, with errors.

    Args:
        objective: what to measure.
        num_probes: random vectors, at least 3; a fresh one for every batch.
        num_eigenvectors: how many top eigenvectors of the Hessian are taken out; 0 for none.
        seed: of the probes; `None` is really random.

    Cost: about 6 gradients of the data per probe, and `top_eigenvalues`. Memory: one copy of the parameters in double
    precision per probe, beside those of `top_eigenvalues`, and third-order graphs of one batch.

    Raises:
        ValueError: num_probes < 3, num_eigenvectors < 0 or larger than the number of parameters, data that gives
            another loss on a second pass, or a model that cannot be differentiated three times.

    Source: Ahn, Jadbabaie, Sra 2024, section 2, for the definition; the estimate is this library's.
    """
    seed = objective.members.seed(seed)
    check_whole("num_probes", num_probes, 3)
    if not 0 <= check_whole("num_eigenvectors", num_eigenvectors) <= objective.num_params:
        raise ValueError(f"num_eigenvectors must be in 0 .. {objective.num_params}, got {num_eigenvectors}.")
    loss, d = objective.check(), objective.num_params
    try:
        samples, rows = _probes(objective, num_probes, seed)
    except torch.OutOfMemoryError:
        raise
    except NOT_DIFFERENTIABLE as error:
        raise ValueError(f"{THIRD} {first_line(error)}") from error
    samples, rows = samples / d, rows.div_(d)
    whole = _norm(rows)
    if num_eigenvectors:
        operator = HessianOperator(objective, seed=seed)
        found = top_eigenvalues(operator, num_eigenvectors, vectors=True, seed=seed)
        across = torch.stack([flatten(v).to(rows) for v in found.vectors])
        rows.addmm_(rows @ across.T, across, alpha=-1)
    return FlatMinimumEstimate(
        loss=loss,
        gradient_norm=float(objective.gradient().norm()),
        normalised_trace=Estimate(value=float(samples.mean()), stderr=stderr(samples)),
        trace_gradient=whole,
        tangential_gradient=_norm(rows),
        num_eigenvectors=num_eigenvectors,
        num_probes=num_probes,
    )


@of_objective
def model_function(objective: Objective) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The loss as a function of one vector, and the weights as that vector: for `flat_minimum` on a small model.

    Args:
        objective: of a model in float64 with at most a few hundred parameters.

    Returns:
        f and w, (num_params,), with f(w) the loss. Several times differentiable.

    Cost: about three gradients of the data to make sure that f is the loss; a call of f is one forward pass. Memory:
    the graphs of all batches at once, for f sums them up.

    Raises:
        ValueError: if a parameter is not float64, the objective is over several processes, or the model does not look
            its parameters up when it is called.

    Example:
        flatmin.flat_minimum(*flatmin.model_function(objective)).is_flat(1e-3)
    """
    objective.refuse_sharded("a function of all weights")
    if objective.group is not None:
        raise ValueError("a function that can be differentiated again is of one process's data: leave group= out.")
    for name, p in zip(objective.names, objective.params, strict=True):
        if p.dtype != torch.float64:
            raise ValueError(f"{name!r} is {p.dtype}: call model.double() and give data in float64.")
    weights = flatten(Vector(p.detach() for p in objective.params))
    places = [_owners(objective.model, p) for p in objective.params]  # several, where weights are tied

    def f(x: Tensor) -> Tensor:
        parts = shaped(x, objective.params).present
        with differentiable_twice(objective):
            try:
                _put(places, parts)
                total, count = x.new_zeros(()), 0
                for loss, n in objective.batch_losses():
                    total, count = total + n * loss, count + n
            finally:
                _put(places, objective.params)
        return total / count

    x = weights.clone().requires_grad_()
    slope = torch.autograd.grad(f(x), x, allow_unused=True, materialize_grads=True)[0]
    is_right = torch.allclose(slope, flatten(objective.gradient()), rtol=1e-6, atol=1e-9)
    if not (is_right and _agrees_elsewhere(f, objective, weights)):
        raise ValueError(NO_LOOKUP)
    return f, weights


def _owners(model: nn.Module, p: Tensor) -> list[tuple[nn.Module, str]]:
    """Every module that has this parameter, and the name under which it has it."""
    return [(m, key) for m in model.modules() for key, q in m._parameters.items() if q is p]


def _put(places: list[list[tuple[nn.Module, str]]], tensors: Sequence[Tensor]) -> None:
    for owners, tensor in zip(places, tensors, strict=True):
        for owner, key in owners:
            owner._parameters[key] = tensor  # type: ignore[assignment]


def _agrees_elsewhere(f: Callable[[Tensor], Tensor], objective: Objective, weights: Tensor) -> bool:
    """Whether f is the loss at other weights too: at these its gradient may be zero, right or wrong."""
    move = 0.1 * draw_like(weights, "normal", torch.Generator(weights.device).manual_seed(0))
    with objective.displaced() as place, torch.no_grad():
        place.move(shaped(move, objective.params))
        losses = [(float(loss), n) for loss, n in objective.batch_losses()]
    expected = math.fsum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    return math.isclose(float(f(weights + move)), expected, rel_tol=1e-9)


def _probes(objective: Objective, num_probes: int, seed: int) -> tuple[np.ndarray, Tensor]:
    """The samples of tr H, and those of grad tr H, a row each: (probes, dim), float64, one copy of them."""
    samples = np.zeros(num_probes)
    shape = num_probes, objective.num_params
    rows = torch.zeros(shape, dtype=torch.float64, device=objective.params[0].device)
    for i in range(num_probes):
        samples[i], rows[i] = _probe(objective, mix_seeds(seed, i))
    return samples, rows


def _probe(objective: Objective, seed: int) -> tuple[float, Tensor]:
    """v^T H v and its gradient, with a fresh v for every batch: one sample each of tr H and grad tr H."""
    params = objective.params
    generator = torch.Generator(params[0].device)
    form, slope, count = 0.0, torch.zeros(objective.num_params, dtype=torch.float64, device=params[0].device), 0
    options: dict[str, Any] = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
    with differentiable_twice(objective):
        for index, (loss, n) in enumerate(objective.batch_losses()):
            generator.manual_seed(mix_seeds(seed, objective.members.number(index)))
            v = [draw_like(p, "rademacher", generator) for p in params]
            first = torch.autograd.grad(loss, params, **options)
            along = _inner(first, v)
            check_differentiable([loss, along])  # what would be lost at the third derivative
            second = torch.autograd.grad(along, params, **options) if along.requires_grad else ()
            value = _inner(second, v) if second else torch.zeros((), device="cpu")
            count += n
            form += n * float(value.detach())
            if value.requires_grad:
                third = torch.autograd.grad(value, params, allow_unused=True, materialize_grads=True)
                slope += n * flatten(Vector(third)).double()
    mean_form, mean_slope = objective.mean(
        Vector([torch.tensor(form, dtype=torch.float64, device="cpu"), slope]), count
    ).present
    return float(mean_form), mean_slope


def _inner(a: tuple[Tensor, ...], b: list[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _norm(rows: Tensor) -> Estimate:
    """The norm of the mean of which each row is a noisy copy: from products of different rows; jackknife error."""
    m = len(rows)
    gram = (rows @ rows.T).cpu().numpy()
    total, cross = gram.sum() - np.trace(gram), 2 * (gram.sum(1) - gram.diagonal())
    square = total / (m * (m - 1))
    without = (total - cross) / ((m - 1) * (m - 2))  # each row left out in turn
    error = math.sqrt((m - 1) / m * float(((without - without.mean()) ** 2).sum()))
    value = math.sqrt(max(square, 0.0))
    return Estimate(value=value, stderr=min(error / (2 * value), math.sqrt(error)) if value > 0 else math.sqrt(error))
