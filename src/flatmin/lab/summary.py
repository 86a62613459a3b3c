"""What a comparison says: means with 95% intervals over seeds, and paired tests for what is better.

interval   Student's t over the seeds: mean +- t(0.975, n - 1) s / sqrt(n)
paired     two methods share the training samples, initial weights and batch order of a seed, so they are compared
           by the t-test on the differences, seed by seed
versus     the test of each method against the control (the first method), Holm-corrected within a column, its mark
           (better or worse where p < 0.05), and the 95% interval of the differences (each for itself)
best       a method is best in a column only if it is marked better than the control and beats *every* other method
           on the seeds that both finished, p < 0.05 after Holm's correction for these comparisons, and none of its
           runs diverged
confounded where a higher training loss alone lowers a quantity (the gap, the trace over the loss), the method with the
           lower value is not better if its training loss is higher, significantly or by half: the mark says so instead

With fewer than three common seeds nothing is tested, nor if the difference is the same on every seed (there is then no
spread to judge it by); p is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit  # scipy.stats takes a second to import

from flatmin.lab.records import RunRecord

LEVEL = 0.05
TENTH = 0.1  # of the usual fall of the training loss: a run with less has not trained
BY_HALF = 1.5  # training losses so far apart are not the same, however few the seeds and however wild


@dataclass(frozen=True)
class Column:
    """One measured quantity: its title, where it is in a result, and which direction is better.

    With `over` it is divided by another one. Only what `needs` names must be in the results. What `contains_loss` is
    lower at a higher training loss by itself.
    """

    key: str
    title: str
    better: int  # +1 larger, -1 smaller, 0 neither
    path: tuple[str, ...]
    percent: bool = False
    over: tuple[str, ...] = ()
    needs: str = ""
    contains_loss: bool = False

    def of(self, record: RunRecord) -> float:
        """Its value in one run."""
        value = _entry(record.result, self.path)
        if self.over:
            divisor = _entry(record.result, self.over)
            return value / divisor if divisor else math.nan
        return 100 * value if self.percent else value

    def is_in(self, record: RunRecord) -> bool:
        """Whether the run has it."""
        return (self.needs or self.path[0]) in record.result


def _entry(result: Any, path: Sequence[str]) -> float:
    for key in path:
        result = result[key]
    return float(result)


TRACE = ("flatness", "trace", "value")
TRAINING_LOSS = Column("train_loss", "training loss", 0, ("train_loss",))
COLUMNS = (
    Column("test_accuracy", "test accuracy, %", +1, ("test_accuracy",), percent=True),
    Column("test_loss", "test loss", -1, ("test_loss",)),
    Column("gap", "generalisation gap", -1, ("gap",), contains_loss=True),
    TRAINING_LOSS,
    Column("trace", "Hessian trace", -1, TRACE),
    # Cross-entropy takes its curvature with it as it goes to zero: what is left of a low trace beside a low loss.
    Column(
        "trace_per_loss", "trace / loss", -1, TRACE, over=("train_loss",), needs="test_accuracy", contains_loss=True
    ),
    Column("lambda_max", "lambda_max", -1, ("flatness", "top_eigenvalue", "value")),
    Column("adaptive_sharpness", "adaptive sharpness", -1, ("adaptive_sharpness",)),  # of runs since there is one
    Column("seconds", "seconds", 0, ("seconds",)),
    Column("gradients", "gradients", 0, ("gradients",)),
    Column("steps", "steps", 0, ("steps",)),
)

Records = Sequence[RunRecord]
Runs = Mapping[str, Records]  # method -> its runs


def shown(summary: Mapping[str, Any]) -> list[Column]:
    """The columns that a summary has: all, or all but the accuracy, where targets are no labels."""
    (entry, *_) = summary["methods"].values()
    return [column for column in COLUMNS if column.key in entry["columns"]]


def summarize(runs: Runs) -> dict[str, Any]:
    """The summary as plain data: per method and column mean, interval and values; best and versus per column."""
    columns = [c for c in COLUMNS if all(c.is_in(r) for records in runs.values() for r in records if r.finished)]
    untrained = _untrained(runs)
    methods = {
        name: {
            "num_runs": len(records),
            "num_diverged": sum(not r.finished for r in records),
            "messages": [r.result["message"] for r in records if not r.finished],
            "untrained": untrained[name],
            "columns": {c.key: describe([c.of(r) for r in records if r.finished]) for c in columns},
            "trace_stderr": _rms([r.result["flatness"]["trace"]["stderr"] for r in records if r.finished]),
        }
        for name, records in runs.items()
    }
    judged = [c for c in columns if c.better]
    versus = {c.key: _versus(runs, c) for c in judged}
    return {
        "methods": methods,
        "best": {c.key: _best(runs, c, versus[c.key]) for c in judged},
        "versus": versus,
    }


def _untrained(runs: Runs) -> dict[str, list[str]]:
    """Of each method the runs whose training loss fell by less than a tenth of the median over all runs, in words.

    Runs of older versions do not say where it began.
    """
    falls = {
        (name, r.header["spec"]["seed"]): (r.result["initial_loss"], r.result["train_loss"])
        for name, records in runs.items()
        for r in records
        if r.finished and r.result.get("initial_loss") is not None
    }
    usual = float(np.median([first - last for first, last in falls.values()])) if falls else 0.0
    found: dict[str, list[str]] = {name: [] for name in runs}
    for (name, seed), (first, last) in falls.items():
        if usual > 0 and first - last < TENTH * usual:
            found[name].append(f"seed {seed} (training loss from {first:.4g} to {last:.4g})")
    return found


def mixed_versions(runs: Runs) -> str | None:
    """One sentence with the versions that differ between runs (numbers may then differ too); `None` if none does."""
    headers = [r.header["versions"] for records in runs.values() for r in records]
    names = dict.fromkeys(name for h in headers for name in h)
    found = {name: sorted({h.get(name, "unknown") for h in headers}) for name in names}
    differing = [f"{name} {', '.join(versions)}" for name, versions in found.items() if len(versions) > 1]
    return f"The runs were made with different versions: {'; '.join(differing)}." if differing else None


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p-values (controls the family-wise error); one that is nan counts as 1."""
    p_values = [1.0 if math.isnan(p) else p for p in p_values]
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, running)
    return adjusted.tolist()


