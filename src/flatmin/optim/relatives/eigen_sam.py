"""Eigen-SAM: bend the ascent towards the top eigenvector of the Hessian."""

from __future__ import annotations

from typing import Unpack

import torch
from torch.optim import Optimizer

from flatmin.checks import check_number, check_whole
from flatmin.optim.engine.optimizer import FlatOptimizer
from flatmin.optim.options import EngineOptions
from flatmin.optim.registry import register
from flatmin.optim.rule import HERE, Rule
from flatmin.radii import Radii
from flatmin.vectors import Vector

NUM_ITERATIONS = 5
STEP = 1e-2  # of the central difference, in the units of the weights


def eigen_sam(rho: Radii, alpha: float, start: Vector | None, memory) -> Rule:
    """G = g(W + rho (u + alpha sign(u.v) v_perp)), u = g / |g|, v the top eigenvector of the Hessian.

    With `start` v is found again by power iteration on H v = [g(W + h v) - g(W - h v)] / 2h: ten more gradients. It
    begins at the v before, and at `start` where that is zero: a layer that was not perturbed then.
    """
    g = yield HERE
    v = memory.get("eigenvector")
    if start is not None:
        v = rho.select(start if v is None else _filled(v, start.unit())).unit()
        for _ in range(NUM_ITERATIONS):
            ahead = yield v * STEP
            behind = yield v * -STEP
            v = rho.select(ahead - behind).unit()
            del ahead, behind
        memory["eigenvector"] = v
    u = rho.select(g).unit()
    if v is not None:
        u = u + v.reject(u) * (u.dot(v).sign() * alpha)
    e = rho * u
    del g, u, v
    return (yield e)


def _filled(v: Vector, start: Vector) -> Vector:
    pairs = zip(v.tensors, start.tensors, strict=True)
    return Vector(s if t is None or s is None else torch.where(t == 0, s, t) for t, s in pairs)


@register("eigen-sam", gradients=2.1, paper="Luo et al. 2024, explicit eigenvalue regularization, NeurIPS")
class EigenSAM(FlatOptimizer):
    """Eigen-SAM around any base optimizer.

    SAM acts on the largest eigenvalue of the Hessian only as far as g is aligned with its eigenvector v. So

        G = g(W + rho (u + alpha sign(u.v) v_perp)),    u = g / |g|,    v_perp = v - (u.v) u,

    and every `frequency` steps v is found by five power iterations.

    Args:
        base: an optimizer instance.
        rho: radius; a group option; 0.1 in the published runs.
        alpha: how far to bend; 0.2 in the published runs; 0 is SAM.
        frequency: perturbed steps between two searches for v; 100 in the published runs.
        seed: of the first vector; `None` is really random.
        options: see `flatmin.optim.options.EngineOptions`.

    Of micro-batches that are perturbed one by one (`probes(share=)`) the first one finds v for all.

    Products with the Hessian are central differences of gradients, because a rule asks for nothing else; the published
    code uses double backward. Power iteration finds the eigenvalue of largest *size*.

    Cost: two gradients a step and ten more every `frequency` steps. Memory inside a step: four copies of the
    parameters; one between steps and in checkpoints: v. `step(closure)` returns the loss at the unperturbed weights.

    Raises:
        ValueError: negative `rho`, `frequency` < 1, `alpha` not finite.

    Source: Luo et al., "Explicit Eigenvalue Regularization Improves Sharpness-Aware Minimization", NeurIPS 2024.
    """

    radius_name = "rho"
    remembers = finds_once = ("eigenvector",)
    is_random = True
    takes_sparse = False  # v is dense where a search fills it

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.1,
        alpha: float = 0.2,
        frequency: int = 100,
        seed: int | None = 0,
        **options: Unpack[EngineOptions],
    ):
        self.alpha, self.frequency = check_number("alpha", alpha), check_whole("frequency", frequency, 1)
        super().__init__(base, rho, seed=seed, **options)

    def rule(self) -> Rule:
        """See `eigen_sam`."""
        rho, start = self.radii(), None
        is_due = self.num_perturbed % self.frequency == 0 and not self.memory.is_found("eigenvector")
        if is_due or self.memory.get("eigenvector") is None:  # a search may have been in a step that was skipped
            start = self.noise("normal", rho.ones).vector()
        return eigen_sam(rho, self.alpha, start, self.memory)

    @property
    def gradients_per_step(self) -> float:
        """2 + 10 / frequency on average."""
        return 2 + 2 * NUM_ITERATIONS / self.frequency
