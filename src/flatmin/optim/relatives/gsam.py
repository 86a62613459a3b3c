"""GSAM: shrink the surrogate gap together with the perturbed loss."""

from __future__ import annotations

from typing import Unpack

from torch.optim import Optimizer

from flatmin.checks import check_number
from flatmin.optim.engine.optimizer import FlatOptimizer
from flatmin.optim.options import EngineOptions
from flatmin.optim.registry import register
from flatmin.optim.rule import HERE, Rule
from flatmin.radii import Radii


def gsam(rho: Radii, alpha: float) -> Rule:
    """G = g_p - alpha (g - its component along g_p), g_p = g(W + rho g / |g|). Two gradients."""
    g = yield HERE
    perturbed = yield rho.ascent(g)
    return perturbed - g.reject(perturbed) * alpha


@register("gsam", gradients=2, paper="Zhuang et al. 2022, arXiv:2203.08065")
class GSAM(FlatOptimizer):
    """Surrogate gap guided SAM around any base optimizer.

    With `g_p = g(W + rho g / |g|)` and `g_orthogonal` the part of g orthogonal to g_p,

        G = g_p - alpha g_orthogonal:

    it descends on the perturbed loss and, without changing that to first order, ascends on the loss at W, which
    closes the gap between the two.

    Args:
        base: an optimizer instance.
        rho: radius; a group option. In the paper it follows the learning rate linearly between two values: set
            `group["rho"]` beside the scheduler's step.
        alpha: weight of the gap; 0 is SAM. Published ViT-B/32 run: rho 0.1 to 0.6, alpha 0.6.
        options: see `flatmin.optim.options.EngineOptions`.

    Cost: two gradients a step. Memory inside a step: four copies of the parameters (the first gradient is kept).
    `step(closure)` returns the loss at the unperturbed weights.

    Raises:
        ValueError: negative `rho` or `alpha`.

    Source: Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training", ICLR 2022; the values are
    those of its published configuration.
    """

    radius_name = "rho"

    def __init__(self, base: Optimizer, rho: float = 0.05, alpha: float = 0.4, **options: Unpack[EngineOptions]):
        self.alpha = check_number("alpha", alpha, 0.0)
        super().__init__(base, rho, **options)

    def rule(self) -> Rule:
        """See `gsam`."""
        return gsam(self.radii(), self.alpha)

    @property
    def gradients_per_step(self) -> int:
        """Two."""
        return 2
