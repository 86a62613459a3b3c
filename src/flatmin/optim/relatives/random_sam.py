"""Random SAM: smooth first, then ascend."""

from __future__ import annotations

from typing import Unpack

from torch.optim import Optimizer

from flatmin.checks import check_flag, check_number, check_positive
from flatmin.optim.engine.optimizer import FlatOptimizer
from flatmin.optim.options import EngineOptions
from flatmin.optim.registry import register
from flatmin.optim.rule import Probe, Rule
from flatmin.radii import Radii
from flatmin.vectors import Vector


def random_sam(rho: Radii, noise: Vector, weight: float) -> Rule:
    """G = g(W + rho d / |d|), d = D + weight g(W + D), D filter-scaled Gaussian noise. Two gradients."""
    g = (yield Probe(noise, ascent=True)).add_(noise, 1.0 / weight)  # along d, in the memory of the gradient
    del noise
    return (yield rho.ascent(g))


@register("random-sam", gradients=2, paper="Liu et al. 2022, random sharpness-aware minimization, NeurIPS")
class RandomSAM(FlatOptimizer):
    """Random SAM (R-SAM) around any base optimizer.

    The first gradient is taken at a random point nearby, where the landscape is smoothed, and the ascent combines the
    two:

        D_j ~ N(0, sigma^2 |w_j|^2) for each filter j,    d = D + weight g(W + D),    G = g(W + rho d / |d|).

    Args:
        base: an optimizer instance.
        rho: radius of the combined step; a group option.
        sigma: of the noise, in units of each filter's norm.
        weight: of the gradient in the combination (the paper's lambda).
        seed: of the noise; `None` is really random.
        sync_ascent: average the ascent gradient over processes, as in SAM.
        options: see `flatmin.optim.options.EngineOptions`.

    Cost: two gradients a step. Memory inside a step: two copies of the parameters. `step(closure)` returns the mean
    loss over its two points, neither of which is W.

    Raises:
        ValueError: negative `rho` or `sigma`, `weight` <= 0.

    Source: Liu, Mai, Cheng, Chen, Hsieh, You, "Random Sharpness-Aware Minimization", NeurIPS 2022. Uncertain: how
    exactly the paper combines noise and gradient, and its values; no official code was found. (The comparison code of
    the NSO paper does something else: it ascends from W and sums norms tensor by tensor.)
    """

    radius_name = "rho"
    takes_sparse = False
    is_random = True

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.05,
        sigma: float = 0.01,
        weight: float = 1.0,
        seed: int | None = 0,
        sync_ascent: bool = False,
        **options: Unpack[EngineOptions],
    ):
        self.sigma, self.weight = check_number("sigma", sigma, 0.0), check_positive("weight", weight)
        self.sync_ascent = check_flag("sync_ascent", sync_ascent)
        super().__init__(base, rho, seed=seed, **options)

    def rule(self) -> Rule:
        """See `random_sam`."""
        rho = self.radii()
        noise = self.noise("normal", Radii(self.sigma if r > 0 else 0.0 for r in rho.values), scale="filter")
        return random_sam(rho, noise.vector(), self.weight)

    @property
    def gradients_per_step(self) -> int:
        """Two."""
        return 2
