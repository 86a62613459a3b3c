"""The main job: train methods x seeds at equal gradient budget, summarise, report. Continues where it stopped."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from flatmin.checks import check_whole
from flatmin.files import write_json
from flatmin.lab.budget import Budget, Kind
from flatmin.lab.display import Live, print_table
from flatmin.lab.folder import FORMAT, check_counts, locked, prepare, read_config, unfinished
from flatmin.lab.parts import has_settings, settings_of
from flatmin.lab.pool import IF_STOPPED, check_importing, run_all
from flatmin.lab.records import RunRecord, read_run
from flatmin.lab.report import write_report
from flatmin.lab.script import forget
from flatmin.lab.summary import mixed_versions, summarize
from flatmin.lab.tasks import Task, get_task
from flatmin.lab.tasks.check import check_task
from flatmin.lab.tasks.task import check_folder
from flatmin.lab.train import RunSpec, run_name
from flatmin.lab.tuning.tuned import FIRST_SEED, Tuned, read_tuning, with_own_settings


@dataclass(kw_only=True)
class Compare:
    """Train methods on a task for several seeds at an equal budget of gradients (or steps), and report with intervals.

    Writes <out>/<name>/ with one JSONL record and the weights of every run, summary.json and report.html. An
    interrupted comparison continues where it stopped and finished runs are not done again. With more seeds or other
    methods than last time, they are added to what is there.
    """

    task: str = "digits"
    """Data, model and loss: a name (see: flatmin tasks), or a Python file that makes one Task."""
    methods: tuple[str, ...] = ("base", "sam", "nso-one-point", "nso")
    """Methods, by name (see: flatmin methods), alone or with parts: sam+swa, nso+mixup. The first is the control."""
    num_seeds: int = 10
    """How many seeds. Each fixes the training samples, the initial weights and the batch order of all methods."""
    first_seed: int = 0
    """The first of them. Seeds that an earlier comparison has not seen confirm it, in another folder (--name)."""
    budget: Kind | None = None
    """What is equal: mini-batch gradients (a two-gradient method takes half the steps), or steps. Default: what was
    equal in the tuning, gradients for a task's own settings."""
    num_gradients: int | None = None
    """The budget: gradients per run, or steps with --budget steps. Default: the task's."""
    tuned: Path | None = None
    """tuning.json of flatmin tune: its winners are the settings, and its budget is the default. Default: the task's."""
    name: str | None = None
    """Name of the folder in --out. Default: the task's."""
    out: Path = Path("runs")
    """Where comparisons are kept."""
    jobs: int = 2
    """Runs at the same time, one thread each."""
    if_stopped: ClassVar[str] = IF_STOPPED

    def __post_init__(self) -> None:
        check_counts(num_seeds=self.num_seeds, jobs=self.jobs, num_gradients=self.num_gradients)
        if not self.methods:
            raise ValueError("--methods is empty: name at least one, the first is the control.")
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"--methods names a method twice: {' '.join(self.methods)}.")
        if not 0 <= check_whole("--first-seed", self.first_seed) <= FIRST_SEED - self.num_seeds:
            raise ValueError(
                f"--first-seed {self.first_seed} with {self.num_seeds} seeds: they are to lie within 0 .. "
                f"{FIRST_SEED - 1}, since those from {FIRST_SEED} on are of tuning."
            )
        if self.name is not None:
            check_folder("--name", self.name)

    @property
    def folder(self) -> Path:
        """Where this comparison is kept."""
        return self.out / (get_task(self.task).name if self.name is None else self.name)

    def specs(self) -> list[RunSpec]:
        """All runs, method by method within a seed, so that an interrupted comparison is balanced.

        Raises:
            ValueError: for an unknown task or method, or one without settings for this task.
        """
        task, budget = self._tuned.task, self._budget
        if missing := [name for name in self.methods if not has_settings(task, name)]:
            raise ValueError(self._no_settings(task, missing))
        specs = []
        for seed in range(self.first_seed, self.first_seed + self.num_seeds):
            for name in self.methods:
                steps, settings = budget.num_steps(name), settings_of(task, name)
                specs.append(RunSpec(task=self.task, method=name, seed=seed, num_steps=steps, settings=settings))
        return specs

    def config(self) -> dict[str, Any]:
        """What decides the numbers, as plain data."""
        return {
            "format": FORMAT,
            "task": self._tuned.task.name,
            "methods": list(self.methods),
            "num_seeds": self.num_seeds,
            "first_seed": self.first_seed,
            "budget": self._budget.kind,
            "amount": self._budget.amount,
        }

    def run(self) -> Path:
        """Does what is left to do, prints the table, writes the report; returns the report's path."""
        forget()
        return replace(self)._begin()  # a fresh one, which has not read its task yet

    def _begin(self) -> Path:
        self.specs()  # unknown names are refused before anything is written, and a task that would mislead
        check_importing()
        check_task(get_task(self.task))
        prepare(self.folder)  # a folder that is not ours is refused before it is locked
        with locked(self.folder):
            known = prepare(self.folder)
            return (self._joined_with(known) if known else self)._run()

    @cached_property
    def _tuned(self) -> Tuned:
        """The task, with its own settings or those that were tuned."""
        task = get_task(self.task)
        return with_own_settings(task) if self.tuned is None else read_tuning(self.tuned, task)

    def _no_settings(self, task: Task, missing: list[str]) -> str:
        names = dict.fromkeys(["base", *self.methods])  # all: a tuning has what was named with it
        there = f"It has them for: {', '.join(task.settings)}." if task.settings else "It has none yet."
        command = ["flatmin", "tune", "--task", self.task, "--methods", *names]
        return (
            f"task {task.name} has no settings for {', '.join(missing)}. {there} Find some with {shlex.join(command)}, "
            "and give them to compare by --tuned, or copy them into the task's settings."
        )

    @property
    def _budget(self) -> Budget:
        default = self._tuned.budget
        return Budget(self.num_gradients or default.amount, self.budget or default.kind)

    def _joined_with(self, before: dict[str, Any]) -> Compare:
        """This comparison and the one that is there; the control stays the same."""
        wanted = self.config()
        before = {"first_seed": 0, **before}  # not said by earlier versions
        for key in ("task", "budget", "amount", "first_seed"):
            if before[key] != wanted[key]:
                raise ValueError(
                    f"{self.folder} is a comparison with another {key.replace('_', ' ')} ({before[key]}, not "
                    f"{wanted[key]}). It is left as it is: choose another --name."
                )
        methods = tuple(dict.fromkeys([*before["methods"], *self.methods]))
        joined = replace(self, methods=methods, num_seeds=max(before["num_seeds"], self.num_seeds))
        if joined.config() != wanted:
            print(f"together with what is in {self.folder}: {', '.join(methods)}; {joined.num_seeds} seeds")
        return joined

    def _run(self) -> Path:
        specs = self.specs()
        records = self.folder / "records"
        todo = unfinished((spec, records) for spec in specs)
        config = self.config()
        config["about"] = about(self._tuned, config)
        write_json(self.folder / "comparison.json", config)
        with Live(len(specs), len(specs) - len(todo), str(self.folder)) as live:
            run_all(todo, self.jobs, live)
        return conclude(self.folder, config)


