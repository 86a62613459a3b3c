"""Tasks by name. To add one, write a module with a `Task` and list it here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from flatmin.lab.tasks.digits import DIGITS
from flatmin.lab.tasks.task import Settings, Splits, Task
from flatmin.optim.registry import unknown

_TASKS = {task.name: task for task in (DIGITS,)}


def tasks() -> Mapping[str, Task]:
    """All tasks by name."""
    return MappingProxyType(_TASKS)


def get_task(name: str) -> Task:
    """The task of that name; an unknown one raises a `ValueError` with the known names and the nearest."""
    if name not in _TASKS:
        raise ValueError(unknown("task", name, _TASKS))
    return _TASKS[name]


__all__ = ["Settings", "Splits", "Task", "get_task", "tasks"]
