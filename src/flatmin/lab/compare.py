"""The main job: train methods x seeds at equal gradient budget, summarise, report. Continues where it stopped."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flatmin.lab.display import Live, print_table
from flatmin.lab.pool import run_all
from flatmin.lab.records import RunRecord, read_run, write_json
from flatmin.lab.report import write_report
from flatmin.lab.summary import summarize
from flatmin.lab.tasks import get_task
from flatmin.lab.train import RunSpec
from flatmin.optim.registry import get_method

FORMAT = "flatmin-comparison/1"


@dataclass(kw_only=True)
class Compare:
    """Train several methods on a task for several seeds at equal gradient budget, and report with intervals.

    Writes <out>/<name>/ with one JSONL record and the weights of every run, summary.json and report.html. An
    interrupted comparison continues where it stopped; finished runs are not done again; more seeds or methods are
    added to what is there.
    """

    task: str = "digits"
    """Data, model and loss, by name (see: flatmin tasks)."""
    methods: tuple[str, ...] = ("base", "sam", "nso-one-point", "nso")
    """Methods, by name (see: flatmin methods). The first is the control."""
    num_seeds: int = 10
    """Seeds 0 .. n-1. A seed fixes the training samples, the initial weights and the batch order of all methods."""
    budget: Literal["gradients", "steps"] = "gradients"
    """What is equal: mini-batch gradients (a two-gradient method takes half the steps), or steps."""
    num_gradients: int | None = None
    """The budget: gradients per run, or steps with --budget steps. Default: the task's."""
    name: str = "digits"
    """Name of the folder in --out."""
    out: Path = Path("runs")
    """Where comparisons are kept."""
    jobs: int = 2
    """Runs at the same time, one thread each."""

    def __post_init__(self) -> None:
        if self.num_seeds < 1 or self.jobs < 1:
            raise ValueError(f"num_seeds and jobs must be at least 1, got {self.num_seeds} and {self.jobs}.")
        if self.num_gradients is not None and self.num_gradients < 1:
            raise ValueError(f"num_gradients must be at least 1, got {self.num_gradients}.")
        if not self.methods:
            raise ValueError("methods is empty: name at least one, the first is the control.")

    @property
    def folder(self) -> Path:
        """Where this comparison is kept."""
        return self.out / self.name

    def specs(self) -> list[RunSpec]:
        """All runs, method by method within a seed, so that an interrupted comparison is balanced.

        Raises:
            ValueError: for an unknown task or method, or one without settings for this task.
        """
        task = get_task(self.task)
        amount = self.num_gradients or task.num_gradients
        specs = []
        for seed in range(self.num_seeds):
            for name in self.methods:
                method = get_method(name)
                if name not in task.settings:
                    raise ValueError(
                        f"task {task.name!r} has no settings for method {name!r}. It has: {', '.join(task.settings)}."
                    )
                steps = amount if self.budget == "steps" else max(1, amount // method.gradients)
                specs.append(
                    RunSpec(task=task.name, method=name, seed=seed, num_steps=steps, settings=task.settings[name])
                )
        return specs

    def config(self) -> dict[str, Any]:
        """What decides the numbers, as plain data."""
        amount = self.num_gradients or get_task(self.task).num_gradients
        return {
            "format": FORMAT,
            "task": self.task,
            "methods": list(self.methods),
            "num_seeds": self.num_seeds,
            "budget": self.budget,
            "amount": amount,
        }

    def run(self) -> Path:
        """Does what is left to do, prints the table, writes the report; returns the report's path."""
        specs = self.specs()
        records = self.folder / "records"
        _prepare(self.folder)
        todo = [spec for spec in specs if not _done(spec, records)]
        write_json(self.folder / "comparison.json", self.config())
        with Live(len(specs), len(specs) - len(todo), str(self.folder)) as live:
            run_all([(spec, records) for spec in todo], self.jobs, live)
        return self.conclude()

    def conclude(self) -> Path:
        """Summarises the finished runs, prints the table, writes summary.json and report.html."""
        runs = self.runs()
        summary = {**self.config(), **summarize(runs)}
        write_json(self.folder / "summary.json", summary)
        report = write_report(self.folder / "report.html", summary, runs)
        print_table(summary)
        print(f"report: {report}")
        return report

    def runs(self) -> dict[str, list[RunRecord]]:
        """The finished runs of this comparison, by method."""
        found: dict[str, list[RunRecord]] = {name: [] for name in self.methods}
        for spec in self.specs():
            found[spec.method].append(read_run(self.folder / "records" / f"{spec.name}.jsonl"))
        return found


@dataclass(kw_only=True)
class Report:
    """Write the report of a finished comparison again, from its records."""

    name: str = "digits"
    """Name of the folder in --out."""
    out: Path = Path("runs")
    """Where comparisons are kept."""

    def run(self) -> Path:
        """Reads the comparison's configuration and writes summary.json and report.html."""
        config = _read_config(self.out / self.name)
        return Compare(
            task=config["task"],
            methods=tuple(config["methods"]),
            num_seeds=config["num_seeds"],
            budget=config["budget"],
            num_gradients=config["amount"],
            name=self.name,
            out=self.out,
        ).conclude()


def _prepare(folder: Path) -> None:
    """Makes the folder, or makes sure that it is a comparison's."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            _read_config(folder)
        (folder / "records").mkdir(parents=True, exist_ok=True)
        probe = folder / "records" / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}. Choose another place with --out.") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "comparison.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(
            f"{folder} is not a comparison that flatmin wrote (no valid comparison.json). It is left as it is: choose "
            "another --name."
        )
    return config


def _done(spec: RunSpec, folder: Path) -> bool:
    """Whether the run is finished; a record of another run under its name is refused."""
    path = folder / f"{spec.name}.jsonl"
    if not path.exists():
        return False
    found = read_run(path).header["spec"]
    wanted = spec.to_dict()
    changed = [key for key in wanted if found.get(key) != wanted[key]]
    if changed:
        key = changed[0]
        raise ValueError(
            f"{path} is a run with another {key} ({found.get(key)}, not {wanted[key]}). It is left as it is: choose "
            "another --name."
        )
    return True
