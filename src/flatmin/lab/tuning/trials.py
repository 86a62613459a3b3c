"""Trials of settings on validation data: the same setting has the same folder, and nothing is done twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flatmin.lab.display import Live
from flatmin.lab.folder import unfinished
from flatmin.lab.pool import run_all
from flatmin.lab.records import make_writable, read_run
from flatmin.lab.tasks import Settings
from flatmin.lab.train import RunSpec


def label(settings: Settings) -> str:
    """The name of a trial's folder: the same settings have the same, on whatever grid."""
    radius = "" if settings.radius is None else f"-radius{settings.radius:g}"
    return f"lr{settings.lr:g}-decay{settings.weight_decay:g}{radius}"


def train_trials(
    candidates: Sequence[Settings],
    spec: Callable[[Settings, int], RunSpec],
    seeds: range,
    place: Callable[[Settings], Path],
    *,
    jobs: int,
    title: str,
) -> list[list[dict[str, Any]]]:
    """Of each candidate the results of its seeds' runs; finished runs are not done again.

    Args:
        candidates: the settings.
        spec: (settings, seed) -> the run.
        seeds: of every candidate.
        place: settings -> the folder of their runs.
        jobs: runs at the same time.
        title: of the line that shows the progress.
    """
    trials = [[(spec(settings, seed), place(settings)) for seed in seeds] for settings in candidates]
    runs = [run for trial in trials for run in trial]
    for _, folder in runs:
        make_writable(folder)
    todo = unfinished(runs)
    with Live(len(runs), len(runs) - len(todo), title) as live:
        run_all(todo, jobs, live)
    return [[read_run(folder / f"{run.name}.jsonl").result for run, folder in trial] for trial in trials]


def validation_loss(results: Sequence[dict[str, Any]]) -> float:
    """The mean over runs; one that diverged counts as infinite."""
    return float(np.mean([result.get("validation_loss", math.inf) for result in results]))
