"""Sharpness-aware minimization: descend with the gradient of the worst point nearby."""

from __future__ import annotations

from typing import Unpack

from torch.optim import Optimizer

from flatmin.optim.engine import FlatOptimizer
from flatmin.optim.options import EngineOptions
from flatmin.optim.registry import register
from flatmin.optim.rule import HERE, Rule
from flatmin.vectors import Radii


def sam(rho: Radii) -> Rule:
    """G = g(W + rho g(W) / |g(W)|), the norm taken over all moved parameters together. Two gradients."""
    # No local name for the first gradient: it would live on through the second pass.
    return (yield rho.ascent((yield HERE)))


@register("sam", gradients=2, paper="Foret et al. 2021, arXiv:2010.01412")
class SAM(FlatOptimizer):
    """Sharpness-aware minimization around any base optimizer.

    Minimises `max over |e| <= rho of f(W + e)` to first order:

        e = rho g(W) / |g(W)|,    G = gradient of f at W + e

    with one global norm over the moved parameters. The base optimizer steps from W along G.

    Args:
        base: an optimizer instance, e.g. `torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)`.
        rho: radius of the ascent step, in the units of the weights. A group option: it can differ by group, be
            scheduled, and 0 leaves a group alone. The paper's search grid is 0.01 to 0.5, its default 0.05.
        options: see `flatmin.optim.options.EngineOptions`.

    Cost: two gradients a step. Memory inside a step: one copy of the parameters; none between steps.
    `step(closure)` returns the loss at the unperturbed weights.

    Raises:
        ValueError: negative `rho`, or a class instead of an instance as `base`.

    Source: Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving
    Generalization", ICLR 2021.
    """

    radius_name = "rho"

    def __init__(self, base: Optimizer, rho: float = 0.05, **options: Unpack[EngineOptions]):
        super().__init__(base, rho, **options)

    def rule(self) -> Rule:
        """See `sam`."""
        return sam(self.radii())

    @property
    def gradients_per_step(self) -> int:
        """Two: at the weights and at the ascent point."""
        return 2
