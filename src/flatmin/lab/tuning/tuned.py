"""What `flatmin tune` has found, as `compare --tuned` takes it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flatmin.lab.budget import Budget
from flatmin.lab.fingerprint import changed, fingerprint
from flatmin.lab.tasks import Settings, Task
from flatmin.lab.tasks.task import by_validation

NAME = "tuning.json"
FIRST_SEED = 1000  # of tuning, so that no run of a comparison is among its trials


class Tuned(NamedTuple):
    """A task, and the budget at which its settings were chosen."""

    task: Task
    budget: Budget


def with_own_settings(task: Task) -> Tuned:
    """The task as it is: its settings are for its gradients."""
    return Tuned(task, Budget(task.num_gradients))


def read_tuning(path: Path, task: Task) -> Tuned:
    """The task with the winners of `flatmin tune` as its settings, and the budget that they were chosen at.

    Args:
        path: tuning.json, or the folder that it is in.
        task: which must have the name of the tuned one.

    Raises:
        ValueError: for a file that is not there, is no tuning.json, or is another task's.
    """
    path = path.expanduser()
    file = path / NAME if path.is_dir() else path
    try:
        tuning = json.loads(file.read_text(encoding="utf-8"))
        settings = {method: _settings_of(best) for method, best in tuning["best"].items()}
        name, seeds = tuning["task"], tuning["num_seeds"]
        budget = Budget(tuning["num_gradients"], tuning.get("budget", "gradients"))  # not said by earlier versions
        counts = {len(trials) for trials in tuning["trials"].values()}
    except OSError as error:
        raise ValueError(f"--tuned {path}: {error.strerror or 'it cannot be read'}. flatmin tune writes it.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a tuning.json that flatmin tune wrote, or it is damaged.") from error
    if name != task.name:
        raise ValueError(f"{file} is of the task {name}, not {task.name}.")
    before = tuning.get("fingerprint")  # none in those of earlier versions
    if before and (parts := changed(before, fingerprint(task, task.splits(FIRST_SEED)))):
        raise ValueError(f"{file} is of the task {name} with another {' and '.join(parts)}. Tune this one.")
    how = by_validation(seeds, *sorted(counts))
    if edges := [
        f"{method} ({', '.join(at)})" for method, trials in tuning["trials"].items() if (at := at_edge(trials))
    ]:
        how += f" The best is at the edge of the grid for {', '.join(edges)}."
    return Tuned(dataclasses.replace(task, settings=settings, tuning=how), budget)


def at_edge(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """In what the best trial is the smallest or the largest that was tried, and not 0."""
    best = min(trials, key=lambda trial: math.inf if trial["validation_loss"] is None else trial["validation_loss"])
    tried = {key: {trial[key] for trial in trials} for key in ("lr", "weight_decay", "radius")}
    ends = {key: (min(values), max(values)) for key, values in tried.items() if len(values) > 1}
    return [key for key, end in ends.items() if best[key] in end and best[key]]


def _settings_of(best: Mapping[str, Any]) -> Settings:
    return Settings(**{field.name: best[field.name] for field in dataclasses.fields(Settings)})


def methods_in(path: Path) -> set[str]:
    """Of an earlier tuning.json, if there is one."""
    try:
        return set(json.loads(path.read_text(encoding="utf-8"))["best"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()
