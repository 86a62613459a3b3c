"""How a Hessian product is computed, chosen by trial.

    "autograd"     double backward, with attention in its differentiable form (fused kernels have no second derivative)
    "difference"   central differences of gradients, where an operation has no second derivative
    "loss"         second differences of losses, where there is no backward pass at all: only v' H v, for the trace

Sharded parameters (FSDP2) begin with "difference": what gathers and scatters them cannot be differentiated twice.

"auto" takes the first that works on the first batch. Each is compared there with another one, on one random vector: the
relative difference is part of every result (for a network with kinks, such as ReLU, it is large by nature). Double
backward must also be symmetric, which it is not where torch's second derivative of an operation is wrong. A parameter
that the loss does not use, or uses linearly, contributes zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatmin.curvature.function.arithmetic import listening
from flatmin.curvature.function.objective import Objective
from flatmin.curvature.function.sharded import gradients
from flatmin.curvature.products.differences import (
    GradientDifference,
    LossDifference,
    Scalar,
    at_best_length,
    dots,
    lengths,
    relative_difference,
)
from flatmin.curvature.products.doubts import (
    NEAR,
    check_of_smooth,
    slope_ratio,
    warn_if_kinked,
    warn_if_no_gradient,
    warn_if_not_symmetric,
)
from flatmin.curvature.products.graph import check_differentiable, check_not_reentrant, first_line, may_have_kinks
from flatmin.curvature.products.pairing import Pairing
from flatmin.curvature.products.swapped import Swapped, worthwhile
from flatmin.noise import draw_like, mix_seeds
from flatmin.shards import local, summed_apart
from flatmin.vectors import Vector

NAMES = {"autograd": "double backward", "difference": "differences of gradients", "loss": "differences of losses"}
SHARDED = "sharded parameters, FSDP2"
ASYMMETRY = 10  # in units of the root of the rounding
NOT_DIFFERENTIABLE = (RuntimeError,)  # what autograd raises, for a missing derivative too


@contextmanager
def differentiable_twice(objective: Objective) -> Iterator[None]:
    """Inside, the losses of `objective` can be differentiated twice; nothing is changed on leaving."""
    objective.refuse_sharded("to differentiate twice")
    with objective.quiet(), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        yield


def derivative(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], v: Sequence[Tensor] | None = None, *, last: bool = False
) -> tuple[Tensor, ...]:
    """The derivative by `inputs` of the inner product of `outputs` (numbers, without `v`) and `v`, without a history.

    The graph is kept, unless this is the `last` derivative: its memory is then used again on the way.
    """
    found = torch.autograd.grad(
        outputs, inputs, grad_outputs=v, retain_graph=not last, allow_unused=True, materialize_grads=True
    )
    return tuple(t.detach() for t in found)  # torch 2.6 makes zeros that require gradients


class BatchHessian:
    """The Hessian of one batch's loss, as a map v -> H v; the graph is built once and used for every product.

    Cost: one gradient to build, about two per product. Memory: the graph.
    """

    def __init__(self, loss: Tensor, params: Sequence[Tensor]):
        self.params = params
        grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True, materialize_grads=True)
        self._gradient = tuple(g.detach() for g in grads)
        self._curved = [i for i, g in enumerate(grads) if g.requires_grad]
        self._pairing = Pairing([grads[i] for i in self._curved]) if self._curved else None

    def check(self) -> None:
        """Raises RuntimeError if the second derivative would silently be wrong."""
        check_differentiable([self._pairing.number] if self._pairing else [])

    def take_gradient(self) -> tuple[Tensor, ...]:
        """The gradient of the batch's loss, one tensor per parameter: once, and before the first product."""
        gradient, self._gradient = self._gradient, ()
        return gradient

    def product(self, v: Sequence[Tensor], *, last: bool = False) -> tuple[Tensor, ...]:
        """H v, one tensor per parameter. After the `last` product the graph is gone."""
        return BatchHessian.sum([self], [v], last=last)

    @staticmethod
    def sum(
        parts: Sequence[BatchHessian], vectors: Sequence[Sequence[Tensor]], *, last: bool = False
    ) -> tuple[Tensor, ...]:
        """sum_b H_b v_b, one tensor per parameter, for one pass through all graphs."""
        numbers = []
        for part, v in zip(parts, vectors, strict=True):
            part._gradient = ()
            if part._pairing is not None:
                numbers.append(part._pairing.along([v[i] for i in part._curved]))
        params = parts[0].params
        try:
            return derivative(numbers, params, last=last) if numbers else tuple(torch.zeros_like(p) for p in params)
        finally:
            for part in parts:
                if part._pairing is not None:
                    part._pairing.forget()

    def forms(self, v: Sequence[Tensor]) -> Tensor:
        """v_p' (H v)_p for each parameter p, float64."""
        return dots(v, self.product(v))


