"""What `flatmin measure` and `flatmin landscape` look at: a model with given weights, on the data of a task."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from flatmin.curvature import Objective
from flatmin.lab.display import note
from flatmin.lab.fingerprint import changed, fingerprint
from flatmin.lab.records import read_run
from flatmin.lab.script import forget, made_by
from flatmin.lab.tasks import Task, get_task
from flatmin.lab.weights import load_weights

UNTRAINED = "untrained"


@dataclass(kw_only=True)
class Subject:
    """Options that say which model, and on which data."""

    weights: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Files of weights: .safetensors, or a state_dict as torch.save writes it. Those of a run of flatmin, beside its
    record, need nothing else. Default: the model as it is built."""
    task: str | None = None
    """Data, model and loss: a name (see: flatmin tasks), or a Python file that makes one Task. Default: the run's."""
    objective: Path | None = None
    """In place of a task: a Python file that makes one flatmin.Objective, for other kinds of data and models."""
    on: Literal["train", "validation", "test"] = "train"
    """Which part of the task's data. Flatness is of the training loss, unless you want another."""
    seed: int | None = None
    """Of the task's training samples, the probes, and the model as it is built. Default: the run's, else 0."""

    @property
    def name(self) -> str:
        """How the default folder is called."""
        return self.objective.stem if self.objective is not None else self._tasks().pop()

    def begin(self) -> None:
        """Files are read anew, and what contradicts itself or is not there is refused before anything is measured.

        Raises:
            ValueError: if options contradict each other or say too little, or files are not there or of several tasks.
        """
        forget()
        for path in self.weights:
            if not path.is_file():
                raise ValueError(f"there is no file {path}.")
        if len({path.resolve() for path in self.weights}) < len(self.weights):
            raise ValueError("a file of weights is named twice.")
        if self.objective is not None:
            if self.task is not None or self.on != "train":
                raise ValueError("--objective has data of its own: leave --task and --on out.")
        elif not self.weights and self.task is None:
            raise ValueError(
                "nothing to look at: name a file of weights, and its --task if it is not a run of flatmin; or a --task "
                "or an --objective alone, for the model as it is built."
            )
        elif len(tasks := self._tasks()) > 1:
            raise ValueError(f"the runs are of several tasks, {' and '.join(sorted(tasks))}: look at one at a time.")

    def labels(self) -> list[str]:
        """A short name for each file of weights, no two alike."""
        if self.weights:
            return short_names(self.weights)
        return [UNTRAINED if self.objective is None else self.name]

    def objectives(self) -> Iterator[tuple[str, Objective, int]]:
        """Label, objective and seed of each. Ask for the next one when done: an `--objective` is one object for all."""
        files: tuple[Path | None, ...] = self.weights or (None,)
        for label, path in zip(self.labels(), files, strict=True):
            yield label, *self._of_file(path)

    @property
    def what(self) -> str:
        """The data, in words."""
        return f"data of {self.objective}" if self.objective is not None else f"{self.on} samples of {self.name}"

    def about(self) -> dict[str, Any]:
        """What is looked at, as plain data."""
        if self.objective is not None:
            return {"weights": [str(path) for path in self.weights], "objective": str(self.objective)}
        return {"weights": [str(path) for path in self.weights], "task": self.name, "on": self.on}

    def _of_file(self, path: Path | None) -> tuple[Objective, int]:
        if self.objective is not None:
            found, seed = made_by(self.objective, Objective, "Objective(model, criterion, data)"), self.seed or 0
        else:
            found, seed = self._of_task(path)
        if path is not None:
            load_weights(found.model, path)
            if self.objective is None and self.seed is None and self._record(path) is None:
                samples = f"the {self.on} samples are those of seed 0. Another is named by --seed"
                note(f"there is no record of a run beside {path}: {samples}.")
        return found, seed

    def _of_task(self, path: Path | None) -> tuple[Objective, int]:
        record = self._record(path)
        task = self._task_of(record)
        own = None if record is None else int(record["spec"]["seed"])
        seed = self.seed if self.seed is not None else own or 0
        splits = task.splits(seed)
        before = {} if record is None else record.get("task") or {}
        parts = changed(before, fingerprint(task, splits)) if before else []
        if parts := [part for part in parts if part != "data" or seed == own]:
            raise ValueError(
                f"the run of {path} was made of {task.name} with another {' and '.join(parts)} than it has now. Undo "
                "the edit, or train again."
            )
        model = task.model(seed if own is None else own)  # a file of weights need not hold all that a seed decides
        return Objective(model, copy.deepcopy(task.criterion), [getattr(splits, self.on)]), seed

    def _tasks(self) -> set[str]:
        """The names of the tasks, one if all is well."""
        return {self._task_of(self._record(path)).name for path in self.weights or (None,)}

    def _task_of(self, record: dict[str, Any] | None) -> Task:
        """The task that is named, or that of the run."""
        theirs = None if record is None else record["spec"]["task"]
        if self.task is not None:
            task = get_task(self.task)
            if theirs not in (None, task.name):
                raise ValueError(f"the run is of the task {theirs}, not {task.name}.")
            return task
        if theirs is None:
            raise ValueError("there is no record of a run beside the weights: name their --task, or --objective.")
        try:
            return get_task(theirs)
        except ValueError as error:
            raise ValueError(f"the run is of a task of your own, {theirs}: give its file, --task FILE.py.") from error

    @staticmethod
    def _record(path: Path | None) -> dict[str, Any] | None:
        """The header of the run whose weights these are, if its record is beside them."""
        if path is None or path.suffix != ".safetensors":
            return None
        beside = path.with_suffix(".jsonl")
        return read_run(beside).header if beside.exists() else None


def short_names(paths: tuple[Path, ...]) -> list[str]:
    """The ends of the paths, as long as it takes to tell them apart; each is the name of a file, without an ending."""
    stems = [path.absolute().with_suffix("") for path in paths]
    if len(set(stems)) < len(stems):  # endings tell them apart
        stems = [path.absolute().with_name(path.name.replace(".", "-")) for path in paths]
    for length in range(1, max(len(stem.parts) for stem in stems)):
        names = ["-".join(stem.parts[-length:]) for stem in stems]
        if len(set(names)) == len(names):
            return names
    return [f"{number}-{stem.name}" for number, stem in enumerate(stems, 1)]
