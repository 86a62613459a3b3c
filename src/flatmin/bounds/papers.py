"""The bounds of the flat-minima papers: about the weights themselves, with terms left out: scores, no certificates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flatmin.bounds.result import Bound, check_common
from flatmin.checks import check_number, check_share

MEMORY = "constants from memory of the published theorem (medium confidence); check them before you quote the number"


def trace_bound(
    training_loss: float,
    *,
    largest_loss: float,
    trace: float,
    distance: float,
    num_samples: int,
    delta: float = 0.05,
    eps: float | None = None,
) -> Bound:
    """The Hessian-trace bound of noise stability optimization.

        L(w) <= (1 + eps) Lhat(w) + (1 + eps) sqrt(C alpha r^2 / n) + O(n^(-3/4) log(1 / delta))

    The O term has no published constant and is left out, so delta does not enter the value: it is a score, which no
    probability goes with (`confidence` is nan).

    Args:
        training_loss: Lhat(w), the mean over the training data.
        largest_loss: C, no loss is above it.
        trace: alpha, the largest trace of the Hessian of a sample's loss, over all samples and weights within r. A
            maximum over the data at hand is an estimate of it from below, and the trace of the mean loss (what
            `flatmin.trace` gives) is below that: with it the number is a score, not a bound.
        distance: r, how far the weights are from where they started, which must not depend on the data.
        num_samples: n.
        delta: of the theorem; it is in the term that is left out only.
        eps: in (0, 1]; 1 / sqrt(n) if not given. It multiplies both terms.

    Raises:
        ValueError: for a number out of its range.

    Source: Zhang, Li, Ju 2024, theorem 2.1; constants from memory of the paper, see `assumptions`.
    """
    check_common(training_loss, largest_loss, num_samples, delta)
    check_number("trace", trace, 0.0)
    check_number("distance", distance, 0.0)
    eps = 1 / math.sqrt(num_samples) if eps is None else check_share("eps", eps, "(]")
    complexity = distance * math.sqrt(largest_loss * trace / num_samples)
    terms = {
        "C": largest_loss,
        "alpha": trace,
        "r": distance,
        "n": float(num_samples),
        "delta": delta,
        "eps": eps,
        "complexity": complexity,
        "left out: log(1/delta) n^(-3/4)": math.log(1 / delta) * num_samples**-0.75,
    }
    return Bound(
        value=(1 + eps) * (training_loss + complexity),
        training=training_loss,
        terms=terms,
        largest_loss=largest_loss,
        confidence=math.nan,
        theorem="Hessian-trace bound (Zhang, Li, Ju 2024, theorem 2.1), its O(n^(-3/4)) term left out",
        assumptions=(
            "the loss of a sample is in [0, C]",
            "the Hessian of the loss is Lipschitz in the weights",
            "alpha is at least the trace of every sample's Hessian at all weights within r; a maximum over finite data "
            "is an estimate from below",
            "r bounds the distance to a start that does not depend on the data",
            MEMORY,
        ),
        certificate=False,
    )


def layerwise_bound(
    training_loss: float,
    *,
    largest_loss: float,
    num_samples: int,
    traces: Sequence[float] | None = None,
    distances: Sequence[float] | None = None,
    norms: Sequence[float] | None = None,
    hessian_distances: Sequence[float] | None = None,
) -> Bound:
    """The group's earlier per-layer forms, as their code has them: scores to compare models with, not certificates.

        graph networks    C sqrt(sum_l alpha_l  sum_l min(|W_l - W0_l|^2, |W_l|^2) / n)       traces, distances, norms
        fine-tuning       sum_l sqrt(C h_l / n),   h_l = max (W_l - W0_l)^T H_l (W_l - W0_l)    hessian_distances

    Args:
        training_loss: the mean over the training data.
        largest_loss: C.
        num_samples: n.
        traces: alpha_l, the largest trace over batches of each layer's block.
        distances: |W_l - W0_l| for each layer.
        norms: |W_l| for each layer.
        hessian_distances: h_l for each layer; instead of the other three.

    Raises:
        ValueError: for a number out of its range, or if neither or both groups of arguments are given.

    Source: Ju, Li, Sharma, Zhang 2023 (graph networks); Ju, Li, Zhang 2022 (fine-tuning), up to log terms.
    """
    check_common(training_loss, largest_loss, num_samples, 0.5)
    by_traces = not (traces is None and distances is None and norms is None)
    if by_traces == (hessian_distances is not None):
        raise ValueError("give either traces, distances and norms, or hessian_distances.")
    terms = {"C": largest_loss, "n": float(num_samples)}
    if hessian_distances is not None:
        _check_layers("hessian_distances", hessian_distances)
        gap = math.fsum(math.sqrt(largest_loss * h / num_samples) for h in hessian_distances)
        terms |= {f"h_{i}": h for i, h in enumerate(hessian_distances)}
        theorem = "sum over layers of sqrt(C h / n) (Ju, Li, Zhang 2022), log terms left out"
    else:
        if traces is None or distances is None or norms is None or not len(traces) == len(distances) == len(norms):
            raise ValueError("traces, distances and norms must all be given, with one number per layer.")
        for name, values in (("traces", traces), ("distances", distances), ("norms", norms)):
            _check_layers(name, values)
        nearest = [min(d, m) ** 2 for d, m in zip(distances, norms, strict=True)]
        gap = largest_loss * math.sqrt(math.fsum(traces) * math.fsum(nearest) / num_samples)
        terms |= {"sum of traces": math.fsum(traces), "sum of squared distances": math.fsum(nearest)}
        theorem = "C sqrt(sum of traces x sum of squared distances / n) (Ju et al. 2023), constants left out"
    return Bound(
        value=training_loss + gap,
        training=training_loss,
        terms=terms,
        largest_loss=largest_loss,
        confidence=math.nan,
        theorem=theorem,
        assumptions=(
            "a formula from published code: log terms and constants are left out, so nothing is proved about it",
            "maxima over batches are estimates from below",
            MEMORY,
        ),
        certificate=False,
    )


def _check_layers(name: str, values: Sequence[float]) -> None:
    for i, value in enumerate(values):
        check_number(f"{name}[{i}]", value, 0.0)
