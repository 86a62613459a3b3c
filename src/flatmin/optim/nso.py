"""Noise stability optimization: average the gradients at W + U and W - U."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack, get_args

from torch.optim import Optimizer

from flatmin.checks import check_choice, check_flag, check_share, check_whole
from flatmin.noise import Law, Scale, check_law
from flatmin.optim.engine.optimizer import FlatOptimizer
from flatmin.optim.options import EngineOptions
from flatmin.optim.parts import half
from flatmin.optim.registry import register
from flatmin.optim.rule import Probe, Rule


def nso(draw: Callable[[], Any], num_perturbations: int, antithetic: bool, clean_weight: float) -> Rule:
    """G = c g(W) + (1 - c) / (2k) sum_j [g(W + U_j) + g(W - U_j)]; one-point: (1 - c) / k sum_j g(W + U_j)."""
    share = (1.0 - clean_weight) / (num_perturbations * (2 if antithetic else 1))
    if clean_weight > 0:
        yield Probe(weight=clean_weight)
    for _ in range(num_perturbations if share > 0 else 0):
        u = draw()
        yield Probe(u, weight=share)
        if antithetic:
            yield Probe(-u, weight=share)
        del u  # before the next draw is made
    return None


def nso_split(draw: Callable[[], Any], num_perturbations: int) -> Rule:
    """G = 1/(2k) sum_j [g_1(W + U_j) + g_2(W - U_j)], g_1 and g_2 the gradients of the two halves of the batch."""
    for _ in range(num_perturbations):
        u = draw()
        yield Probe(u, weight=0.5 / num_perturbations, part=half(0))
        yield Probe(-u, weight=0.5 / num_perturbations, part=half(1))
        del u
    return None


def mixed_split(draw: Callable[[], Any], clean_weight: float) -> Rule:
    """G = c g_1(W) + (1 - c) g_2(W + U)."""
    yield Probe(weight=clean_weight, part=half(0))
    yield Probe(draw(), weight=1.0 - clean_weight, part=half(1))
    return None


@register("nso", gradients=2, paper="Zhang, Li, Ju 2024, arXiv:2306.08553")
class NSO(FlatOptimizer):
    """Noise stability optimization around any base optimizer.

    Descends on the smoothed loss `F(W) = E f(W + U)`, U with independent entries of mean 0 and variance sigma^2:

        F(W) = f(W) + sigma^2 / 2 tr(Hessian f(W)) + O(sigma^4),

    for f four times differentiable, so sigma^2 / 2 is the weight of a penalty on the Hessian trace ((1 - c) sigma^2 / 2
    with `clean_weight` c). With ReLU, kinks within sigma add a term of the same order (docs/concepts/flatness.md). The
    two-point estimate

        G = 1/(2k) sum_j [g(W + U_j) + g(W - U_j)]

    cancels the term `Hessian U_j`, whose variance sigma^2 |Hessian|_F^2 the one-point estimate carries.

    Args:
        base: an optimizer instance, e.g. `torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)`.
        sigma: standard deviation of the noise, in the units of the weights. A group option: it can differ by
            group, be scheduled, and 0 leaves a group alone. The published scripts search 0.005 to 0.02 for fine-tuning
            on images, and up to 0.1 on graphs.
        num_perturbations: k, the number of antithetic pairs (of single draws if not `antithetic`).
        antithetic: the two-point estimate; `False` is the one-point baseline ("WP-SGD").
        clean_weight: weight c in [0, 1] of the gradient at W itself; at 0 that pass is not run.
        law: "normal", "uniform", "laplace", "rademacher" or "binomial".
        scale: "absolute", or "filter": sigma times the norm of the filter (row of the leading dimension) that a weight
            belongs to, so that the noise follows the scale of the weights. The trace is then that of A H A, A those
            norms, and no fixed function is descended on, since A moves with W.
        split_batch: the first half of the batch at W + U, the second at W - U (with `antithetic=False` and a clean
            weight: the first half at W, the second at W + U). One pass over the data instead of two, the same
            expectation; what it costs in variance is in docs/concepts/step.md. The two halves no longer share their
            samples, so `Hessian U` cancels only as far as the halves' Hessians agree. Needs `probe.take` (`opt.take`
            in a closure) and at least 2 samples; of an odd batch the second half is the larger.
        seed: of the noise stream, apart from torch's; `None` is really random (and saved with the state).
        noise_per_rank: with several processes (DistributedDataParallel), draw noise on each of them independently: the
            average is over `num_perturbations` times as many draws as there are processes, at no cost. By default all
            draw the same, so that the number of processes does not change the run.
        options: see `flatmin.optim.options.EngineOptions`.

    Cost: 2k gradients a step (k if not `antithetic`), one more if `clean_weight` > 0; half of that with
    `split_batch`. Memory inside a step: two copies of the parameters (three with a closure and several perturbations);
    one less with `low_memory=True`; none between steps. `step(closure)` returns the mean loss over the probes, or the
    loss at W if `clean_weight` > 0 (of the whole batch: with `split_batch` the mean over both halves).

    Raises:
        ValueError: negative `sigma`, `num_perturbations` < 1, `clean_weight` outside [0, 1], an unknown law (Cauchy
            noise has no variance), a split that leaves nothing to split, noise per rank on sharded parameters.

    Source: Zhang, Li, Ju, "Noise Stability Optimization for Finding Flat Minima: A Hessian-based Regularization
    Approach", TMLR 2024; defaults of its README (sigma 0.01, k = 1, two-point, c = 0). The published code also runs a
    clean pass when its weight is 0; this does not. `scale="filter"` is the noise of R-SAM and RWP.
    """

    radius_name = "sigma"
    is_random = True

    def __init__(
        self,
        base: Optimizer,
        sigma: float = 0.01,
        num_perturbations: int = 1,
        antithetic: bool = True,
        clean_weight: float = 0.0,
        law: Law = "normal",
        split_batch: bool = False,
        seed: int | None = 0,
        *,
        scale: Scale = "absolute",
        noise_per_rank: bool = False,
        **options: Unpack[EngineOptions],
    ):
        _check(num_perturbations, antithetic, clean_weight, scale, split_batch)
        self.num_perturbations = num_perturbations
        self.antithetic = antithetic
        self.clean_weight = float(clean_weight)
        self.law = check_law(law)
        self.scale: Scale = scale
        self.split_batch = split_batch
        self.noise_per_rank = check_flag("noise_per_rank", noise_per_rank)
        super().__init__(base, sigma, seed=seed, **options)

    @property
    def reads_weights(self) -> bool:  # type: ignore[override]
        """With `scale="filter"`."""
        return self.scale == "filter"

    @property
    def needs_take(self) -> bool:
        """With `split_batch`."""
        return self.split_batch

    def rule(self) -> Rule:
        """See `nso`, `nso_split` and `mixed_split`."""

        def draw() -> Any:
            return self.noise(self.law, scale=self.scale, per_rank=self.noise_per_rank)

        if not self.split_batch:
            return nso(draw, self.num_perturbations, self.antithetic, self.clean_weight)
        return nso_split(draw, self.num_perturbations) if self.antithetic else mixed_split(draw, self.clean_weight)

    @property
    def gradients_per_step(self) -> int:
        """2k (k if one-point), and one for the clean gradient if it has weight; half of that with `split_batch`."""
        noisy = self.num_perturbations * (2 if self.antithetic else 1)
        total = (noisy if self.clean_weight < 1 else 0) + (1 if self.clean_weight > 0 else 0)
        return total // 2 if self.split_batch else total


def _check(num_perturbations: int, antithetic: bool, clean_weight: float, scale: str, split_batch: bool) -> None:
    check_whole("num_perturbations", num_perturbations, 1)
    check_flag("antithetic", antithetic)
    check_flag("split_batch", split_batch)
    check_share("clean_weight, the share of the gradient at the unperturbed weights,", clean_weight)
    check_choice("scale", scale, get_args(Scale))
    two_points = antithetic and clean_weight == 0
    mixed = not antithetic and 0 < clean_weight < 1 and num_perturbations == 1
    if split_batch and not (two_points or mixed):
        raise ValueError(
            "split_batch=True shares the batch between two points: W + U and W - U (antithetic=True, clean_weight=0), "
            "or W and W + U (antithetic=False, 0 < clean_weight < 1, num_perturbations=1)."
        )


register("nso-one-point", gradients=1, paper="baseline in arXiv:2306.08553 (WP-SGD)", antithetic=False)(NSO)
register("nso-split", gradients=1, paper="arXiv:2306.08553, each point on half of the batch", split_batch=True)(NSO)
register(
    "rwp",
    gradients=1,
    paper="Li et al. 2024, random weight perturbation (RWP), TMLR",
    antithetic=False,
    clean_weight=0.5,
    scale="filter",
    split_batch=True,
)(NSO)
