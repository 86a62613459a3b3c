"""Sharpness-aware minimization: descend with the gradient of the worst point nearby."""

from __future__ import annotations

from typing import Unpack

from torch.optim import Optimizer

from flatmin.checks import check_flag, check_number
from flatmin.optim.engine.optimizer import FlatOptimizer
from flatmin.optim.options import EngineOptions
from flatmin.optim.registry import register
from flatmin.optim.rule import ASCENT, Rule
from flatmin.radii import Radii, Step
from flatmin.vectors import Vector


def sam(rho: Radii) -> Rule:
    """G = g(W + rho g(W) / |g(W)|), the norm taken over all moved parameters together. Two gradients."""
    # No local name for the first gradient: it would live on through the second pass.
    return (yield rho.ascent((yield ASCENT)))


def unnormalised_sam(rho: Radii) -> Rule:
    """G = g(W + rho g(W)). Two gradients."""
    return (yield rho.ascent((yield ASCENT), lambda _: 1.0))


def asam(rho: Radii, weights: Vector, eta: float, normalize: bool = True) -> Rule:
    """G = g(W + rho T^2 g / |T g|), T = |W| + eta on weight matrices and 1 on vectors. Two gradients."""
    return (yield _adaptive_step(rho, (yield ASCENT), weights, eta, normalize))


def _adaptive_step(rho: Radii, g: Vector, weights: Vector, eta: float, normalize: bool) -> Step:
    stretched = _stretch(rho.select(g), weights, eta)
    factor = float(stretched.inverse_norm()) if normalize else 1.0
    return rho.ascent(_stretch(stretched, weights, eta), lambda _: factor)


def _stretch(vector: Vector, weights: Vector, eta: float) -> Vector:
    return Vector(
        t if t is None or w is None or w.ndim < 2 else t * (w.abs() + eta)
        for t, w in zip(vector.tensors, weights.tensors, strict=True)
    )


@register("sam", gradients=2, paper="Foret et al. 2021, arXiv:2010.01412")
class SAM(FlatOptimizer):
    """Sharpness-aware minimization around any base optimizer; ASAM with `adaptive=True`.

    Minimises `max over |e| <= rho of f(W + e)` to first order:

        e = rho g(W) / |g(W)|,    G = gradient of f at W + e

    with one global norm over the moved parameters. The base optimizer steps from W along G. The adaptive form takes
    the ball `|T^-1 e| <= rho`, T = |W| + eta entry by entry on weight matrices and kernels and 1 on vectors (biases,
    norm gains), so that rescaling a layer changes it little (not at all with eta = 0 and no vectors):
    `e = rho T^2 g / |T g|`.

    Args:
        base: an optimizer instance, e.g. `torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)`.
        rho: radius of the ascent step, in the units of the weights. A group option: it can differ by group, be
            scheduled, and 0 leaves a group alone. The paper's search grid is 0.01 to 0.5, its default 0.05. ASAM
            needs ten times more: its paper uses 0.5 (CIFAR-10) and 1.0 (CIFAR-100).
        adaptive: ASAM.
        normalize: `False` is unnormalised SAM, `e = rho g`: it depends on the scale of the loss.
        sync_ascent: with several processes, average the ascent gradient over them (`True`); or let each one look
            around in a direction of its own, that of its part of the batch, and save an all-reduce (`False`:
            m-sharpness, m the batch of one process). Under FSDP2 all look at one place, so it is averaged anyway.
        eta: ASAM's floor of |W|, 0.01 in its published class.
        options: see `flatmin.optim.options.EngineOptions`. `perturb=flatmin.norm_parameters(model)` is SAM on
            normalisation layers only (SAM-ON, Mueller et al. 2023), which needs a larger rho.

    Cost: two gradients a step. Memory inside a step: one copy of the parameters (two if adaptive); none between steps.
    `step(closure)` returns the loss at the unperturbed weights.

    Raises:
        ValueError: negative `rho` or `eta`, or a class instead of an instance as `base`.

    Source: Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving
    Generalization", ICLR 2021. Adaptive: Kwon, Kim, Park, Choi, "ASAM", ICML 2021; its published code takes T = 1 on
    parameters whose name lacks "weight", which an optimizer cannot see; norm gains are the difference.
    """

    radius_name = "rho"

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.05,
        adaptive: bool = False,
        normalize: bool = True,
        sync_ascent: bool = False,
        *,
        eta: float = 0.01,
        **options: Unpack[EngineOptions],
    ):
        self.adaptive, self.normalize = check_flag("adaptive", adaptive), check_flag("normalize", normalize)
        self.eta, self.sync_ascent = check_number("eta", eta, 0.0), check_flag("sync_ascent", sync_ascent)
        super().__init__(base, rho, **options)

    def rule(self) -> Rule:
        """See `sam`, `unnormalised_sam` and `asam`."""
        if self.adaptive:
            return asam(self.radii(), self.weights(), self.eta, self.normalize)
        return sam(self.radii()) if self.normalize else unnormalised_sam(self.radii())

    @property
    def gradients_per_step(self) -> int:
        """Two: at the weights and at the ascent point."""
        return 2


register("asam", gradients=2, paper="Kwon et al. 2021, arXiv:2102.11600", adaptive=True)(SAM)
register("usam", gradients=2, paper="Andriushchenko, Flammarion 2022 (SAM without the norm)", normalize=False)(SAM)
