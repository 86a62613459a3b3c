"""How fast a stationary point of the smoothed loss can be found: the upper bound, and a function that is as hard.

F = E f(W + U), C the smoothness of f, D^2 = F(W_0) - inf F, s^2 the variance of a stochastic gradient (of the whole
vector), H = E|U|^2, k independent perturbations a step, each with a sample of its own, T steps.

    upper    E|grad F(W_t)|^2 <= sqrt(2 C D^2 (s^2 + C^2 H) / (k T)) + 2 C D^2 / T       t uniform, the best step
    lower    min_t E|grad F(W_t)|^2 >= (D / 2) sqrt(C s^2 / (k T))                       on the function below

so that no step size does better than 1 / sqrt(kT).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flatmin.problems.analytic import Problem, quadratic


def rate_bound(
    num_steps: int, k: int = 1, *, smoothness: float, gap: float, noise_var: float, perturbation: float = 0.0
) -> float:
    """The upper bound on E|grad F(W_t)|^2, t uniform in 0 .. T - 1, with the step of `best_step`.

    Args:
        num_steps: T.
        k: perturbations a step.
        smoothness: C.
        gap: D^2 = F(W_0) - inf F.
        noise_var: s^2 = E|stochastic gradient - gradient|^2.
        perturbation: H = E|U|^2; d sigma^2 for Gaussian noise.

    Returns:
        the bound, in the units of a squared gradient.

    Source: Zhang, Li, Ju 2024, arXiv:2306.08553, theorem on the rate (its constants as recalled; the proof is the
    standard one for SGD on a C-smooth function with gradient variance (s^2 + C^2 H) / k).
    """
    variance = noise_var + smoothness**2 * perturbation
    return math.sqrt(2 * smoothness * gap * variance / (k * num_steps)) + 2 * smoothness * gap / num_steps


def best_step(
    num_steps: int, k: int = 1, *, smoothness: float, gap: float, noise_var: float, perturbation: float = 0.0
) -> float:
    """min(1 / C, sqrt(2 D^2 k / (C T (s^2 + C^2 H)))): the constant step that gives `rate_bound`.

    Without any noise it is 1 / C. The arguments, and the source, are those of `rate_bound`.
    """
    variance = noise_var + smoothness**2 * perturbation
    if variance == 0:
        return 1 / smoothness
    return min(1 / smoothness, math.sqrt(2 * gap * k / (smoothness * num_steps * variance)))


@dataclass(frozen=True)
class HardQuadratic(Problem):
    """f(x) = mu x_0^2 / 2 + C x_1^2 / 2, hard for SGD with one given constant step.

    Small steps do not get down the flat direction x_0 in time, large ones cannot get under the noise in the steep
    direction x_1, where it starts at the height at which descent and noise balance.

    Attributes:
        step: eta, the step that it is hard for.
        decays: the factors 1 - eta mu and 1 - eta C by which a step moves each variable.
        kick: variance of what the noise adds to x_1 in a step, eta^2 s^2 / k.
    """

    step: float
    decays: Tensor
    kick: float

    def expected_squared_gradient(self, num_steps: int) -> Tensor:
        """E|grad F(W_t)|^2 for t = 0 .. num_steps, (num_steps + 1,), exactly; any symmetric noise U gives the same."""
        t = torch.arange(num_steps + 1, dtype=torch.float64)
        second = self.start.square()[:, None] * self.decays[:, None] ** (2 * t)
        steep = self.decays[1] ** 2
        second[1] += self.kick * (1 - steep**t) / (1 - steep)
        return (self.hessian(self.start).diagonal().square()[:, None] * second).sum(0)


def hard_quadratic(
    step: float, num_steps: int, k: int = 1, *, smoothness: float = 1.0, gap: float = 1.0, noise_var: float = 1.0
) -> HardQuadratic:
    """The quadratic on which SGD and NSO with constant step eta stay above (D / 2) sqrt(C s^2 / (k T)) for T steps.

    mu = min(C, 1 / (2 eta T)); x_1 starts where C x_1^2 / 2 = eta s^2 / (2 k (2 - eta C)), x_0 with the rest of D^2.
    The gradient noise has variance s^2 / k and acts on x_1 only. Both terms of the gradient are bounded below,

        mu^2 x_0^2 >= (D^2 / 2) min(1 / (4 eta T), C / 2)  and  C^2 E x_1^2 >= C eta s^2 / (2 k):

    the sum with the first in the minimum is least at one eta, and is the bound there; the second, where eta is so small
    that mu = C, is above the bound alone, since s^2 <= k C D^2 and T >= 4.

    Args:
        step: eta, in (0, 1 / C].
        num_steps: T >= 4.
        k: perturbations a step.
        smoothness: C.
        gap: D^2.
        noise_var: s^2, at most k C D^2.

    Raises:
        ValueError: outside these ranges.

    Source: ours, for constant steps. The paper's instance, which holds for any sequence of steps fixed beforehand
    (arXiv:2306.08553, after Drori and Shamir 2020), could not be read here: this is a reconstruction of the claim.
    """
    if not 0 < step * smoothness <= 1:
        raise ValueError(f"step must be in (0, 1 / smoothness], got {step}.")
    if num_steps < 4 or noise_var > k * smoothness * gap:
        raise ValueError("the bound needs num_steps >= 4 and noise_var <= k * smoothness * gap.")
    flat = min(smoothness, 1 / (2 * step * num_steps))
    height = step * noise_var / (2 * k * (2 - step * smoothness))
    start = torch.tensor(
        [math.sqrt(2 * (gap - height) / flat), math.sqrt(2 * height / smoothness)], dtype=torch.float64
    )
    curvatures = torch.tensor([flat, smoothness], dtype=torch.float64)
    problem = quadratic(torch.diag(curvatures), name=f"hard quadratic for step {step:g}")
    return HardQuadratic(
        **{**vars(problem), "start": start},
        step=step,
        decays=1 - step * curvatures,
        kick=step**2 * noise_var / k,
    )
