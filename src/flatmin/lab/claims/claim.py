"""A claim, and the rule by which records support it or do not.

    claim           on each of its tasks one method is better than another, in one column
    test            both have run on the same seeds at equal gradient budget, with settings chosen alike: t-test on the
                    differences, seed by seed; p-values corrected by Holm over the tasks of the claim

    supported       better (p < 0.05) on at least half of its tasks, and worse on none
    not supported   worse on at least half of them, and better on none
    inconclusive    anything else

The rule was fixed before anything was run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flatmin.lab.summary import COLUMNS, Column, Runs, by_seed, tested

SCORE = "score"  # the test accuracy, or the test loss where targets are no labels


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement of a paper.

    Attributes:
        name: as the command line spells it.
        paper: whose it is.
        statement: what the paper says, in our words.
        here: what is different here, if it is not only the size of networks and data.
        better: the method that is claimed to be better (flatmin.lab.parts).
        than: the other one.
        column: in which quantity (flatmin.lab.summary.COLUMNS); "score" is the test accuracy, or the test loss.
        tasks: where it is tested.
    """

    name: str
    paper: str
    statement: str
    here: str = ""
    better: str
    than: str
    column: str
    tasks: tuple[str, ...]


def judge(claim: Claim, comparisons: Mapping[str, Runs]) -> dict[str, Any]:
    """The verdict, and for each task what it is made of, as plain data.

    Args:
        claim: the claim.
        comparisons: task -> method -> runs, with those of the claim among them.

    Returns:
        "verdict", and "tasks": task -> the column, the common seeds, both methods' values, and of their difference the
        mean, the half width of its 95% interval, p (Holm) and mark ("better", "worse", or none).
    """
    pairs = {}
    for task in claim.tasks:
        one, other = comparisons[task][claim.better], comparisons[task][claim.than]
        pairs[task] = (one, other, _column(claim.column, [*one, *other]))
    found = tested(pairs)
    for task, (one, other, column) in pairs.items():
        a, b = by_seed(one, column), by_seed(other, column)
        seeds = sorted(a.keys() & b.keys())
        values = {"better": [a[seed] for seed in seeds], "than": [b[seed] for seed in seeds]}
        found[task] = {"column": column.key, "seeds": seeds, **values, **found[task]}
    return {"verdict": verdict([entry["mark"] for entry in found.values()]), "tasks": found}


def verdict(marks: Sequence[str | None]) -> str:
    """By the rule above, from the marks on the tasks."""
    better, worse = marks.count("better"), marks.count("worse")
    if 2 * better >= len(marks) and not worse:
        return "supported"
    if 2 * worse >= len(marks) and not better:
        return "not supported"
    return "inconclusive"


def _column(key: str, records: Sequence[Any]) -> Column:
    columns = {column.key: column for column in COLUMNS}
    if key != SCORE:
        return columns[key]
    accuracy = columns["test_accuracy"]
    return accuracy if all(accuracy.is_in(r) for r in records if r.finished) else columns["test_loss"]
