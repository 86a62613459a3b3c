"""Tasks by name or by file. To add one to flatmin itself, write a module with a `Task` and list it here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from flatmin.lab.script import made_by
from flatmin.lab.tasks.bad_start import BAD_START
from flatmin.lab.tasks.beyond import beyond
from flatmin.lab.tasks.digits import DIGITS
from flatmin.lab.tasks.solar import SOLAR
from flatmin.lab.tasks.tables import CANCER, DIABETES
from flatmin.lab.tasks.task import Settings, Splits, Task
from flatmin.optim.registry import unknown

_BEYOND = tuple(beyond(task, factor) for factor in (3, 8) for task in (DIGITS, CANCER, DIABETES))
_TASKS = {task.name: task for task in (DIGITS, CANCER, DIABETES, SOLAR, BAD_START, *_BEYOND)}
OF_CLAIMS = tuple(task.name for task in (BAD_START, *_BEYOND))  # made for one claim of a paper each


def tasks() -> Mapping[str, Task]:
    """All tasks by name."""
    return MappingProxyType(_TASKS)


def get_task(name: str | Path) -> Task:
    """The task of that name, or the one in the Python file `name`.

    Raises:
        ValueError: for an unknown name, with the known ones and the nearest; for a file without one task.
    """
    if not isinstance(name, (str, Path)):
        raise ValueError(f"task must be a name, or the path of a Python file with one, got {type(name).__name__}.")
    name = str(name)
    if name.endswith(".py"):
        task = made_by(Path(name), Task, "Task(name=..., ...)", _TASKS.values())
        if task.name in _TASKS:
            raise ValueError(
                f"the task in {name} has the name of one that flatmin comes with, {task.name!r}: choose another."
            )
        return task
    if name not in _TASKS:
        raise ValueError(f"{unknown('task', name, _TASKS)} One of your own is a file: --task {name}.py.")
    return _TASKS[name]


__all__ = ["OF_CLAIMS", "Settings", "Splits", "Task", "get_task", "tasks"]
