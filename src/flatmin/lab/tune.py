"""Choosing settings on validation data: the same number of trials for every method, the test set untouched.

The rule, fixed beforehand: of all settings on the grid, the one with the lowest mean validation loss over the tuning
seeds (a diverged run counts as infinite). Tuning seeds start at 1000, so that no run of a comparison is among them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flatmin.lab.display import Live
from flatmin.lab.folder import done, locked
from flatmin.lab.parts import split_name
from flatmin.lab.pool import run_all
from flatmin.lab.records import environment, make_writable, read_run, write_json
from flatmin.lab.tasks import Settings, get_task
from flatmin.lab.train import RunSpec

FIRST_SEED = 1000


@dataclass(kw_only=True)
class Tune:
    """Choose learning rate and radius for each method by validation loss, on an equal number of trials each.

    The control is tuned over learning rate x weight decay, the other methods over learning rate x radius at the
    control's best weight decay. Interrupted, it continues where it stopped. What it finds is printed and written to
    tuning.json; `compare` takes its settings from the task's definition, where the winners are copied by hand.
    """

    task: str = "digits"
    """Data, model and loss, by name."""
    methods: tuple[str, ...] = ("base", "sam", "nso-one-point", "nso")
    """Methods, by name; the first is the control."""
    lr: tuple[float, ...] = (0.03, 0.1, 0.2, 0.4)
    """Learning rates."""
    weight_decay: tuple[float, ...] = (0.0, 1e-4, 1e-3, 1e-2)
    """Weight decays, for the control."""
    rho: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    """Radii, for methods with a rho."""
    sigma: tuple[float, ...] = (0.01, 0.02, 0.04, 0.08)
    """Radii, for methods with a sigma."""
    num_seeds: int = 5
    """Seeds of every trial."""
    out: Path = Path("runs/tuning")
    """Where the runs and tuning.json are written."""
    jobs: int = 2
    """Runs at the same time."""
    best: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)

    def run(self) -> None:
        """Tunes method by method, prints the winners, writes tuning.json. Finished runs are not done again.

        Raises:
            ValueError: for an unknown task or method, a control with a radius, unequal numbers of trials, or another
                process at work in the folder; nothing is trained then.
        """
        self._check()
        make_writable(self.out)
        with locked(self.out):
            self._run()

    def _check(self) -> None:
        get_task(self.task)
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"--methods names at least one method, and none twice, got {' '.join(self.methods)!r}.")
        radii = {name: split_name(name)[0].radius_name for name in self.methods}
        control = self.methods[0]
        if radii[control] is not None:
            raise ValueError(
                f"the first of --methods is the control and has no radius, got {control}: begin with base."
            )
        grids = {name: ("weight_decay" if r is None else "rho" if r == "rho" else "sigma") for name, r in radii.items()}
        counts = {name: len(self.lr) * len(getattr(self, grid)) for name, grid in grids.items()}
        if min(counts.values()) < 1 or len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {n} (--lr x --{grids[name].replace('_', '-')})" for name, n in counts.items())
            raise ValueError(f"every method is to have the same number of trials, and at least one; here: {listed}.")

    def _run(self) -> None:
        trials: dict[str, list[dict[str, Any]]] = {}
        for method in self.methods:
            trials[method] = self._tune(method)
            self.best[method] = min(trials[method], key=lambda t: t["validation_loss"])
            print(f"{method}: {self.best[method]}")
        record = {"task": self.task, "num_seeds": self.num_seeds, **environment(), "best": self.best, "trials": trials}
        write_json(self.out / "tuning.json", record)

    def _settings(self, method: str) -> list[Settings]:
        rule, parts = split_name(method)
        radius = rule.radius_name
        if radius is None:
            return [
                Settings(lr=lr, weight_decay=wd, parts=parts)
                for lr, wd in itertools.product(self.lr, self.weight_decay)
            ]
        decay = self.best[self.methods[0]]["weight_decay"]
        radii = self.rho if radius == "rho" else self.sigma
        grid = itertools.product(self.lr, radii)
        return [Settings(lr=lr, weight_decay=decay, radius=r, parts=parts) for lr, r in grid]

    def _tune(self, method: str) -> list[dict[str, Any]]:
        steps = max(1, int(get_task(self.task).num_gradients // split_name(method)[0].gradients))
        candidates = self._settings(method)
        trials = [
            [
                (
                    RunSpec(task=self.task, method=method, seed=FIRST_SEED + i, num_steps=steps, settings=settings),
                    self.out / f"{method}-{number}",
                )
                for i in range(self.num_seeds)
            ]
            for number, settings in enumerate(candidates)
        ]
        runs = [run for trial in trials for run in trial]
        for _, folder in runs:
            make_writable(folder)
        todo = [(spec, folder) for spec, folder in runs if not done(spec, folder)]
        with Live(len(runs), len(runs) - len(todo), f"{self.out} {method}") as live:
            run_all(todo, self.jobs, live)
        return [_outcome(settings, trial) for settings, trial in zip(candidates, trials, strict=True)]


def _outcome(settings: Settings, trial: list[tuple[RunSpec, Path]]) -> dict[str, Any]:
    results = [read_run(folder / f"{spec.name}.jsonl").result for spec, folder in trial]
    return {
        **dataclasses.asdict(settings),
        "validation_loss": float(np.mean([r.get("validation_loss", math.inf) for r in results])),
        "validation_accuracy": float(np.mean([r.get("validation_accuracy", 0.0) for r in results])),
    }
