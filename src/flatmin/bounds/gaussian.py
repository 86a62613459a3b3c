"""Classical PAC-Bayes bounds for Gaussian weights: certificates, if their assumptions hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from flatmin.bounds.result import Bound, check_common, check_delta
from flatmin.checks import check_number, check_positive, check_share, check_whole

NOISY = "these weights with noise of standard deviation {sigma:.4g}"
GAUSSIAN = (
    "the loss of a sample is in [0, C]",
    "the samples are independent draws of one distribution",
    "the centre and the width of the prior were chosen before the data were seen",
    "it is about the random weights w + sigma z, on average over z, and `stochastic_loss` is their training loss",
)


def gaussian_bound(
    stochastic_loss: float,
    *,
    largest_loss: float,
    distance: float,
    sigma: float,
    num_params: int,
    num_samples: int,
    delta: float = 0.05,
    prior_sigma: float | None = None,
) -> Bound:
    """The PAC-Bayes-kl bound for Gaussian weights: posterior N(w, sigma^2 I), prior N(w0, prior_sigma^2 I).

        kl(Lhat / C, L / C) <= (KL(posterior, prior) + log(2 sqrt(n) / delta)) / n,    kl between coins

    solved for the largest L. Never worse than McAllester's square root, and much better at small losses.

    Args:
        stochastic_loss: mean training loss of the random weights, E_z Lhat(w + sigma z), or an upper bound of it, whose
            own chance of failing is to be added to delta. A mean over draws, as `noise_stability` has it, is an
            estimate: good for a look, not for a certificate (see the example of `best_gaussian`).
        largest_loss: C. Clip the loss (or bound the 0-1 error with C = 1) if it has none.
        distance: |w - w0| from the prior's centre, for instance the initial weights.
        sigma: of the posterior.
        num_params: the number of weights.
        num_samples: n, at least 8.
        delta: the statement fails with at most this probability.
        prior_sigma: of the prior; sigma if not given, and then KL = distance^2 / (2 sigma^2).

    Raises:
        ValueError: for a number out of its range.

    Source: Maurer 2004, after Langford, Seeger 2001 and McAllester 1999.
    """
    check_common(stochastic_loss, largest_loss, num_samples, delta)
    if num_samples < 8:
        raise ValueError(f"num_samples must be at least 8 for this theorem, got {num_samples}.")
    divergence = gaussian_divergence(distance, sigma, num_params, prior_sigma)
    budget = (divergence + math.log(2 * math.sqrt(num_samples) / delta)) / num_samples
    share = inverse_kl(stochastic_loss / largest_loss, budget)
    terms = {
        "C": largest_loss,
        "KL": divergence,
        "distance": distance,
        "sigma": sigma,
        "n": float(num_samples),
        "delta": delta,
        "(KL + log(2 sqrt(n)/delta)) / n": budget,
        "McAllester": stochastic_loss + largest_loss * math.sqrt(budget / 2),
    }
    return Bound(
        value=largest_loss * share,
        training=stochastic_loss,
        terms=terms,
        largest_loss=largest_loss,
        confidence=1 - delta,
        theorem="PAC-Bayes-kl bound (Maurer 2004) for Gaussian weights",
        assumptions=GAUSSIAN,
        certificate=True,
        about=NOISY.format(sigma=sigma),
    )


def catoni_bound(
    stochastic_loss: float,
    *,
    largest_loss: float,
    distance: float,
    sigma: float,
    num_params: int,
    num_samples: int,
    temperature: float,
    delta: float = 0.05,
    prior_sigma: float | None = None,
) -> Bound:
    """Catoni's bound for Gaussian weights, with a temperature beta > 0 that was chosen before the data were seen.

        L / C <= (1 - exp(-beta Lhat / C - (KL + log(1 / delta)) / n)) / (1 - exp(-beta))

    Args:
        stochastic_loss: mean training loss of the random weights, E_z Lhat(w + sigma z).
        largest_loss: C.
        distance: |w - w0| from the prior's centre.
        sigma: of the posterior.
        num_params: the number of weights.
        num_samples: n.
        temperature: beta.
        delta: the statement fails with at most this probability.
        prior_sigma: of the prior; sigma if not given.

    Raises:
        ValueError: for a number out of its range.

    Source: Catoni 2007, theorem 1.2.6.
    """
    check_common(stochastic_loss, largest_loss, num_samples, delta)
    check_positive("temperature", temperature)
    divergence = gaussian_divergence(distance, sigma, num_params, prior_sigma)
    budget = (divergence + math.log(1 / delta)) / num_samples
    share = math.expm1(-temperature * stochastic_loss / largest_loss - budget) / math.expm1(-temperature)
    terms = {"C": largest_loss, "KL": divergence, "distance": distance, "sigma": sigma, "n": float(num_samples)}
    return Bound(
        value=largest_loss * share,
        training=stochastic_loss,
        terms={**terms, "delta": delta, "temperature": temperature, "(KL + log(1/delta)) / n": budget},
        largest_loss=largest_loss,
        confidence=1 - delta,
        theorem="Catoni's bound (2007) for Gaussian weights",
        assumptions=(*GAUSSIAN, "the temperature was chosen before the data were seen"),
        certificate=True,
        about=NOISY.format(sigma=sigma),
    )


def best_gaussian(
    stochastic_losses: Mapping[float, float],
    *,
    largest_loss: float,
    distance: float,
    num_params: int,
    num_samples: int,
    delta: float = 0.05,
) -> Bound:
    """The smallest `gaussian_bound` over a grid of sigma, each of which is charged delta / (number of sigmas).

    Because of that charge all of them hold at once, so the best may be chosen after the data were seen. The grid itself
    may not depend on them.

    Args:
        stochastic_losses: sigma -> mean training loss of the random weights w + sigma z.
        largest_loss: C.
        distance: |w - w0| from the prior's centre.
        num_params: the number of weights.
        num_samples: n.
        delta: the statement fails with at most this probability.

    Raises:
        ValueError: for an empty grid or a number out of its range.

    Source: Langford, Caruana 2001; Dziugaite, Roy 2017 for the union over a grid.

    Example:
        # `errors` is an Objective with the 0-1 loss. A mean over 1,000 draws gives an upper bound of the expectation,
        # which fails once in 100 times over all three sigmas; with delta = 0.04 the whole holds with probability 0.95.
        clean, losses = errors.loss(), {}
        for sigma in (0.01, 0.03, 0.1):
            mean = clean + flatmin.noise_stability(errors, sigma, num_draws=1000).value
            losses[sigma] = flatmin.bounds.inverse_kl(mean, math.log(3 / 0.01) / 1000)
        distance = float((flatmin.Vector(errors.params) - flatmin.Vector(initial)).norm())
        flatmin.bounds.best_gaussian(losses, largest_loss=1.0, distance=distance, num_params=errors.num_params,
            num_samples=errors.num_samples, delta=0.04)
    """
    if not stochastic_losses:
        raise ValueError("stochastic_losses is empty: give at least one sigma with its loss.")
    check_delta(delta)  # its shares may be in range where it is not
    bounds = [
        gaussian_bound(
            loss,
            largest_loss=largest_loss,
            distance=distance,
            sigma=sigma,
            num_params=num_params,
            num_samples=num_samples,
            delta=delta / len(stochastic_losses),
        )
        for sigma, loss in stochastic_losses.items()
    ]
    best = min(bounds, key=lambda bound: bound.value)
    return replace(
        best,
        confidence=1 - delta,
        terms={**best.terms, "sigmas tried": float(len(bounds))},
        theorem=f"{best.theorem}, the best of {len(bounds)} sigmas (union bound)",
        assumptions=(*best.assumptions, "the grid of sigmas was chosen before the data were seen"),
    )


def gaussian_divergence(distance: float, sigma: float, num_params: int, prior_sigma: float | None = None) -> float:
    """KL(N(w, sigma^2 I), N(w0, prior_sigma^2 I)) with |w - w0| = distance.

        num_params (log(s0 / s) + s^2 / (2 s0^2) - 1/2) + distance^2 / (2 s0^2),     s = sigma, s0 = prior_sigma

    Args:
        distance: between the centres.
        sigma: of the first.
        num_params: the dimension, at least 1.
        prior_sigma: of the second; sigma if not given.

    Returns:
        the divergence in nats; infinite beyond the largest number.

    Raises:
        ValueError: for a width that is not positive, a negative distance, or a dimension that is no positive integer.
    """
    prior_sigma = sigma if prior_sigma is None else prior_sigma
    check_positive("sigma", sigma)
    check_positive("prior_sigma", prior_sigma)
    check_number("distance", distance, 0.0)
    check_whole("num_params", num_params, 1)
    ratio, moved = sigma / prior_sigma, distance / prior_sigma
    # By products and a difference of logarithms: powers raise where they overflow, and a ratio may underflow to 0.
    widths = ratio * ratio / 2 - 0.5 - (math.log(sigma) - math.log(prior_sigma))
    return num_params * widths + moved * moved / 2


def inverse_kl(q: float, budget: float) -> float:
    """The largest p with kl(q, p) = q log(q / p) + (1 - q) log((1 - q) / (1 - p)) <= budget.

    Args:
        q: the chance of one coin, in [0, 1].
        budget: of the divergence between it and the other, in nats.

    Returns:
        p, in [q, 1]; q itself where the budget is not positive. Found to 1e-12 in log(1 - p).

    Raises:
        ValueError: for q outside [0, 1].

    Source: Langford, Caruana 2001.
    """
    check_share("q", q)
    if q >= 1 or budget <= 0:
        return q
    if math.isinf(budget):
        return 1.0
    if q == 0:
        return -math.expm1(-budget)

    from scipy.optimize import brentq  # here, since few need it and it is slow to import

    def excess(log_rest: float) -> float:  # in log(1 - p), so that p may come near 1
        p = -math.expm1(log_rest)
        return q * math.log(q / p) + (1 - q) * (math.log1p(-q) - log_rest) - budget

    low = math.log1p(-q) - (budget + 1) / (1 - q)
    return -math.expm1(brentq(excess, low, math.log1p(-q), xtol=1e-12))  # type: ignore[arg-type]
