"""Weighted SAM: sharpness as a regulariser with a weight of its own."""

from __future__ import annotations

from typing import Unpack

from torch.optim import Optimizer

from flatmin.checks import check_flag, check_share
from flatmin.optim.engine.optimizer import FlatOptimizer
from flatmin.optim.options import EngineOptions
from flatmin.optim.registry import register
from flatmin.optim.rule import HERE, Rule, Update
from flatmin.radii import Radii


def wsam(rho: Radii, gamma: float, decouple: bool) -> Rule:
    """With a = gamma / (1 - gamma): G = g and W loses lr a (g_p - g) afterwards; coupled: G = (1 - a) g + a g_p."""
    g = yield HERE
    perturbed = yield rho.ascent(g)
    sharpness = (perturbed - g) * (gamma / (1.0 - gamma))
    return Update(g, sharpness) if decouple else g + sharpness


@register("wsam", gradients=2, paper="Yue et al. 2023, arXiv:2305.15817")
class WSAM(FlatOptimizer):
    """Weighted sharpness-aware minimization around any base optimizer.

    Minimises `f + gamma / (1 - gamma) (f_SAM - f)`. With a = gamma / (1 - gamma) and g_p = g(W + rho g / |g|),

        base step along g, then W <- W - lr a (g_p - g)        (decoupled, the default)
        base step along (1 - a) g + a g_p                      (coupled)

    so that an adaptive base optimizer does not rescale the sharpness term. gamma = 1/2 coupled is SAM. Clipping `.grad`
    clips g, or all of the coupled direction, but not the decoupled term.

    Args:
        base: an optimizer instance with a learning rate `lr` in its groups.
        rho: radius; a group option.
        gamma: weight of sharpness, in [0, 1); 0.8 to 0.95 in the paper.
        decouple: apply the sharpness term beside the base optimizer.
        options: see `flatmin.optim.options.EngineOptions`.

    Cost: two gradients a step. Memory inside a step: four copies of the parameters.
    `step(closure)` returns the loss at the unperturbed weights.

    Raises:
        ValueError: negative `rho`, `gamma` outside [0, 1).

    Source: Yue et al., "Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term", KDD 2023.
    The default of its published optimizer is 0.88 in one place and 0.9 in others; here 0.9.
    """

    radius_name = "rho"

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.05,
        gamma: float = 0.9,
        decouple: bool = True,
        **options: Unpack[EngineOptions],
    ):
        self.gamma, self.decouple = check_share("gamma", gamma, "[)"), check_flag("decouple", decouple)
        super().__init__(base, rho, **options)

    def rule(self) -> Rule:
        """See `wsam`."""
        return wsam(self.radii(), self.gamma, self.decouple)

    @property
    def gradients_per_step(self) -> int:
        """Two."""
        return 2