@dataclass(kw_only=True)
class Report:
    """Write the report of a finished comparison again, from its records."""

    name: str = "digits"
    """Name of the folder in --out."""
    out: Path = Path("runs")
    """Where comparisons are kept."""

    def run(self) -> Path:
        """Reads the comparison's configuration and writes summary.json and report.html."""
        check_folder("--name", self.name)
        folder = self.out / self.name
        if not folder.is_dir():
            there = sorted(path.parent.name for path in self.out.glob("*/comparison.json"))
            raise ValueError(
                f"there is no comparison {self.name!r} in {self.out}. There is: {', '.join(there) or 'none'}."
            )
        config = read_config(folder)
        if "about" not in config:  # as it was when tasks had to be flatmin's own
            config["about"] = about(with_own_settings(get_task(config["task"])), config)
        return conclude(folder, config)


def about(tuned: Tuned, config: Mapping[str, Any]) -> dict[str, str]:
    """What a report says of the task, so that it can be written where the task cannot be read."""
    task, here = tuned.task, Budget(config["amount"], config["budget"])
    tuning = f"{task.tuning.rstrip('.')}."
    if here != tuned.budget:
        tuning += f" That was at a budget of {tuned.budget}; here it is {here}, for which nothing was tuned."
    return {"summary": task.summary, "source": task.source, "licence": task.licence, "tuning": tuning}


def conclude(folder: Path, config: Mapping[str, Any]) -> Path:
    """Summarises the finished runs, prints the table, writes summary.json and report.html; returns its path."""
    runs = read_runs(folder, config)
    summary = {**config, **summarize(runs), "mixed_versions": mixed_versions(runs)}
    write_json(folder / "summary.json", summary)
    report = write_report(folder / "report.html", summary, runs)
    print_table(summary)
    print(f"report: {report}")
    return report


def read_runs(folder: Path, config: Mapping[str, Any]) -> dict[str, list[RunRecord]]:
    """The finished runs of a comparison, by method.

    Raises:
        ValueError: if some are missing.
    """
    first = config.get("first_seed", 0)
    seeds = range(first, first + config["num_seeds"])
    names = {method: [run_name(method, seed) for seed in seeds] for method in config["methods"]}
    paths = {method: [folder / "records" / f"{name}.jsonl" for name in runs] for method, runs in names.items()}
    missing = [path for runs in paths.values() for path in runs if not path.exists()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {config['num_seeds'] * len(paths)} runs of {folder} are not finished. Continue it with "
            f"flatmin compare --name {folder.name}, and the options that it was begun with."
        )
    found = {method: [read_run(path) for path in runs] for method, runs in paths.items()}
    _check_alike(folder, [record.header for runs in found.values() for record in runs])
    return found


def _check_alike(folder: Path, headers: list[dict[str, Any]]) -> None:
    """Refuses runs of a task that was edited while they were made: data may differ between seeds only."""
    seen: dict[tuple[Any, ...], Any] = {}
    for header in headers:
        for part, digest in header.get("task", {}).items():
            key = (part, header["spec"]["seed"]) if part == "data" else (part,)
            if seen.setdefault(key, digest) != digest:
                raise ValueError(f"{folder} has runs of the task with more than one {part}. Begin another --name.")
