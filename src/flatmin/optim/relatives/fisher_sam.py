"""Fisher SAM: the ascent step in the metric of a diagonal Fisher matrix."""

from __future__ import annotations

from typing import Unpack

from torch.optim import Optimizer

from flatmin.checks import check_flag, check_number
from flatmin.optim.engine.optimizer import FlatOptimizer
from flatmin.optim.options import EngineOptions
from flatmin.optim.registry import register
from flatmin.optim.rule import ASCENT, Rule
from flatmin.radii import Radii
from flatmin.vectors import Vector


def fisher_sam(rho: Radii, eta: float) -> Rule:
    """G = g(W + rho F^-1 g / sqrt(g^T F^-1 g)), F^-1 = 1 / (1 + eta g^2) entry by entry. Two gradients."""
    return (yield _step(rho, (yield ASCENT), eta))


def _step(rho: Radii, g: Vector, eta: float) -> Vector:
    g = rho.select(g)
    lifted = g.apply(lambda t: t / (1.0 + eta * (t * t.conj()).real))
    return rho * (lifted * g.dot(lifted).rsqrt().nan_to_num(nan=0.0, posinf=0.0))


@register("fisher-sam", gradients=2, paper="Kim et al. 2022, arXiv:2206.04920")
class FisherSAM(FlatOptimizer):
    """Fisher SAM around any base optimizer.

    The ball is that of the Fisher metric, approximated by the diagonal f of squared gradients of the batch, with the
    inverse regularised:

        e = rho F^-1 g / sqrt(g^T F^-1 g),    F^-1 = 1 / (1 + eta f),    f = g^2.

    Args:
        base: an optimizer instance.
        rho: radius in that metric; a group option. 0.1 in the paper, at second hand.
        eta: of the regularised inverse; 1 in the paper, at second hand; 0 is SAM.
        sync_ascent: average the ascent gradient over processes, as in SAM.
        options: see `flatmin.optim.options.EngineOptions`.

    Cost: two gradients a step. Memory inside a step: three copies of the parameters. `step(closure)` returns the loss
    at the unperturbed weights.

    Raises:
        ValueError: negative `rho` or `eta`.

    Source: Kim, Li, Hu, Hospedales, "Fisher SAM: Information Geometry and Sharpness Aware Minimisation", ICML 2022.
    Uncertain: the paper's f is a mean of per-sample squared gradients; here, as in the batch forms in use, it is the
    square of the batch's gradient.
    """

    radius_name = "rho"
    takes_sparse = False

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.1,
        eta: float = 1.0,
        sync_ascent: bool = False,
        **options: Unpack[EngineOptions],
    ):
        self.eta, self.sync_ascent = check_number("eta", eta, 0.0), check_flag("sync_ascent", sync_ascent)
        super().__init__(base, rho, **options)

    def rule(self) -> Rule:
        """See `fisher_sam`."""
        return fisher_sam(self.radii(), self.eta)

    @property
    def gradients_per_step(self) -> int:
        """Two."""
        return 2
