"""Choosing settings on validation data: the same number of trials for every method, the test set untouched.

The rule, fixed beforehand: of all settings that were tried, the one with the lowest mean validation loss over the
tuning seeds (a diverged run counts as infinite). These start at 1000, so that no run of a comparison is among them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import shlex
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from flatmin.files import write_json
from flatmin.lab.budget import Budget, Kind
from flatmin.lab.fingerprint import fingerprint
from flatmin.lab.folder import check_counts, locked
from flatmin.lab.parts import split_name
from flatmin.lab.pool import IF_STOPPED, check_importing
from flatmin.lab.records import environment, make_writable
from flatmin.lab.script import forget
from flatmin.lab.tasks import Settings, get_task
from flatmin.lab.tasks.check import check_task
from flatmin.lab.train import RunSpec
from flatmin.lab.tuning.further import further
from flatmin.lab.tuning.trials import label, train_trials, validation_loss
from flatmin.lab.tuning.tuned import FIRST_SEED, NAME, at_edge, methods_in


@dataclass(kw_only=True)
class Tune:
    """Choose learning rate and radius for each method by validation loss, on an equal number of trials each.

    The control is tuned over learning rate x weight decay, the other methods over learning rate x radius at the
    control's best weight decay (at none for bSAM, which has a prior in its place); then, at the best of that, the
    control over learning rates in between, and the others over the other weight decays. Interrupted, or with a larger
    grid, it continues where it stopped. What it finds is written to tuning.json, from which `compare --tuned` takes it,
    and printed as it stands in a task's `settings`.
    """

    task: str = "digits"
    """Data, model and loss: a name (see: flatmin tasks), or a Python file that makes one Task."""
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
    radii: tuple[str, ...] = ()
    """Radii of single methods, in place of --rho and --sigma: --radii asam=0.25,0.5,1,2 nso=0.01,0.02,0.04,0.08."""
    num_seeds: int = 5
    """Seeds of every trial."""
    budget: Kind = "gradients"
    """What is equal between methods: mini-batch gradients (a two-gradient method takes half the steps), or steps."""
    num_gradients: int | None = None
    """Of a trial, or steps with --budget steps. Default: the task's. That is what the winners are for."""
    out: Path | None = None
    """Where the runs and tuning.json are written. Default: runs/tuning-<task>."""
    jobs: int = 2
    """Runs at the same time."""
    best: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)
    if_stopped: ClassVar[str] = IF_STOPPED

    def run(self) -> None:
        """Tunes method by method, prints the winners, writes tuning.json. Finished runs are not done again.

        Raises:
            ValueError: for an unknown task or method, a control with a radius, unequal numbers of trials, a setting out
                of range or twice, or another process at work in the folder; nothing is trained then.
        """
        forget()
        self.check()
        check_importing()
        check_task(get_task(self.task), FIRST_SEED)
        make_writable(self.folder)
        with locked(self.folder):
            self._run()

    @property
    def folder(self) -> Path:
        """Where the runs are kept."""
        return Path("runs") / f"tuning-{get_task(self.task).name}" if self.out is None else self.out

    def check(self) -> None:
        """Refuses what `run` would, as far as it can be seen without looking at the task's data."""
        get_task(self.task)
        check_counts(num_seeds=self.num_seeds, jobs=self.jobs, num_gradients=self.num_gradients)
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"--methods names at least one method, and none twice, got {' '.join(self.methods)!r}.")
        radii = {name: split_name(name)[0].radius_name for name in self.methods}
        for name in self.methods:
            self.equal.num_steps(name)
        control = self.methods[0]
        if radii[control] is not None:
            raise ValueError(
                f"the first of --methods is the control and has no radius, got {control}: begin with base."
            )
        own = self._own_radii()
        if others := [name for name in own if radii.get(name) is None]:
            raise ValueError(f"--radii names {others[0]}, which is none of the --methods that have a radius.")
        grids = {name: "weight-decay" if r is None else "radii" if name in own else r for name, r in radii.items()}
        counts = {name: len(self._settings(name, decay=0.0)) for name in self.methods}
        if min(counts.values()) < 1 or len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {n} (--lr x --{grids[name]})" for name, n in counts.items())
            raise ValueError(f"every method is to have the same number of trials, and at least one; here: {listed}.")
        for name in self.methods:
            labels = [label(settings) for settings in self._settings(name, decay=0.0)]
            if len(set(labels)) < len(labels):
                raise ValueError(f"the grid of {name} has a setting twice: {', '.join(labels)}.")

    def _run(self) -> None:
        trials: dict[str, list[dict[str, Any]]] = {}
        for method in self.methods:
            trials[method] = self._tune(method)
            self.best[method] = _best(method, trials[method])
            print(_as_settings(method, self.best[method]))
            for remark in self._at_the_edge(method, trials[method]):
                print(remark)
        task = get_task(self.task)
        record = {
            "task": task.name,
            "fingerprint": fingerprint(task, task.splits(FIRST_SEED)),
            "num_seeds": self.num_seeds,
            "budget": self.equal.kind,
            "num_gradients": self.equal.amount,
            **environment(),
        }
        path = self.folder / NAME
        dropped = methods_in(path) - trials.keys()
        write_json(path, {**record, "best": self.best, "trials": trials})
        command = ["flatmin", "compare", "--task", self.task, "--methods", *self.methods, "--tuned", str(self.folder)]
        print(f"all trials: {path}. To compare with these settings:\n{shlex.join(command)}")
        if dropped:
            print(
                f"It had winners for {', '.join(sorted(dropped))} before, which were not tuned now: name all methods "
                "to have them all; finished runs are not done again."
            )

    @property
    def equal(self) -> Budget:
        """What every method may spend in a trial."""
        return Budget(self.num_gradients or get_task(self.task).num_gradients, self.budget)

    def _at_the_edge(self, method: str, trials: list[dict[str, Any]]) -> list[str]:
        """What to add to the grid: the best may lie beyond it."""
        radius = f"radii {method}" if method in self._own_radii() else split_name(method)[0].radius_name
        options = {"lr": "lr", "weight_decay": "weight-decay", "radius": radius}
        remarks = []
        for key in at_edge(trials):
            best, tried = self.best[method][key], {trial[key] for trial in trials}
            end = "smallest" if best == min(tried) else "largest"
            remarks.append(f"    {best:g} is the {end} --{options[key]} that was tried: try one beyond it.")
        return remarks

    def _settings(self, method: str, decay: float) -> list[Settings]:
        """The grid of a method; `decay` is the weight decay of those that have no grid of their own for it."""
        rule, parts = split_name(method)
        radius = rule.radius_name
        if radius is None:
            return [
                Settings(lr=lr, weight_decay=wd, parts=parts)
                for lr, wd in itertools.product(self.lr, self.weight_decay)
            ]
        decay = 0.0 if rule.replaces_momentum else decay
        radii = self._own_radii().get(method, self.rho if radius == "rho" else self.sigma)
        grid = itertools.product(self.lr, radii)
        return [Settings(lr=lr, weight_decay=decay, radius=r, parts=parts) for lr, r in grid]

    def _own_radii(self) -> dict[str, tuple[float, ...]]:
        """What --radii says, by method."""
        found: dict[str, tuple[float, ...]] = {}
        for given in self.radii:
            name, _, values = given.partition("=")
            if name in found:
                raise ValueError(f"--radii names {name} twice.")
            try:
                found[name] = tuple(float(value) for value in values.split(","))
            except ValueError as error:
                raise ValueError(f"--radii is to be like sam=0.05,0.1,0.2,0.4, got {given!r}.") from error
        return found

    @property
    def _seeds(self) -> range:
        return range(FIRST_SEED, FIRST_SEED + self.num_seeds)

    def _spec(self, method: str, settings: Settings, seed: int) -> RunSpec:
        """A trial's; flatness chooses nothing, and to measure it would take longer than the training."""
        steps = self.equal.num_steps(method)
        return RunSpec(task=self.task, method=method, seed=seed, num_steps=steps, settings=settings, measured=False)

    def _tune(self, method: str) -> list[dict[str, Any]]:
        rule = split_name(method)[0]
        on_grid = self._settings(method, self.best.get(self.methods[0], {}).get("weight_decay", 0.0))
        trials = self._trials(method, on_grid, str(self.folder))
        best = on_grid[trials.index(_best(method, trials))]
        borrowed = rule.radius_name is not None and not rule.replaces_momentum
        more = further(best, self.lr, self.weight_decay, borrowed=borrowed)
        return trials + (self._trials(method, more, f"{self.folder}, near the best,") if more else [])

    def _trials(self, method: str, candidates: list[Settings], where: str) -> list[dict[str, Any]]:
        found = train_trials(
            candidates,
            partial(self._spec, method),
            self._seeds,
            lambda settings: self.folder / f"{method}-{label(settings)}",
            jobs=self.jobs,
            title=f"{where} {method}",
        )
        return [_outcome(settings, results) for settings, results in zip(candidates, found, strict=True)]


def _best(method: str, trials: list[dict[str, Any]]) -> dict[str, Any]:
    best = min(trials, key=lambda trial: trial["validation_loss"])
    if not math.isfinite(best["validation_loss"]):
        raise ValueError(f"no setting of {method} trained: in each trial a run diverged. Try lower --lr.")
    return best


def _as_settings(method: str, best: dict[str, Any]) -> str:
    """A line for a task's `settings`."""
    parts = {"lr": best["lr"], "weight_decay": best["weight_decay"], "radius": best["radius"], "parts": best["parts"]}
    given = ", ".join(f"{name}={value!r}" for name, value in parts.items() if value)
    return f'    "{method}": Settings({given}),  # validation loss {best["validation_loss"]:.4g}'


def _outcome(settings: Settings, results: list[dict[str, Any]]) -> dict[str, Any]:
    outcome = {**dataclasses.asdict(settings), "validation_loss": validation_loss(results)}
    accuracies = [r["validation_accuracy"] for r in results if "validation_accuracy" in r]
    if accuracies:  # of targets that are labels; a run that diverged counts as none right
        outcome["validation_accuracy"] = float(sum(accuracies) / len(results))
    return outcome
