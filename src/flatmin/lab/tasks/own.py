"""A task of the user's own: a Python file that makes one `Task`, given by its path."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from flatmin.lab.tasks.task import Task


def read_task(path: Path, known: Collection[Task]) -> Task:
    """The one task that the file makes, apart from the `known` ones, which it may have imported.

    The file is run as Python runs a script: modules beside it can be imported. It is run once in a process, until
    `forget`, so that an edit while runs are under way does not change the task between them. Of several tasks the one
    that is named TASK counts.

    Raises:
        ValueError: if there is no such file, an error occurs in it (the message has its line), it makes no task or
            several, or one with the name of a known task.
    """
    file = path.expanduser().resolve()
    if not file.is_file():
        raise ValueError(f"there is no file {path} to read a task from.")
    made = vars(_run(file))
    values = [made["TASK"]] if _is_own(made.get("TASK"), known) else made.values()
    found = {id(value): value for value in values if _is_own(value, known)}
    if len(found) != 1:
        names = f" ({', '.join(task.name for task in found.values())})" if found else ""
        raise ValueError(f"{path} is to make one task, as in TASK = Task(name=..., ...); it makes {len(found)}{names}.")
    (task,) = found.values()
    if task.name in {other.name for other in known}:
        raise ValueError(
            f"the task in {path} has the name of one that flatmin comes with, {task.name!r}: choose another."
        )
    return task


def _is_own(value: object, known: Collection[Task]) -> bool:
    return isinstance(value, Task) and not any(value is task for task in known)


def forget() -> None:
    """The next task is read anew: a command begins so."""
    _run.cache_clear()


@lru_cache(maxsize=8)
def _run(file: Path) -> ModuleType:
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    name = f"flatmin_task_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(f"{_place(file, error)}: {type(error).__name__}: {error}") from error
    return module


def _place(file: Path, error: BaseException) -> str:
    """The file, and the last line of it that was at work."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    return f"{file}, line {lines[-1]}" if lines else str(file)
