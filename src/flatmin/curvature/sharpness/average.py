"""How much the loss rises when the weights are moved at random: sharpness in the units of training.

    noise_stability     E L(w + u) - L(w),   u random with standard deviation sigma per weight: what NSO penalises
    average_sharpness   E L(w + d) - L(w),   d uniform on the surface of the ball of radius rho (|A^-1 d| = rho)

Both are sums of curvatures to leading order, which ties them to the trace:

    noise_stability = sigma^2 / 2 tr H + O(sigma^4),      average_sharpness = rho^2 / (2 dim) tr(A H A) + O(rho^4)

What they add to the trace: they need only losses (no derivative, any kernel), and they see the loss at the distance
that training sees it, kinks of ReLU included, where the second derivative sees nothing.

Three choices make a draw worth more:

    u and -u on the same draw    the gradient's share g.u, which has mean zero and most of the variance, cancels exactly
    one batch, all places        the losses at w, w + u and w - u are taken on the same batch before the next is loaded
    a fresh u for every batch    the batches' errors are independent and average out; the mean is the same
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch

from flatmin.checks import check_choice, check_positive, check_whole
from flatmin.curvature.function.arguments import of_objective
from flatmin.curvature.function.batches import Batch
from flatmin.curvature.function.objective import Objective
from flatmin.curvature.products.probes import PILOT, Budget, stderr
from flatmin.curvature.results import Estimate, Measurement, student_interval
from flatmin.curvature.sharpness.far import displaced_by
from flatmin.curvature.sharpness.metrics import Metric, ball
from flatmin.noise import Law, Noise, Scale, check_law, mix_seeds
from flatmin.place import Place
from flatmin.radii import Radii, Step

MAX_DRAWS = 1000
Draw = Callable[[int], Noise | Step]  # from a seed, with the weights at home


@dataclass(frozen=True, kw_only=True)
class SharpnessResult(Measurement):
    """A rise of the loss over random displacements.

    Attributes:
        radius: sigma or rho.
        curvature_per_rise: what `value` is multiplied with to give a trace: 2 / sigma^2, or 2 dim / rho^2.
        clean_loss: L(w), which was subtracted. `stderr` includes what its rounding may do to the difference: that of
            the coarsest numbers among parameters, loss and what modules give (bf16 under autocast, say).
        per_layer: layer -> the rise when only that layer is moved. They add up to `value` to leading order only.
        samples: the rises of the single draws, whose mean is `value`.
        num_losses: evaluations of the loss over the whole data that it took, beside the two that check the data.
        converged: whether the requested relative error was reached, by the draws and by rounding.
    """

    radius: float
    curvature_per_rise: float
    clean_loss: float
    per_layer: Mapping[str, Estimate] = field(default_factory=dict)
    samples: tuple[float, ...] = field(default=(), repr=False)
    num_losses: int = 0
    converged: bool = True

    @property
    def implied_trace(self) -> Estimate:
        """The trace of the Hessian (of A H A, if the displacement is scaled by A) if the loss were quadratic here."""
        factor = self.curvature_per_rise
        return Estimate(value=factor * self.value, stderr=factor * self.stderr)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """A confidence interval for the rise (Student's t over the draws)."""
        return student_interval(self.value, self.stderr, len(self.samples), level)


@of_objective
def noise_stability(
    objective: Objective,
    sigma: float,
    *,
    num_draws: int | None = None,
    rtol: float | None = None,
    max_seconds: float | None = None,
    law: Law = "normal",
    scale: Scale = "absolute",
    two_sided: bool = True,
    per_layer: bool = False,
    seed: int | None = 0,
) -> SharpnessResult:
    """The mean rise of the loss under random noise, E L(w + u) - L(w) with u = sigma z, entry by entry.

    The same seed draws the same z for every sigma, so that a curve over sigma is smooth.

    Args:
        objective: what to measure.
        sigma: standard deviation of the noise on each weight; with `scale="filter"` in units of the filter's norm.
        num_draws: passes over the data, each with its own noise; at most 1000 if not given.
        rtol: wanted relative standard error; 0.05 if none of the three is given.
        max_seconds: time, at most.
        law: of z, with mean 0 and variance 1.
        scale: "absolute", or "filter": does not change when a layer of a ReLU network is scaled up and the next down.
        two_sided: evaluate at w + u and w - u and take the mean. One-sided draws have the same mean and, away from a
            minimum, a much larger variance.
        per_layer: also the rise when only one layer is moved, for each layer.
        seed: of the noise; `None` is really random.

    Returns:
        SharpnessResult with `value`, `stderr`, `samples`, `implied_trace` (2 value / sigma^2), `per_layer`.

    Cost: 1 + 2 m losses of the data for a round of m draws (times 1 + number of layers with `per_layer`), and 2 to see
    that the data stays the same. No gradient. Memory: two copies of the parameters.

    Raises:
        ValueError: sigma that is not positive, an unknown law or scale, data that gives another loss on a second pass,
            or a loss that is not finite where the noise leads.

    Source: Zhang, Li, Ju 2024 (the objective that NSO minimises); Li et al. 2018 for the scale of the filters.
    """
    seed = objective.members.seed(seed)
    check_positive("sigma", sigma)
    check_law(law)
    check_choice("scale", scale, get_args(Scale))
    params, layers = objective.params, objective.layers
    names = [None, *(dict.fromkeys(layers) if per_layer else ())]

    def drawer(moved: str | None) -> Draw:
        radii = Radii(sigma if moved in (None, layer) else 0.0 for layer in layers)
        return lambda seed: Noise(params, radii, law, seed, scale=scale)

    sampler = _Sampler(objective, [drawer(name) for name in names], two_sided, seed)
    return sampler.run(
        names,
        _budget(objective, rtol, num_draws, max_seconds),
        radius=sigma,
        curvature_per_rise=2 / sigma**2,
        method=f"{law} noise, {scale} scale, {'two-sided' if two_sided else 'one-sided'}, fresh for every batch",
    )


@of_objective
def average_sharpness(
    objective: Objective,
    rho: float,
    metric: Metric = "euclidean",
    *,
    num_draws: int | None = None,
    rtol: float | None = None,
    max_seconds: float | None = None,
    seed: int | None = 0,
) -> SharpnessResult:
    """The mean rise of the loss over all directions: d uniform on the surface of the ball, both ways along each.

    Args:
        objective: what to measure.
        rho: radius of the ball |A^-1 d| <= rho.
        metric: "euclidean", "adaptive", "filter" or "monge" (`flatmin.curvature.sharpness.metrics`).
        num_draws: passes over the data, each with directions of its own.
        rtol: wanted relative standard error; 0.05 if no budget is given.
        max_seconds: time, at most.
        seed: of the directions; `None` is really random.

    Returns:
        SharpnessResult with `value`, `stderr`, `samples`, `implied_trace` (2 dim value / rho^2).

    Cost: 1 + 2 m losses of the data for a round of m draws, and 2 to see that the data stays the same; one gradient
    for "monge". Memory: three copies of the parameters; four for "adaptive", five for "monge".

    Raises:
        ValueError: rho that is not positive, an unknown metric, data that gives another loss on a second pass, or a
            loss that is not finite on the ball.

    Source: Wen, Ma, Li 2023 ("average-direction sharpness"); the metrics are those of SAM, ASAM and Monge SAM.
    """
    seed = objective.members.seed(seed)
    check_positive("rho", rho)
    to_weights = ball(objective, metric, objective.gradient)
    ones = Radii([1.0] * len(objective.params))

    def draw(seed: int) -> Step:
        z = Noise(objective.params, ones, "normal", seed, keep=False).vector()
        return Step(to_weights(z), [rho / float(z.norm())] * len(objective.params))

    return _Sampler(objective, [draw], True, seed).run(
        [None],
        _budget(objective, rtol, num_draws, max_seconds),
        radius=rho,
        curvature_per_rise=2 * objective.num_params / rho**2,
        method=f"directions on the {metric} sphere, two-sided, fresh for every batch",
    )


class _Sampler:
    """Rises of the loss, pass by pass: one column for each way of drawing."""

    def __init__(self, objective: Objective, drawers: list[Draw], two_sided: bool, seed: int):
        self._objective, self._drawers, self._seed = objective, drawers, seed
        self._signs = (1.0, -1.0) if two_sided else (1.0,)
        self._clean, self._rounds = 0.0, 0

    def run(self, names: list[str | None], budget: Budget, **entries: Any) -> SharpnessResult:
        self._objective.check()
        samples = self._round(0, min(PILOT, budget.max_products))
        while size := min(budget.left(samples[:, 0]), max(len(samples), PILOT)):
            samples = np.concatenate([samples, self._round(len(samples), size)])
        total, columns = samples[:, 0], zip(names[1:], samples.T[1:], strict=True)
        return SharpnessResult(
            value=float(total.mean()),
            stderr=self._error(total),
            num_samples=self._objective.num_samples,
            seed=self._seed,
            clean_loss=self._clean,
            per_layer={str(n): Estimate(value=float(c.mean()), stderr=self._error(c)) for n, c in columns},
            samples=tuple(float(t) for t in total),
            num_losses=self._rounds + samples.size * len(self._signs),
            converged=budget.met(total) and self._above_rounding(total, budget.rtol),
            **entries,
        )

    def _error(self, samples: np.ndarray) -> float:
        """The standard error of the draws, and the rounding of the losses whose difference each of them is."""
        return math.hypot(stderr(samples), self._objective.rounding * self._clean)

    def _above_rounding(self, samples: np.ndarray, rtol: float | None) -> bool:
        rounding = self._objective.rounding * abs(self._clean)
        return rtol is None or bool(rounding <= rtol * abs(samples.mean()))

    @torch.no_grad()
    def _round(self, first: int, size: int) -> np.ndarray:
        totals, clean, count = np.zeros((size, len(self._drawers))), 0.0, 0
        with self._objective.displaced() as place:
            for index, batch in enumerate(self._objective.batches()):
                at_home, n = float(batch.evaluate().loss.double()), batch.size
                for row, column in np.ndindex(totals.shape):
                    place.move(None)
                    u = self._drawers[column](mix_seeds(self._seed, first + row, self._objective.members.number(index)))
                    totals[row, column] += n * (self._mean_loss(place, u, batch) - at_home)
                    del u  # before the next draw is made
                place.move(None)
                clean, count = clean + n * at_home, count + n
        sums = torch.tensor([clean, *totals.flat], dtype=torch.float64, device="cpu")
        self._clean, *means = self._objective.mean(sums, count).tolist()
        self._rounds += 1
        return np.array(means).reshape(totals.shape)

    def _mean_loss(self, place: Place, u: Noise | Step, batch: Batch) -> float:
        losses = []
        for sign in self._signs:
            place.move(u if sign > 0 else -u)
            with displaced_by("radius"):
                losses.append(float(batch.evaluate().loss.double()))
        return math.fsum(losses) / len(losses)


def _budget(objective: Objective, rtol: float | None, num_draws: int | None, max_seconds: float | None) -> Budget:
    if num_draws is not None:
        check_whole("num_draws", num_draws, 1)
    if rtol is None and num_draws is None and max_seconds is None:
        rtol = 0.05
    return Budget(rtol, MAX_DRAWS if num_draws is None else num_draws, max_seconds, objective.members.together)
