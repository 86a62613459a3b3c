"""Friendly SAM: perturb along the part of the gradient that belongs to this batch only."""

from __future__ import annotations

from typing import Unpack

from torch.optim import Optimizer

from flatmin.checks import check_number, check_share
from flatmin.optim.engine.optimizer import FlatOptimizer
from flatmin.optim.options import EngineOptions
from flatmin.optim.registry import register
from flatmin.optim.rule import HERE, Rule
from flatmin.radii import Radii
from flatmin.vectors import Vector


def friendly_sam(rho: Radii, sigma: float, decay: float, memory) -> Rule:
    """G = g(W + rho d / |d|), d = g - sigma m, m the running mean of earlier gradients. Two gradients."""
    return (yield rho.ascent(_noise_of_the_batch((yield HERE), sigma, decay, memory)))


def _noise_of_the_batch(g: Vector, sigma: float, decay: float, memory) -> Vector:
    m = memory.get("mean")
    memory["mean"] = g if m is None else _grown(m, g, decay)
    return g if m is None else g - m * sigma


def _grown(m: Vector, g: Vector, decay: float) -> Vector:
    """The mean with g in it; of a parameter whose first gradient this is, that gradient."""
    mean = m * decay + g * (1.0 - decay)
    triples = zip(mean.tensors, m.tensors, g.tensors, strict=True)
    return Vector(first if before is None else after for after, before, first in triples)


@register("friendly-sam", gradients=2, paper="Li et al. 2024, arXiv:2403.12350")
class FriendlySAM(FlatOptimizer):
    """Friendly SAM (F-SAM) around any base optimizer.

    With m the exponential mean of the earlier gradients, an estimate of the full gradient,

        d = g - sigma m,    G = g(W + rho d / |d|),    then m <- decay m + (1 - decay) g:

    the ascent goes along the noise of the batch and not along the full gradient.

    Args:
        base: an optimizer instance.
        rho: radius; a group option.
        sigma: how much of the mean is taken out; 1 in the paper, 0 is SAM.
        decay: of the mean (the paper's lambda); 0.9 in its class, 0.6 and 0.95 in its scripts.
        options: see `flatmin.optim.options.EngineOptions`.

    Cost: two gradients a step. Memory inside a step: three copies of the parameters; one between steps and in
    checkpoints: m. `step(closure)` returns the loss at the unperturbed weights.

    Raises:
        ValueError: negative `rho`, `decay` outside [0, 1), `sigma` not finite.

    Source: Li et al., "Friendly Sharpness-Aware Minimization", CVPR 2024; m is used before it is updated, and starts
    as the first gradient, as in its published code.
    """

    radius_name = "rho"
    remembers = ("mean",)

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.05,
        sigma: float = 1.0,
        decay: float = 0.9,
        **options: Unpack[EngineOptions],
    ):
        self.sigma, self.decay = check_number("sigma", sigma), check_share("decay", decay, "[)")
        super().__init__(base, rho, **options)

    def rule(self) -> Rule:
        """See `friendly_sam`."""
        return friendly_sam(self.radii(), self.sigma, self.decay, self.memory)

    @property
    def gradients_per_step(self) -> int:
        """Two."""
        return 2
