"""LookSAM: SAM every few steps, and in between its direction from memory."""

from __future__ import annotations

from typing import Unpack

from torch.optim import Optimizer

from flatmin.checks import check_number, check_whole
from flatmin.optim.engine.optimizer import FlatOptimizer
from flatmin.optim.options import EngineOptions
from flatmin.optim.registry import register
from flatmin.optim.rule import HERE, Rule
from flatmin.radii import Radii


def looksam(rho: Radii, alpha: float, fresh: bool, memory) -> Rule:
    """Fresh: G = g_p, and v = the unit vector of g_p's part orthogonal to g is kept. Else G = g + alpha |g| v."""
    g = yield HERE
    v = memory.get("ascent")
    if not fresh and v is not None:
        return g + v.within(g) * (g.norm() * alpha)  # what has no gradient is not trained: frozen, or unused
    perturbed = yield rho.ascent(g)
    memory["ascent"] = perturbed.reject(g).unit()
    return perturbed


@register("looksam", gradients=1.2, paper="Liu et al. 2022, arXiv:2203.02714")
class LookSAM(FlatOptimizer):
    """LookSAM around any base optimizer: SAM's second gradient at one step of k only.

    At every k-th step `G = g_p = g(W + rho g / |g|)`, and the unit vector v of the part of g_p orthogonal to g is
    remembered. At the others

        G = g + alpha |g| v.

    Args:
        base: an optimizer instance.
        rho: radius; a group option.
        k: how often the second gradient is taken, among the steps that `every`, `start` and `stop` leave; the paper
            uses 5.
        alpha: weight of the remembered direction; the paper uses 0.7.
        options: see `flatmin.optim.options.EngineOptions`.

    Cost: 1 + 1/k gradients a step, with a closure too. Memory inside a step: three copies of the parameters; one
    between steps and in checkpoints: v. `step(closure)` returns the loss at the unperturbed weights.

    Raises:
        ValueError: negative `rho` or `alpha`, k < 1.

    Source: Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization", CVPR 2022. The defaults are
    from the paper, known at second hand.
    """

    radius_name = "rho"
    remembers = ("ascent",)

    def __init__(
        self, base: Optimizer, rho: float = 0.05, k: int = 5, alpha: float = 0.7, **options: Unpack[EngineOptions]
    ):
        self.k, self.alpha = check_whole("k", k, 1), check_number("alpha", alpha, 0.0)
        super().__init__(base, rho, **options)

    def rule(self) -> Rule:
        """See `looksam`."""
        return looksam(self.radii(), self.alpha, self.num_perturbed % self.k == 0, self.memory)

    @property
    def gradients_per_step(self) -> float:
        """1 + 1/k on average."""
        return 1 + 1 / self.k