@dataclass(frozen=True, kw_only=True)
class Way:
    """How products are computed for one objective.

    Attributes:
        name: "autograd", "difference" or "loss".
        cross_check: relative difference to another way, for one random vector on the first batch; `None` if no other
            way was possible.
        graph_bytes: memory of the graph that double backward keeps, per sample.
        length: the displacement of a difference.
        reason: why a way before it was not possible.
        swaps: whether the loss has operations with a faster second derivative of our own (`swapped.py`).
        slope: the slope of the loss along the gradient, over what the gradient says: 1, or autograd's is another field.
    """

    name: str
    cross_check: float | None = None
    graph_bytes: float = 0.0
    length: float = 0.0
    reason: str = ""
    swaps: bool = False
    slope: float = 1.0

    @property
    def text(self) -> str:
        """What was computed, for `method` of a result."""
        text = NAMES[self.name] + (f" ({self.reason})" if self.reason else "")
        if self.cross_check is None:
            return text
        other = "other lengths" if self.name != "autograd" else NAMES["difference"]
        if self.cross_check > NEAR and self.name == "autograd":
            return f"{text} ({other} see kinks too: they differ by {self.cross_check:.1g} on one batch)"
        return f"{text}, within {self.cross_check:.1g} of {other} on one batch"

    @contextmanager
    def context(self, objective: Objective, *, as_recorded: bool = False) -> Iterator[None]:
        """Inside, products may be computed; nothing is changed on leaving.

        Args:
            objective: whose way this is.
            as_recorded: whether operations have to be recorded by torch, for somebody who looks at them.
        """
        if self.name == "autograd":
            with differentiable_twice(objective), Swapped() if self.swaps and not as_recorded else nullcontext():
                yield
        else:
            with objective.quiet(), torch.enable_grad():
                yield

    def curvature(self, scalar: Scalar, params: Sequence[Tensor]) -> BatchHessian | GradientDifference | LossDifference:
        """The curvature of `scalar()`, the loss of one batch at the weights as they are, or a function like it."""
        if self.name == "autograd":
            return BatchHessian(scalar(), params)
        return (GradientDifference if self.name == "difference" else LossDifference)(scalar, params, self.length)


def choose_way(objective: Objective, products: str = "auto", *, seed: int = 0) -> Way:
    """The way to compute products with the Hessian of `objective`: `products`, or the first that works ("auto").

    Warns (RuntimeWarning) if it comes to differences, and those of another length are off by `KINKED` or more; and if
    what autograd gives is not the gradient of the loss.

    Cost: about eight gradients of the first batch (eight more if it comes to differences).

    Raises:
        ValueError: if `products` is unknown, or the way that it names is not possible ("autograd" of a sharded model).
    """
    if products not in ("auto", *NAMES):
        raise ValueError(f"unknown products {products!r}. Known: auto, {', '.join(NAMES)}.")
    if products == "autograd":
        objective.refuse_sharded("double backward")
    names = list(NAMES) if products == "auto" else [products]
    reason = ""
    with objective.quiet(), torch.enable_grad():
        loss = [next(iter(objective.batches())).evaluate().loss]
        check_not_reentrant(loss)
        swaps = worthwhile(loss)
        del loss
    if objective.sharded:
        names, reason = [name for name in names if name != "autograd"], SHARDED
    ways = [Way(name=name) for name in names]
    if swaps and names[0] == "autograd":  # if ours do not go with what the model does (checkpointing), torch's may
        ways.insert(0, Way(name="autograd", swaps=True))
    for way in ways:
        try:
            found = _try(objective, replace(way, reason=reason), seed)
            if found.name != "autograd":
                warn_if_kinked(NAMES[found.name], found.cross_check)
            warn_if_no_gradient(found.slope)
            return found
        except torch.OutOfMemoryError:
            raise
        except NOT_DIFFERENTIABLE as error:
            if not way.swaps:
                reason = f"{NAMES[way.name]} failed: {first_line(error)}"
    raise ValueError(f"products={products!r} is not possible here; {reason}")


