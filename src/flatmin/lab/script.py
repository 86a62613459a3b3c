"""What a Python file of the user's own makes: a `Task`, an `Objective`."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TypeVar

Made = TypeVar("Made")


def made_by(path: Path, kind: type[Made], example: str, known: Collection[Made] = ()) -> Made:
    """The one object of a kind that the file makes, apart from the `known` ones, which it may have imported.

    The file is run as Python runs a script: modules beside it can be imported. It is run once in a process, until
    `forget`, so that an edit while runs are under way changes nothing between them.

    Args:
        path: of the file.
        kind: `Task` or `Objective`. Of several the one that has this name in capitals counts.
        example: how one is made, for the message.
        known: what does not count.

    Raises:
        ValueError: if there is no such file, an error occurs in it (the message has its line), or it makes none or
            several.
    """
    name = kind.__name__
    file = path.expanduser().resolve()
    if not file.is_file() or file.suffix != ".py":
        raise ValueError(f"there is no Python file {path} to read the {name} from.")
    made = vars(_run(file))

    def is_own(value: object) -> bool:
        return isinstance(value, kind) and not any(value is other for other in known)

    values = [made[name.upper()]] if is_own(made.get(name.upper())) else made.values()
    found = {id(value): value for value in values if is_own(value)}
    if len(found) != 1:
        names = ", ".join(str(value.name) for value in found.values() if hasattr(value, "name"))
        raise ValueError(
            f"{path} is to make one {name}, as in {name.upper()} = {example}; it makes {len(found)}"
            f"{f' ({names})' if names else ''}."
        )
    return next(iter(found.values()))


def forget() -> None:
    """The next file is read anew: a command begins so."""
    _run.cache_clear()


@lru_cache(maxsize=8)
def _run(file: Path) -> ModuleType:
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    name = f"flatmin_file_{file.stem}"
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
