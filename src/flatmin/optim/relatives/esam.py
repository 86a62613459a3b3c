"""Efficient SAM: perturb some of the weights, and learn from the samples that the perturbation hurts."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor
from torch.optim import Optimizer

from flatmin.checks import check_flag, check_share
from flatmin.optim.engine.optimizer import FlatOptimizer
from flatmin.optim.options import EngineOptions
from flatmin.optim.registry import register
from flatmin.optim.rule import Probe, Rule
from flatmin.radii import Radii
from flatmin.vectors import Vector


class Hardest:
    """Chooses the samples whose loss has risen most between two probes."""

    def __init__(self, gamma: float):
        self._gamma = gamma
        self._before: list[Tensor] = []  # one entry for each micro-batch
        self._calls = 0

    def remember(self, losses: Tensor) -> Tensor:
        """The first probe: all samples count."""
        self._before.append(losses.detach())
        return losses

    def choose(self, losses: Tensor) -> Tensor:
        """The second probe: the gamma n samples with the largest increase."""
        rise = losses.detach() - self._before[self._calls]
        self._calls += 1
        return losses[rise.topk(max(1, math.ceil(self._gamma * len(losses) - 1e-9))).indices]


def esam(rho: Radii, chosen: Radii, beta: float, hardest: Hardest) -> Rule:
    """G = g_S(W + rho / beta g / |g|), S the samples that were hurt most; `chosen` is rho, and 0 for some tensors."""
    first = Probe(choose=hardest.remember, ascent=True)
    return (yield Probe(_step(rho, chosen, (yield first), beta), choose=hardest.choose))


def _step(rho: Radii, chosen: Radii, g: Vector, beta: float) -> Vector:
    norm = rho.select(g).norm()
    return chosen * (chosen.select(g) * (1.0 / (beta * norm)).nan_to_num(nan=0.0, posinf=0.0))


@register("esam", gradients=2, paper="Du et al. 2022, arXiv:2110.03141")
class ESAM(FlatOptimizer):
    """Efficient SAM around any base optimizer.

    SAM with two savings: each parameter tensor is perturbed with probability beta only (and 1/beta times as far, so
    that the expectation is SAM's step), and the second gradient is that of the share gamma of the samples whose loss
    the perturbation raised most.

    Args:
        base: an optimizer instance.
        rho: radius; a group option.
        beta: share of the tensors that are perturbed; 0.6 (ResNet-18) or 0.5 in the paper.
        gamma: share of the samples in the second gradient; 0.5 in the paper.
        sync_ascent: average the ascent gradient over processes, as in SAM. The samples of the second gradient are
            chosen by each process among its own.
        seed: of the choice of tensors; `None` is really random.
        options: see `flatmin.optim.options.EngineOptions`.

    Needs one loss per sample: `probe.mean(losses).backward()` in the loop, `opt.mean(losses)` in a closure.

    Cost: two gradients a step. The saving of the published code, which runs a separate forward pass to choose samples
    and then works on those only, is *not* realised here: this is the method, as a baseline for what it learns, not
    for its time. Memory inside a step: two copies of the parameters. `step(closure)` returns the loss at the
    unperturbed weights.

    Raises:
        ValueError: negative `rho`, `beta` or `gamma` outside (0, 1], a body that does not call `mean`, or calls it with
            losses that are not (n,).

    Source: Du et al., "Efficient Sharpness-aware Minimization for Improved Training of Neural Networks", ICLR 2022.
    As in its published code whole tensors are chosen. The norm is over all moved parameters, chosen or not, as in the
    paper; in that code the others have no gradient, so that its norm is over the chosen ones, and the step longer.
    """

    radius_name = "rho"
    is_random = True

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.05,
        beta: float = 0.6,
        gamma: float = 0.5,
        seed: int | None = 0,
        sync_ascent: bool = False,
        **options: Unpack[EngineOptions],
    ):
        self.beta, self.gamma = check_share("beta", beta, "(]"), check_share("gamma", gamma, "(]")
        self.sync_ascent = check_flag("sync_ascent", sync_ascent)
        super().__init__(base, rho, seed=seed, **options)

    def rule(self) -> Rule:
        """See `esam`."""
        rho = self.radii()
        generator = torch.Generator("cpu").manual_seed(self.new_seed())
        chance = torch.rand(len(rho.values), generator=generator, dtype=torch.float32, device="cpu").tolist()
        chosen = Radii(r if c < self.beta else 0.0 for r, c in zip(rho.values, chance, strict=True))
        return esam(rho, chosen, self.beta, Hardest(self.gamma))

    @property
    def needs_losses(self) -> bool:
        """Yes: one for each sample."""
        return True

    @property
    def gradients_per_step(self) -> int:
        """Two."""
        return 2
