"""The command line, generated from typed dataclasses."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated

from flatmin.extras import need


@dataclass
class Methods:
    """List the training methods: what each costs, and where it comes from."""

    def run(self) -> None:
        """Prints one line per method."""
        from flatmin.optim.registry import methods

        for method in methods().values():
            radius = f", radius {method.radius_name}" if method.radius_name else ""
            print(f"{method.name:16} {method.gradients} gradient(s) a step{radius}; {method.paper}")


@dataclass
class Tasks:
    """List the tasks: data, model, source and licence."""

    def run(self) -> None:
        """Prints a few lines per task."""
        from flatmin.lab.tasks import tasks

        for task in tasks().values():
            print(f"{task.name}: {task.summary}\n  data: {task.source}; {task.licence}\n  settings: {task.tuning}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; an error that the user can mend is one line on stderr and exit status 2."""
    tyro = need("tyro", "lab")
    from flatmin.lab.compare import Compare, Report
    from flatmin.lab.tune import Tune

    commands = (
        Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Tune, tyro.conf.subcommand("tune")]
        | Annotated[Tasks, tyro.conf.subcommand("tasks")]
        | Annotated[Methods, tyro.conf.subcommand("methods")]
    )
    if list(sys.argv[1:] if arguments is None else arguments) == ["--version"]:
        print(metadata.version("flatmin"))
        return 0
    try:
        tyro.cli(commands, prog="flatmin", args=arguments).run()
    except (ValueError, ImportError) as error:
        print(f"flatmin: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("flatmin: interrupted. Finished runs are kept; the same command continues.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