def _try(objective: Objective, way: Way, seed: int) -> Way:
    """`way`, tried on the first batch and compared with another."""
    params = objective.params
    with way.context(objective):
        batch = next(iter(objective.batches()))
        v = _random(params, seed)
        if way.name == "autograd":
            with _GraphSize(params) as graph, listening(objective.hear):
                loss = batch.evaluate().loss
                check_differentiable([loss])
                smooth = not may_have_kinks([loss])
                hessian, size = BatchHessian(loss, params), 1 + abs(float(loss.detach()))
                del loss
            hessian.check()
            gradient = Vector(hessian.take_gradient())
            product = Vector(hessian.product(v))
            _check_symmetric(hessian, v, product, size, seed)
            del hessian
        else:
            return _with_length(way, objective, lambda: batch.evaluate().loss, v, seed)
    with objective.quiet():  # the kernels as the user has them
        slope = slope_ratio(lambda: batch.evaluate().loss, params, gradient, objective.rounding)
        try:
            other = GradientDifference(lambda: batch.evaluate().loss, params, lengths(params, 1 / 3)[1])
            check = relative_difference(Vector(other.product(v)), product)
            if smooth and check > NEAR and slope == 1:
                check = check_of_smooth(lambda: batch.evaluate().loss, params, v, product)
        except NOT_DIFFERENTIABLE:
            check = None
    return replace(way, cross_check=check, graph_bytes=graph.total / batch.size, slope=slope)


def _check_symmetric(hessian: BatchHessian, v: list[Tensor], product: Vector, loss: float, seed: int) -> None:
    """Raises RuntimeError if u' H v is not v' H u for a random u: then some second derivative is wrong.

    Unlike differences of gradients that is not confused by kinks. For random vectors, an antisymmetric part of H shows
    with about its own norm. What rounding does to a loss of size `loss` is left out.
    """
    params = hessian.params
    u = _random(params, mix_seeds(seed, 1))
    there, back = (float(dots(a, b).sum()) for a, b in ((u, product.present), (v, hessian.product(u))))
    eps = max(torch.finfo(p.dtype).eps for p in params)
    number, weights = sum(p.numel() for p in params), float(Vector([p.detach() for p in params]).norm())
    rounding = 1e3 * eps * loss * number / max(weights, 1e-30) ** 2
    if abs(there - back) > max(ASYMMETRY * math.sqrt(eps) * float(product.norm()), rounding):
        raise RuntimeError("the second derivative of an operation is not symmetric")


def _with_length(way: Way, objective: Objective, scalar: Scalar, v: list[Tensor], seed: int) -> Way:
    params = objective.params
    tried = lengths(params, 1 / 3 if way.name == "difference" else 1 / 4)

    def product(length: float) -> Vector:
        if way.name == "difference":
            return Vector(GradientDifference(scalar, params, length).product(v))
        return Vector([LossDifference(scalar, params, length).forms(v)])

    length, best, gap = at_best_length(product, tried)
    slope = 1.0
    if way.name == "difference":
        with listening(objective.hear):
            gradient = Vector(gradients(scalar(), params))
        slope = slope_ratio(scalar, params, gradient, objective.rounding)
        if slope == 1:
            u = _random(params, mix_seeds(seed, 1))
            warn_if_not_symmetric(GradientDifference(scalar, params, length), u, v, best, gap)
    return replace(way, cross_check=gap, length=length, slope=slope)


def _random(params: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator(params[0].device).manual_seed(mix_seeds(seed, -1))
    # Not signs: a few of them may cancel, so that H v is rounding alone, which no two ways agree about.
    return [draw_like(p, "normal", generator) for p in params]


class _GraphSize:
    """Counts the memory that graphs built inside hold on to, without the parameters."""

    def __init__(self, params: Sequence[Tensor]):
        self._seen = {p.untyped_storage().data_ptr() for p in params}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.total = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided and (storage := tensor.untyped_storage()).data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor

    def __enter__(self) -> _GraphSize:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.__exit__(*exc)


def check_finite(product: Sequence[Tensor], objective: Objective) -> None:
    """Refuses a product, a tensor for each parameter, that is not finite. One synchronisation."""
    if Vector(product).isfinite():
        return
    bad = [local(t).isfinite().logical_not().sum().to(product[0].device) for t in product]
    name = objective.names[int(torch.stack(summed_apart(bad, product)).nonzero()[0, 0])]
    raise ValueError(
        f"the Hessian is not finite: its product with a vector is not, at parameter {name!r}. The loss is, so it "
        "has no second derivative here (a norm or a square root at zero?) or overflows. Leave the parameter out "
        "with params=, or measure at another point."
    )
