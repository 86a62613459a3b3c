"""Momentum SAM: the ascent direction from the momentum buffer, for the price of one gradient."""

from __future__ import annotations

from typing import Unpack

from torch.optim import Optimizer

from flatmin.optim.engine.optimizer import FlatOptimizer
from flatmin.optim.options import EngineOptions
from flatmin.optim.registry import register
from flatmin.optim.rule import HERE, Rule
from flatmin.radii import Radii
from flatmin.vectors import Vector

BUFFERS = ("momentum_buffer", "exp_avg")  # of SGD, and of the Adam family


def momentum_sam(rho: Radii, velocity: Vector | None) -> Rule:
    """G = g(W - rho v / |v|), v the momentum buffer; g(W) as long as there is none. One gradient."""
    return (yield HERE if velocity is None else -rho.ascent(velocity))


@register("momentum-sam", gradients=1, paper="Becker, Altrock, Risse 2024, arXiv:2401.12033")
class MomentumSAM(FlatOptimizer):
    """Momentum SAM around a base optimizer with momentum; others call it MSAM, but it is not Monge SAM.

    With v the momentum buffer of the base,

        G = g(W - rho v / |v|).

    The sign is the paper's: v accumulates gradients, so the point lies along the coming descent step, and it takes no
    second gradient.

    Args:
        base: an optimizer instance whose state holds `momentum_buffer` (SGD) or `exp_avg` (Adam and its kin).
        rho: radius; a group option. The paper uses 3 (its class defaults to 0.3).
        options: see `flatmin.optim.options.EngineOptions`.

    Cost: one gradient a step. Memory inside a step: one copy of the parameters. `step(closure)` returns the loss at
    the displaced point (at the first step, without a buffer yet, at the weights). The published code leaves the
    weights at the displaced point between steps; here they are at W.

    Raises:
        ValueError: negative `rho`, a base without a momentum buffer.

    Source: Becker, Altrock, Risse, "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead", 2024.
    """

    radius_name = "rho"

    def __init__(self, base: Optimizer, rho: float = 0.3, **options: Unpack[EngineOptions]):
        super().__init__(base, rho, **options)

    def rule(self) -> Rule:
        """See `momentum_sam`."""
        return momentum_sam(self.radii(), self._velocity())

    @property
    def gradients_per_step(self) -> int:
        """One."""
        return 1

    def _velocity(self) -> Vector | None:
        states = [self.state.get(p, {}) for p in self.params]
        for name in BUFFERS:
            velocity = Vector(state.get(name) for state in states)
            if velocity.support:
                return velocity
        if self.num_steps > self.num_skipped:  # plain SGD has no state at all
            raise ValueError(
                f"MomentumSAM needs momentum, and the state of {type(self.base).__name__} shows no "
                f"{' or '.join(BUFFERS)}. Use e.g. SGD(momentum=0.9) or AdamW (ZeroRedundancyOptimizer shows none)."
            )
        return None
