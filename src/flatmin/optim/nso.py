"""Noise stability optimization: average the gradients at W + U and W - U."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

from torch.optim import Optimizer

from flatmin.noise import Law, check_law
from flatmin.optim.engine import FlatOptimizer
from flatmin.optim.options import EngineOptions
from flatmin.optim.registry import register
from flatmin.optim.rule import Displacement, Probe, Rule


def nso(draw: Callable[[], Any], num_perturbations: int, antithetic: bool, clean_weight: float) -> Rule:
    """G = c g(W) + (1 - c) / (2k) sum_j [g(W + U_j) + g(W - U_j)]; one-point: (1 - c) / k sum_j g(W + U_j)."""
    share = (1.0 - clean_weight) / (num_perturbations * (2 if antithetic else 1))
    if clean_weight > 0:
        yield Probe(weight=clean_weight)
    for _ in range(num_perturbations if share > 0 else 0):
        u: Displacement = draw()
        yield Probe(u, weight=share)
        if antithetic:
            yield Probe(-u, weight=share)  # type: ignore[operator]
        del u  # before the next draw is made
    return None


@register("nso", gradients=2, paper="Zhang, Li, Ju 2024, arXiv:2306.08553")
class NSO(FlatOptimizer):
    """Noise stability optimization around any base optimizer.

    Descends on the smoothed loss `F(W) = E f(W + U)`, U with independent entries of mean 0 and variance sigma^2:

        F(W) = f(W) + sigma^2 / 2 tr(Hessian f(W)) + O(sigma^4),

    so sigma^2 is the strength of a penalty on the Hessian trace. The two-point estimate

        G = 1/(2k) sum_j [g(W + U_j) + g(W - U_j)]

    cancels the term `Hessian U_j`, whose variance sigma^2 |Hessian|_F^2 the one-point estimate carries.

    Args:
        base: an optimizer instance, e.g. `torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)`.
        sigma: standard deviation of the noise, in the units of the weights. A group option: it can differ by
            group, be scheduled, and 0 leaves a group alone. The papers use 0.008 to 0.02 for fine-tuning.
        num_perturbations: k, the number of antithetic pairs (of single draws if not `antithetic`).
        antithetic: the two-point estimate; `False` is the one-point baseline ("WP-SGD").
        clean_weight: weight c in [0, 1] of the gradient at W itself; at 0 that pass is not run.
        law: "normal", "uniform", "laplace" or "rademacher".
        seed: of the noise stream, apart from torch's; `None` is really random (and saved with the state).
        options: see `flatmin.optim.options.EngineOptions`.

    Cost: 2k gradients a step (k if not `antithetic`), one more if `clean_weight` > 0. Memory inside a step: two
    copies of the parameters in the loop form, three with a closure; one less with `low_memory=True`; none between
    steps. `step(closure)` returns the mean loss over the probes, or the loss at W if `clean_weight` > 0.

    Raises:
        ValueError: negative `sigma`, `num_perturbations` < 1, `clean_weight` outside [0, 1], an unknown law.

    Source: Zhang, Li, Ju, "Noise Stability Optimization for Finding Flat Minima: A Hessian-based Regularization
    Approach", TMLR 2024. The published code also runs a clean pass when its weight is 0; this does not.
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
        seed: int | None = 0,
        **options: Unpack[EngineOptions],
    ):
        if num_perturbations < 1:
            raise ValueError(f"num_perturbations must be at least 1, got {num_perturbations}.")
        if not 0 <= clean_weight <= 1:
            raise ValueError(
                f"clean_weight must be between 0 and 1, got {clean_weight}. It is the share of the gradient at "
                "the unperturbed weights; 0 (the default) does not compute it."
            )
        self.num_perturbations = num_perturbations
        self.antithetic = antithetic
        self.clean_weight = float(clean_weight)
        self.law = check_law(law)
        super().__init__(base, sigma, seed=seed, **options)

    def rule(self) -> Rule:
        """See `nso`."""
        return nso(lambda: self.noise(self.law), self.num_perturbations, self.antithetic, self.clean_weight)

    @property
    def gradients_per_step(self) -> int:
        """2k (k if one-point), and one for the clean gradient if it has weight."""
        noisy = self.num_perturbations * (2 if self.antithetic else 1)
        return (noisy if self.clean_weight < 1 else 0) + (1 if self.clean_weight > 0 else 0)


register("nso-one-point", gradients=1, paper="baseline in arXiv:2306.08553 (WP-SGD)", antithetic=False)(NSO)
