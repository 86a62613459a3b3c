"""What `flatmin suggest` found: printed, and as plain data."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from rich.console import Console
from rich.text import Text

from flatmin.lab.display import print_columns
from flatmin.lab.parts import split_name
from flatmin.lab.tuning.costs import NUM_TRIALS, NUM_TUNING_SEEDS, Cost
from flatmin.lab.tuning.strength import Strength
from flatmin.lab.tuning.tune import Tune
from flatmin.lab.tuning.walk import Walk, rounded

# Times the control's learning rate, up to where the walk found it no better, and its weight decay.
RATES, DECAYS = (0.35, 0.7, 1.5, 3.0), (0.0, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Advice:
    """Where to look.

    Attributes:
        walk: to a learning rate and weight decay of the control.
        walk_seeds: how many, of each point of the walk.
        untrained: the validation loss of the model as it is built.
        grids: method -> what its radii do; empty where none do what is looked for.
        price: method -> what it costs.
        tuning: what will be tuned, with the default grids.
    """

    walk: Walk
    walk_seeds: int
    untrained: float
    grids: Mapping[str, Sequence[Strength]]
    price: Mapping[str, Cost]
    tuning: Tune

    @property
    def tune(self) -> Tune:
        """The command that tunes there."""
        lr, decay = self.walk.best
        radii = {name: [strength.radius for strength in grid] for name, grid in self.grids.items() if grid}
        return replace(
            self.tuning,
            lr=tuple(rounded(lr * factor) for factor in RATES),
            weight_decay=tuple(rounded(decay * factor) for factor in DECAYS) if decay else Tune.weight_decay,
            radii=tuple(f"{name}={','.join(f'{r:g}' for r in own)}" for name, own in radii.items()),
        )

    @property
    def command(self) -> str:
        """The same, to be typed."""
        tune = self.tune
        words = ["flatmin", "tune", "--task", tune.task, "--methods", *tune.methods]
        words += ["--lr", *(f"{rate:g}" for rate in tune.lr), "--weight-decay", *(f"{x:g}" for x in tune.weight_decay)]
        words += ["--radii", *tune.radii] if tune.radii else []
        words += [] if tune.budget == "gradients" else ["--budget", tune.budget]
        words += [] if tune.num_gradients is None else ["--num-gradients", str(tune.num_gradients)]
        return shlex.join([*words, "--jobs", str(tune.jobs)])

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        tried = [{"lr": lr, "weight_decay": wd, "validation_loss": loss} for (lr, wd), loss in self.walk.tried.items()]
        return {
            "control": {"tried": tried, "lr": self.walk.best[0], "weight_decay": self.walk.best[1]},
            "walk_ended": self.walk.ended,
            "untrained": self.untrained,
            "radii": {name: [asdict(strength) for strength in grid] for name, grid in self.grids.items()},
            "seconds": {name: asdict(cost) for name, cost in self.price.items()},
            "command": self.command,
        }

    def print(self, console: Console, num_seeds: int) -> None:
        """The tables, the times (with a comparison of so many seeds) and the command."""
        say, jobs = partial(console.print, highlight=False, markup=False), self.tuning.jobs
        (lr, decay), loss = self.walk.best, self.walk.tried[self.walk.best]
        found = f"validation loss v = {loss:.4g}, {self.walk_seeds} seeds"
        say(f"{self.tuning.methods[0]}: lr {lr:g}, weight decay {decay:g} ({found}).")
        if not self.walk.ended:
            say("That is where the search had to stop, and not a minimum: begin there with --lr and --weight-decay.")
        if self.walk.indifferent:
            most = max(wd for _, wd in self.walk.tried)
            say(f"Weight decays up to {most:g} do the same: say larger ones by --weight-decay, or 0 for none.")
        if loss >= self.untrained:
            say(f"An untrained model has {self.untrained:.4g}: begin elsewhere, with --lr and --weight-decay.")
        rows = [(name, strength) for name, grid in self.grids.items() for strength in grid]
        if rows:
            say("At the end of that run a radius moves the weights w by d, and the loss of a mini-batch rises:")
            print_columns([name for name, _ in rows], _strengths([strength for _, strength in rows]), console)
        for name in self.grids:
            radius = split_name(name)[0].radius_name
            if radius is not None and not self.grids[name]:
                say(f"{name}: no four radii do what is looked for; tune takes its own --{radius}.")
        print_columns(list(self.price), _prices(self.price), console)
        tuning, comparison = (
            _time(sum(getattr(cost, kind) for cost in self.price.values()) / jobs) for kind in ("tuning", "comparison")
        )
        say(
            f"On {jobs} process{'es' if jobs > 1 else ''}: about {tuning} to tune ({NUM_TRIALS} settings x "
            f"{NUM_TUNING_SEEDS} seeds each), {comparison} to compare ({num_seeds} seeds, measured).\nWhere to look:"
        )
        print(self.command)


def _strengths(found: Sequence[Strength]) -> list[tuple[str, list[Text]]]:
    rises = [f"{s.rise:.2g}" if s.rise < 10 else f"{s.rise:.0f}" for s in found]
    return [
        ("radius", [Text(f"{s.radius:g}") for s in found]),
        ("|d| / |w|", [Text(f"{s.moved:.1%}") for s in found]),
        ("rise / v", [Text(rise) for rise in rises]),
    ]


def _prices(price: Mapping[str, Cost]) -> list[tuple[str, list[Text]]]:
    first = next(iter(price.values()))
    return [
        ("ms a step", [Text(f"{1000 * cost.step:.3g}") for cost in price.values()]),
        ("over the first", [Text(f"{cost.step / first.step:.2f}") for cost in price.values()]),
        ("steps of a run", [Text(_time(cost.run)) for cost in price.values()]),
    ]


def _time(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"
