"""What a bound is: a number with everything that went into it, and a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flatmin.checks import check_number, check_positive, check_share, check_whole


@dataclass(frozen=True, kw_only=True)
class Bound:
    """An upper bound of the loss on new data, or what stands in for one.

    Attributes:
        value: the bound.
        training: the training loss in it.
        terms: every quantity that went in or came out on the way, by name.
        largest_loss: the loss cannot be larger: a bound that is not below this says nothing.
        confidence: 1 - delta; nan if the formula has no probability statement.
        theorem: which.
        assumptions: what must be true for it to hold.
        certificate: whether the formula is a proved bound once its assumptions hold, with nothing left out.
        about: whose loss.
    """

    value: float
    training: float
    terms: Mapping[str, float]
    largest_loss: float
    confidence: float
    theorem: str
    assumptions: tuple[str, ...]
    certificate: bool
    about: str = "these weights"

    @property
    def vacuous(self) -> bool:
        """Whether the bound says no more than that the loss is bounded."""
        return not self.value < self.largest_loss

    @property
    def gap(self) -> float:
        """What the bound adds to the training loss."""
        return self.value - self.training

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts; `None` for a number that is not finite."""
        entries = {**asdict(self), "assumptions": list(self.assumptions), "vacuous": self.vacuous}
        entries["terms"] = {name: _plain(value) for name, value in self.terms.items()}
        return {name: _plain(value) if isinstance(value, float) else value for name, value in entries.items()}

    def __str__(self) -> str:
        has_chance = math.isfinite(self.confidence)
        chance = f"With probability {self.confidence:.4g} " if has_chance else "As a score and not a bound, "
        if self.vacuous:
            verdict = f"Vacuous: no loss can be above {self.largest_loss:.4g} anyway, so this says nothing."
        else:
            verdict = f"Not vacuous: below the largest possible loss {self.largest_loss:.4g}."
        return (
            f"{chance}the loss of {self.about} on new data is at most {self.value:.4g}: {self.training:.4g} on the "
            f"training data, and {self.gap:.4g} for what is not known. {verdict} {self.theorem}."
        )


def check_common(training_loss: float, largest_loss: float, num_samples: int, delta: float) -> None:
    """Refuses numbers that no bound can use."""
    check_positive("largest_loss, above which no loss can be,", largest_loss)
    if check_number("the training loss", training_loss) < 0 or training_loss > largest_loss:
        raise ValueError(f"the training loss must be in [0, {largest_loss}] (largest_loss), got {training_loss}.")
    check_whole("num_samples", num_samples, 1)
    check_delta(delta)


def check_delta(delta: float) -> None:
    """Refuses what is no probability, and the two that promise nothing or cannot be kept."""
    check_share("delta", delta, "()")


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
