"""The folder of a comparison: whose it is, what is done in it, and that one process at a time works there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flatmin.checks import check_whole
from flatmin.lab.fingerprint import changed, fingerprint
from flatmin.lab.records import cannot_write, make_writable, read_run
from flatmin.lab.tasks import get_task
from flatmin.lab.train import RunSpec

try:
    import fcntl
except ImportError:  # not on Windows: two processes in one folder are then the user's care
    fcntl = None

FORMAT = "flatmin-comparison/1"


def check_counts(**counts: int | None) -> None:
    """Refuses an option that is given and less than 1."""
    for name, count in counts.items():
        if count is not None:
            check_whole(f"--{name.replace('_', '-')}", count, 1)


def prepare(folder: Path) -> dict[str, Any] | None:
    """Makes the folder, or makes sure that it is a comparison's; returns the configuration that is there."""
    found = None
    try:
        if folder.exists() and not _just_begun(folder):
            found = read_config(folder)
    except OSError as error:
        raise ValueError(cannot_write(folder, error)) from error
    make_writable(folder / "records")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The content of comparison.json; a folder without a valid one is refused."""
    path = folder / "comparison.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(
            f"{folder} is not a comparison that flatmin wrote (no valid comparison.json). It is left as it is: choose "
            "another --name, or delete comparison.json if it is damaged and the folder holds nothing else."
        )
    return config


def unfinished(runs: Iterable[tuple[RunSpec, Path]]) -> list[tuple[RunSpec, Path]]:
    """Those of the runs (spec, folder) that are still to be done.

    Raises:
        ValueError: for a record of another run under a run's name: with other settings, or of a task that was edited.
    """
    todo: list[tuple[RunSpec, Path]] = []
    tasks: dict[tuple[str, int], dict[str, Any]] = {}  # as they are now
    for spec, folder in runs:
        path = folder / f"{spec.name}.jsonl"
        if not path.exists():
            todo.append((spec, folder))
            continue
        run = read_run(path)
        if spec.measured and not run.measured:
            raise ValueError(_other(path, "whose flatness was not measured (a trial of flatmin tune)"))
        header = run.header
        found, wanted = header["spec"], spec.to_dict()
        for key in wanted:
            if found.get(key) != wanted[key]:
                other = "other" if key == "settings" else "another"
                raise ValueError(_other(path, f"with {other} {key} ({found.get(key)}, not {wanted[key]})"))
        if (before := header.get("task")) is not None:
            this = spec.task, spec.seed
            task = get_task(spec.task)
            if this not in tasks:
                tasks[this] = fingerprint(task, task.splits(spec.seed))
            if parts := changed(before, tasks[this]):
                raise ValueError(_other(path, f"of the task {task.name} with another {' and '.join(parts)}"))
    return todo


def _other(path: Path, how: str) -> str:
    return f"{path} is a run {how}. It is left as it is: choose another --out."


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other process works in `folder`; two of them would write the same records.

    Raises:
        ValueError: if another one does.
    """
    path = folder / ".lock"
    try:
        descriptor = _acquire(path)
    except BlockingIOError as error:
        raise ValueError(f"another flatmin is at work in {folder}.") from error
    except OSError as error:
        raise ValueError(cannot_write(folder, error)) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock is given up: nobody else's file is removed
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """An open file that holds the lock: the one that is at `path` now, not one that was removed in between."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _flock(descriptor)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return


def _just_begun(folder: Path) -> bool:
    """Whether the folder holds no more than what is there before comparison.json is."""
    if not folder.is_dir():
        return False
    records = folder / "records"
    others = [path for path in folder.iterdir() if path != records and not _ours(path.name)]
    return not others and not (records.exists() and any(path.name != ".writable" for path in records.iterdir()))


def _ours(name: str) -> bool:
    return name == ".lock" or (name.startswith("comparison.json.") and name.endswith(".tmp"))
