"""Monge SAM: a sharpness-aware step in the metric of the loss surface."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Unpack

from torch.optim import Optimizer

from flatmin.checks import check_flag
from flatmin.notices import warn
from flatmin.optim.engine.optimizer import FlatOptimizer
from flatmin.optim.options import EngineOptions
from flatmin.optim.registry import register
from flatmin.optim.rule import ASCENT, Rule
from flatmin.radii import Radii, Step
from flatmin.vectors import Vector

VANISHING = 100.0  # gradient norms from which the radius is below a hundredth of rho
NUM_CHECKED = 10  # steps, of the first ones


def monge_sam(rho: Radii, seen: Callable[[Vector], None] = lambda _: None) -> Rule:
    """G = g(W + rho g / (n sqrt(1 + n^2))), n = |g(W)|. Two gradients."""
    return (yield _step(rho, (yield ASCENT), seen))


def monge_sam_in_metric(rho: Radii, metric: Callable[[Vector], Vector]) -> Rule:
    """G = g(W + rho M^-1 g / sqrt(q (1 + q))), q = g^T M^-1 g. Two gradients."""
    return (yield _step_in_metric(rho, (yield ASCENT), metric))


def _step(rho: Radii, g: Vector, seen: Callable[[Vector], None]) -> Step:
    seen(rho.select(g))
    return rho.ascent(g, lambda n: 1.0 / (n * (1.0 + n * n) ** 0.5))


def _step_in_metric(rho: Radii, g: Vector, metric: Callable[[Vector], Vector]) -> Vector:
    g = rho.select(g)
    lifted = rho.select(metric(g))
    q = g.dot(lifted)
    return rho * (lifted * (1.0 / (q * (1.0 + q)).sqrt()).nan_to_num(nan=0.0, posinf=0.0))


@register("monge-sam", gradients=2, paper="Jacobsen, Arvanitidis 2025, arXiv:2502.08448")
class MongeSAM(FlatOptimizer):
    """Monge SAM (M-SAM) around any base optimizer. Not momentum SAM, which others call MSAM.

    The graph of the loss carries the metric `I + g g^T`; the worst point in its ball of radius rho is, to first order,

        e = rho g / (n sqrt(1 + n^2)),    n = |g(W)|:

    SAM's step divided by sqrt(1 + n^2). Where the gradient is large it becomes gradient descent, where it is small
    SAM. It is shorter than SAM's at the same rho.

    Args:
        base: an optimizer instance.
        rho: radius in the metric of the surface; a group option. The paper uses 0.005 to 0.05, and 1 on its toy
            problem.
        sync_ascent: with several processes, average the ascent gradient over them (`True`); or let each one look
            around in a direction of its own, that of its part of the batch, and save an all-reduce (`False`:
            m-sharpness, m the batch of one process). Under FSDP2 all look at one place, so it is averaged anyway.
        metric: `None` for the identity; or `v -> M^-1 v`, the inverse metric of the weights' coordinates. With
            theta = T(psi) and J its Jacobian, `M = J^T J` transports theta's metric to psi. The paper's invariance
            holds only with it: re-deriving `I + g g^T` in other coordinates, as any code without this argument does,
            is another method.
        options: see `flatmin.optim.options.EngineOptions`.

    Cost: two gradients a step. Memory inside a step: one copy of the parameters (more with `metric`).
    `step(closure)` returns the loss at the unperturbed weights.

    The radius depends on the true size of the gradient of the *mean* loss. A summed loss, a loss scaled for fp16
    without `scaler=`, or gradient accumulation that adds instead of averaging makes n large and the method silently
    gradient descent; a gradient norm above 100 in the first ten steps is answered with a warning.

    Raises:
        ValueError: negative `rho`.

    Source: Jacobsen, Arvanitidis, "Monge SAM: Robust Reparameterization-Invariant Sharpness-Aware Minimization Based
    on Loss Geometry", 2025, equation 9.
    """

    radius_name = "rho"

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.05,
        sync_ascent: bool = False,
        *,
        metric: Callable[[Vector], Vector] | None = None,
        **options: Unpack[EngineOptions],
    ):
        self.metric, self.sync_ascent = metric, check_flag("sync_ascent", sync_ascent)
        self._warned = False
        super().__init__(base, rho, **options)

    def rule(self) -> Rule:
        """See `monge_sam` and `monge_sam_in_metric`."""
        if self.metric is not None:
            return monge_sam_in_metric(self.radii(), self.metric)
        looking = self._guard and not self._warned and self.num_steps < NUM_CHECKED
        return monge_sam(self.radii(), self._look) if looking else monge_sam(self.radii())

    @property
    def gradients_per_step(self) -> int:
        """Two: at the weights and at the ascent point."""
        return 2

    def _look(self, g: Vector) -> None:
        n = float(g.size())
        if VANISHING < n < math.inf:
            self._warned = True
            warn(
                f"MongeSAM: the gradient norm is {n:.3g}, so its radius is rho / {math.hypot(1, n):.3g} and the method "
                "is nearly its base optimizer. Is the loss a sum, or scaled? Use a mean, and pass a GradScaler as "
                "scaler=.",
                RuntimeWarning,
            )
