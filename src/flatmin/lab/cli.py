"""The command line, generated from typed dataclasses."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated, Any

from flatmin.extras import need


@dataclass
class Version:
    """What --version stands for."""

    def run(self) -> None:
        """Prints the version."""
        print(metadata.version("flatmin"))


@dataclass
class Methods:
    """List the training methods: what each costs, and where it comes from."""

    def run(self) -> None:
        """Prints one line per method, and one per part."""
        from flatmin.lab.parts import PARTS
        from flatmin.optim.registry import methods

        for method in methods().values():
            radius = f", radius {method.radius_name}" if method.radius_name else ""
            print(f"{method.name:16} {method.gradients} gradient(s) a step{radius}; {method.paper}")
        print("\nWith any of them, as in sam+swa:")
        for name, (strength, what) in PARTS.items():
            print(f"{name:20} {what} (usually {strength:g})")


@dataclass
class Tasks:
    """List the tasks: data, model, source and licence."""

    def run(self) -> None:
        """Prints a few lines per task, and the names of those that only claims use."""
        from flatmin.lab.tasks import OF_CLAIMS, tasks

        for task in tasks().values():
            if task.name not in OF_CLAIMS:
                print(f"{task.name}: {task.summary}\n  data: {task.source}; {task.licence}\n  settings: {task.tuning}")
        print(f"\nFor claims of the papers (flatmin reproduce): {', '.join(OF_CLAIMS)}")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C.

    Not KeyboardInterrupt itself: where that passes through `exec` of a string (defining a dataclass is one), `python
    -m` ends by the signal, though it was caught, and not with our status.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM: a clean stop, as for Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; an error that the user can mend is one line on stderr and exit status 2.

    Ctrl-C and SIGTERM stop all runs with whole records; the exit status is 130 or 143 (141 for a reader that has gone).
    """
    command: Any = None
    try:
        with _stoppable(), _plain_warnings():
            command = _parsed(sys.argv[1:] if arguments is None else arguments)
            command.run()
            sys.stdout.flush()
    except (ValueError, ImportError) as error:
        return _end(f"error: {error}", 2)
    except BrokenProcessPool:
        return _stopped("error: a worker process died, perhaps for want of memory", command, 2)
    except BrokenPipeError:  # `flatmin methods | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Terminated:
        return _stopped("terminated", command, 143)
    except KeyboardInterrupt:
        return _stopped("interrupted", command, 130)
    return 0


def _parsed(arguments: Sequence[str]) -> Any:
    """The command that the arguments name, with its options."""
    if list(arguments) == ["--version"]:
        return Version()
    tyro = need("tyro", "lab")
    from flatmin.lab.checkpoints.landscape import Landscape
    from flatmin.lab.checkpoints.measuring import Measure
    from flatmin.lab.claims.reproduce import Reproduce
    from flatmin.lab.compare import Compare, Report
    from flatmin.lab.datasets import Data
    from flatmin.lab.launch import Train
    from flatmin.lab.tuning.suggest import Suggest
    from flatmin.lab.tuning.tune import Tune

    commands = (
        Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Train, tyro.conf.subcommand("train")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Measure, tyro.conf.subcommand("measure")]
        | Annotated[Landscape, tyro.conf.subcommand("landscape")]
        | Annotated[Suggest, tyro.conf.subcommand("suggest")]
        | Annotated[Tune, tyro.conf.subcommand("tune")]
        | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
        | Annotated[Data, tyro.conf.subcommand("data")]
        | Annotated[Tasks, tyro.conf.subcommand("tasks")]
        | Annotated[Methods, tyro.conf.subcommand("methods")]
    )
    return tyro.cli(commands, prog="flatmin", args=arguments)


def _stopped(how: str, command: Any, status: int) -> int:
    """Says what is left, if the command has come so far that something may be."""
    left = getattr(command, "if_stopped", "")
    return _end(f"{how}. {left}".rstrip(), status)


def _end(message: str, status: int) -> int:
    print(f"flatmin: {message}", file=sys.stderr)
    return status


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Inside, a warning is one line: which line of Python gave it is of no use at a command line."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"flatmin: warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextmanager
def _stoppable() -> Iterator[None]:
    """Inside, signals raise `Terminated` and `Interrupted` (where handlers can be set: in the main thread).

    An interrupt that is ignored (a job in the background of a shell) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: object) -> None:
        raise Terminated

    def interrupt(*_: object) -> None:
        raise Interrupted

    handlers: dict[signal.Signals, Callable[..., None]] = {signal.SIGTERM: terminate}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handlers[signal.SIGINT] = interrupt
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