def paired_p_value(a: Mapping[int, float], b: Mapping[int, float]) -> float | None:
    """Two-sided p-value of the t-test on the differences a - b over common seeds.

    `None` with fewer than three seeds, or if the differences are all the same (up to rounding) but not zero.
    """
    seeds = sorted(a.keys() & b.keys())
    differences = np.array([a[s] - b[s] for s in seeds])
    if len(seeds) < 3:
        return None
    if not np.any(differences):
        return 1.0
    if np.ptp(differences) <= 1e-12 * max(abs(v[s]) for v in (a, b) for s in seeds):
        return None
    t = np.mean(differences) / (np.std(differences, ddof=1) / math.sqrt(len(seeds)))
    return float(2 * stdtr(len(seeds) - 1, -abs(t)))


def describe(values: Sequence[float]) -> dict[str, Any]:
    """Mean, half width of its 95% interval (`None` where there is none) and the values."""
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    half = float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return {"mean": _number(mean), "half_width": _number(half), "values": [float(v) for v in values]}


def by_seed(records: Records, column: Column) -> dict[int, float]:
    """The values of the finished runs."""
    return {r.header["spec"]["seed"]: column.of(r) for r in records if r.finished}


def _best(runs: Runs, column: Column, versus: Mapping[str, Mapping[str, Any]]) -> str | None:
    finished = {name: records for name, records in runs.items() if any(r.finished for r in records)}
    if len(finished) < 2:
        return None
    # The control has no mark: for it, to beat every other is the test that marks them worse.
    marked = [name for name in finished if name not in versus or versus[name]["mark"] == "better"]
    whole = [name for name in marked if all(r.finished for r in runs[name])]
    return next((name for name in whole if _beats_all(finished, name, column)), None)


def _beats_all(runs: Runs, name: str, column: Column) -> bool:
    """Whether it is better than every other on common seeds, significantly. At most one method is."""
    pairs = {other: (runs[name], runs[other]) for other in runs if other != name}
    return all(entry["mark"] == "better" for entry in _tested(pairs, column).values())


def _versus(runs: Runs, column: Column) -> dict[str, dict[str, Any]]:
    (control, *others) = runs
    return _tested({name: (runs[name], runs[control]) for name in others}, column)


def _tested(pairs: Mapping[str, tuple[Records, Records]], column: Column) -> dict[str, dict[str, Any]]:
    """One family of paired tests, Holm-corrected: of each pair the first less the second, by seeds, and its mark."""
    found = {}
    for name, (one, other) in pairs.items():
        a, b = by_seed(one, column), by_seed(other, column)
        paired = describe([a[s] - b[s] for s in sorted(a.keys() & b.keys())])
        found[name] = {"difference": paired["mean"], "half_width": paired["half_width"], "p": paired_p_value(a, b)}
    tested = [name for name in pairs if found[name]["p"] is not None]
    for name, p in zip(tested, holm([found[name]["p"] for name in tested]), strict=True):
        found[name]["p"] = p
    for name, (one, other) in pairs.items():
        found[name]["mark"] = _mark(found[name], column, one, other)
    return found


def _mark(tested: Mapping[str, Any], column: Column, one: Records, other: Records) -> str | None:
    """Whether `one` is better or worse, or that is confounded; `None` where the seeds do not tell them apart."""
    if tested["p"] is None or tested["p"] >= LEVEL:
        return None
    is_better = tested["difference"] * column.better > 0
    if column.contains_loss and (_fits_worse(one, other) if is_better else _fits_worse(other, one)):
        return "confounded"
    return "better" if is_better else "worse"


def _fits_worse(one: Records, other: Records) -> bool:
    """Whether its training loss is higher: by half on average, or p < 0.05.

    Uncorrected, since a correction would let more marks stand.
    """
    a, b = by_seed(one, TRAINING_LOSS), by_seed(other, TRAINING_LOSS)
    if sum(a[s] - b[s] for s in a.keys() & b.keys()) <= 0:
        return False
    p = paired_p_value(a, b)  # None: higher by the same on every seed
    return p is None or p < LEVEL or _ratio(a, b) >= BY_HALF


def _ratio(a: Mapping[int, float], b: Mapping[int, float]) -> float:
    """The geometric mean of a / b over common seeds; 0 where a number has no logarithm."""
    pairs = [(a[s], b[s]) for s in a.keys() & b.keys()]
    return math.exp(np.mean([math.log(x / y) for x, y in pairs])) if min(map(min, pairs)) > 0 else 0.0


def _rms(values: Sequence[float]) -> float | None:
    return float(np.sqrt(np.mean(np.square(values)))) if values else None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
