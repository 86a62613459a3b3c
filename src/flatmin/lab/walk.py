"""A quick look for the control's learning rate and weight decay: a walk on a grid, downhill in validation loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from flatmin.lab.display import Live
from flatmin.lab.folder import unfinished
from flatmin.lab.pool import run_all
from flatmin.lab.records import make_writable, read_run
from flatmin.lab.tasks import Settings
from flatmin.lab.train import RunSpec

Point = tuple[float, float]  # learning rate, weight decay
LR, DECAY, MOVES = math.sqrt(10.0), 10.0, 12  # from one point of the grid to the next, and how far the walk goes


def walk(
    start: Point, spec: Callable[[Settings, int], RunSpec], seeds: range, folder: Path, jobs: int
) -> dict[Point, float]:
    """Point -> validation loss, the mean over the seeds; infinite where a run diverged.

    From the start to the best of its four neighbours, and on, until none is better. Both act together (a decay acts
    times the learning rate), so that one alone, at a guess of the other, would lead astray.

    Args:
        start: where it begins.
        spec: (settings, seed) -> the run.
        seeds: of each point.
        folder: where the runs are kept, in `place(folder, point)`; finished ones are not done again.
        jobs: runs at the same time.
    """
    tried: dict[Point, float] = {}
    here = start
    for _ in range(MOVES):
        todo = [point for point in (here, *_neighbours(here)) if point not in tried]
        tried |= _train(todo, spec, seeds, folder, jobs)
        best = min(tried, key=lambda point: tried[point])
        if best == here:
            break
        here = best
    return tried


def place(folder: Path, point: Point) -> Path:
    """Where the runs of a point are kept."""
    return folder / f"lr{point[0]:g}-decay{point[1]:g}"


def rounded(value: float) -> float:
    """To two digits."""
    return float(f"{value:.2g}")


def _neighbours(point: Point) -> list[Point]:
    lr, decay = point
    rates = [(rounded(lr * factor), decay) for factor in (LR, 1 / LR)]
    return rates + [(lr, rounded(decay * factor)) for factor in (DECAY, 1 / DECAY) if decay]


def _train(
    points: list[Point], spec: Callable[[Settings, int], RunSpec], seeds: range, folder: Path, jobs: int
) -> dict[Point, float]:
    runs = {point: [spec(Settings(lr=point[0], weight_decay=point[1]), seed) for seed in seeds] for point in points}
    listed = [(run, place(folder, point)) for point, of_point in runs.items() for run in of_point]
    for _, where in listed:
        make_writable(where)
    todo = unfinished(listed)
    with Live(len(listed), len(listed) - len(todo), f"{folder} lr, weight decay") as live:
        run_all(todo, jobs, live)
    return {point: _loss(place(folder, point), of_point) for point, of_point in runs.items()}


def _loss(where: Path, runs: list[RunSpec]) -> float:
    results = [read_run(where / f"{run.name}.jsonl").result for run in runs]
    return sum(result.get("validation_loss", math.inf) for result in results) / len(results)
