"""Runs on disk: one JSONL file each, whole lines only, and never overwritten when finished.

A run is written to `<name>.jsonl.partial` line by line and renamed to `<name>.jsonl` when it is finished. So a file
without the suffix is complete, and one with it is the rest of an interrupted run, which is started again.

    {"type": "run", "format": "flatmin-run/1", ...}     what was run: spec, digests of the task, versions, commit
    {"type": "progress", "step": 100, ...}              every few steps
    {"type": "result", "status": "finished", ...}       the last line; or "diverged", with a message
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from flatmin.files import plain

FORMAT = "flatmin-run/1"

# What a reader relies on, as paths into the header and into the result (of a diverged and of a finished run, and what
# is measured at its end).
RUN_FIELDS = ("spec.method", "spec.seed", "spec.settings", "versions")
RESULT_FIELDS = (
    ("message",),
    ("test_loss", "train_loss", "gap", "seconds", "gradients", "steps"),
)
FLATNESS_FIELDS = tuple(
    f"flatness.{name}" for name in ("trace.value", "trace.stderr", "trace.per_layer", "top_eigenvalue.value")
)


@dataclass(frozen=True)
class RunRecord:
    """One finished run: its header, its progress lines and its result."""

    header: dict[str, Any]
    progress: list[dict[str, Any]]
    result: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether training came to its end (and did not diverge)."""
        return self.result["status"] == "finished"

    @property
    def measured(self) -> bool:
        """Whether its flatness was to be measured; that of a trial of `flatmin tune` is not."""
        return self.header.get("measured", True)


class RunWriter:
    """Writes one run; use as a context manager. The file gets its final name in `finish`."""

    def __init__(self, path: Path, header: dict[str, Any]):
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        if path.exists():
            raise ValueError(f"{path} is finished, and a finished run is never overwritten. Choose another place.")
        if self._partial.exists():
            _check_partial(self._partial)
        self._file = self._partial.open("w", encoding="utf-8")
        self.write({"type": "run", "format": FORMAT, **header})

    def write(self, record: dict[str, Any]) -> None:
        """One line, written at once: an interrupt leaves whole lines."""
        self._file.write(json.dumps(plain(record), allow_nan=False) + "\n")
        self._file.flush()

    def finish(self, result: dict[str, Any]) -> None:
        """The last line; the run is then complete on disk."""
        self.write({"type": "result", **result})
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self._path)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._file.closed:
            if kind is not None:
                self.write({"type": "interrupted", "by": kind.__name__})
            self._file.close()


class Unwritten:
    """The face of a RunWriter on a process that does not write."""

    def write(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def finish(self, result: dict[str, Any]) -> None:
        """Nothing."""

    def __enter__(self) -> Unwritten:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def read_run(path: Path) -> RunRecord:
    """Reads a finished run.

    Raises:
        ValueError: if the file is not one: it names the file, the line and the mend, and nothing is changed.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ValueError(_refusal(path, error.strerror or "it cannot be read")) from error
    records = [_parse_line(path, number, line) for number, line in enumerate(lines, 1)]
    _check_header(records[0] if records else {}, path)
    if records[-1].get("type") != "result" or "status" not in records[-1]:
        raise ValueError(_refusal(path, "its last line is not a result"))
    _check_fields(records[0], RUN_FIELDS, path)
    run = RunRecord(records[0], [r for r in records if r["type"] == "progress"], records[-1])
    _check_fields(run.result, RESULT_FIELDS[run.finished], path)
    if run.finished and run.measured:
        _check_fields(run.result, FLATNESS_FIELDS, path)
    return run


def make_writable(folder: Path) -> None:
    """Makes the folder, and makes sure that it can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may probe at the same time
    except OSError as error:
        raise ValueError(cannot_write(folder, error)) from error


def cannot_write(folder: Path, error: OSError) -> str:
    """The message for a folder that cannot be written to."""
    return f"cannot write to {folder}: {error.strerror}. Choose another place with --out."


def environment() -> dict[str, Any]:
    """Versions and commit, for the header of a run."""
    versions = {name: metadata.version(name) for name in ("flatmin", "torch", "numpy", "scipy")}
    return {"versions": {"python": platform.python_version(), **versions}, "commit": _commit()}


def _commit() -> str | None:
    """The commit of this package's source; a repository around an installed package knows nothing of it."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "..") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _check_partial(path: Path) -> None:
    """The rest of a run may be cut off anywhere, even in its first line; a file of somebody else's is refused."""
    begin = json.dumps({"type": "run", "format": FORMAT})[:-1]
    with path.open(encoding="utf-8", errors="replace") as file:
        found = file.read(len(begin))
    if not begin.startswith(found):
        raise ValueError(_refusal(path, f"it does not begin with a {FORMAT} header"))


def _parse_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(_refusal(path, f"line {number} is not JSON")) from error
    if not (isinstance(record, dict) and "type" in record):
        raise ValueError(_refusal(path, f"line {number} is not a record of a run"))
    return record


def _check_header(record: dict[str, Any], path: Path) -> None:
    if record.get("type") != "run" or record.get("format") != FORMAT:
        raise ValueError(_refusal(path, f"it does not begin with a {FORMAT} header"))


def _check_fields(record: dict[str, Any], fields: Iterable[str], path: Path) -> None:
    for field in fields:
        value: Any = record
        for key in field.split("."):
            if not isinstance(value, dict) or key not in value:
                raise ValueError(_refusal(path, f"it has no {field}"))
            value = value[key]


def _refusal(path: Path, why: str) -> str:
    return (
        f"{path} is not a run that flatmin wrote, or it is damaged: {why}. It is left as it is. Move it away (the run "
        "is then done again), or choose another --out."
    )
