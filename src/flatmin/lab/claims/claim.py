"""A claim, and the rule by which records support it or do not.

    claim           on each of its tasks one method is better than another, in one column
    test            both have run on the same seeds at equal gradient budget, with settings chosen alike: t-test on the
                    differences, seed by seed (where a run diverged, sign test over seeds: it has lost); p-values
                    corrected by Holm over the tasks of the claim

    supported       better (p < 0.05) on at least half of its tasks, and worse on none
    not supported   worse on at least half of them, and better on none
    inconclusive    anything else

The rule was fixed before anything was run, but for runs that diverge, when none had.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flatmin.lab.summary import COLUMNS, LEVEL, Column, Runs, by_seed, describe, holm, paired_p_value

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
        "verdict", and "tasks": task -> the column, the seeds that both finished, both methods' values there, of their
        difference the mean and the half width of its 95% interval, how many runs of each diverged, p (Holm), and the
        mark: "better", "worse" or `None`.
    """
    found = {task: _compared(claim, comparisons[task]) for task in claim.tasks}
    for entry, p in zip(found.values(), holm([entry["p"] for entry in found.values()]), strict=True):
        entry["p"] = p
        if p >= LEVEL:
            entry["mark"] = None
    return {"verdict": verdict([entry["mark"] for entry in found.values()]), "tasks": found}


def _compared(claim: Claim, runs: Runs) -> dict[str, Any]:
    one, other = runs[claim.better], runs[claim.than]
    column = _column(claim.column, [*one, *other])
    a, b = by_seed(one, column), by_seed(other, column)
    seeds = sorted(a.keys() & b.keys())
    difference = describe([a[seed] - b[seed] for seed in seeds])
    diverged = [len(one) - len(a), len(other) - len(b)]
    if any(diverged):
        p, ahead = _sign_test(a, b, column.better)
    else:
        p, ahead = paired_p_value(a, b), (difference["mean"] or 0.0) * column.better > 0
    return {
        "column": column.key,
        "seeds": seeds,
        "better": [a[seed] for seed in seeds],
        "than": [b[seed] for seed in seeds],
        "difference": difference["mean"],
        "half_width": difference["half_width"],
        "diverged": diverged,
        "p": math.nan if p is None else p,
        "mark": "better" if ahead else "worse",
    }


def _sign_test(a: Mapping[int, float], b: Mapping[int, float], better: int) -> tuple[float, bool]:
    """Two-sided p-value, and whether `a` wins more often: a run that diverged loses against one that did not."""
    lost = -math.inf
    pairs = [(better * a[s] if s in a else lost, better * b[s] if s in b else lost) for s in a.keys() | b.keys()]
    wins, losses = sum(x > y for x, y in pairs), sum(x < y for x, y in pairs)
    few = min(wins, losses)
    tail = sum(math.comb(wins + losses, k) for k in range(few + 1)) / 2 ** (wins + losses)
    return min(1.0, 2 * tail), wins > losses


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
