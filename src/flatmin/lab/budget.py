"""What is equal between the runs of several methods: mini-batch gradients, or steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flatmin.lab.parts import split_name

Kind = Literal["gradients", "steps"]


@dataclass(frozen=True)
class Budget:
    """So many gradients for every run, or so many steps.

    Attributes:
        amount: how many.
        kind: of what.
    """

    amount: int
    kind: Kind = "gradients"

    def num_steps(self, method: str) -> int:
        """Steps of a run of `method`, which is a rule or `rule+part`.

        Raises:
            ValueError: for an unknown method, or gradients that do not pay for one step of it.
        """
        rule = split_name(method)[0]
        return self.amount if self.kind == "steps" else rule.num_steps(self.amount)

    def num_gradients(self, method: str) -> float:
        """Gradients that a run of `method` may spend."""
        return self.amount * split_name(method)[0].gradients if self.kind == "steps" else self.amount

    def __str__(self) -> str:
        return f"{self.amount} {self.kind}"
