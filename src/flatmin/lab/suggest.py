"""`flatmin suggest`: which learning rates and radii to try on a task, and what tuning and comparing will take."""

from __future__ import annotations

import copy
import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from rich.console import Console
from rich.text import Text
from torch import nn
from torch.optim import Optimizer

from flatmin.lab.costs import TRIALS, TUNING_SEEDS, Cost, costs
from flatmin.lab.display import print_columns
from flatmin.lab.folder import check_counts, locked
from flatmin.lab.parts import split_name
from flatmin.lab.pool import IF_STOPPED, check_importing
from flatmin.lab.records import environment, make_writable, write_json
from flatmin.lab.script import forget
from flatmin.lab.strength import Strength, Strengths, radius_for
from flatmin.lab.tasks import Settings, Splits, Task, get_task
from flatmin.lab.tasks.check import check_task
from flatmin.lab.train import RunSpec, build_optimizer, run_name, shuffled
from flatmin.lab.tuned import FIRST_SEED
from flatmin.lab.walk import Point, place, rounded, walk
from flatmin.lab.weights import load_weights

FORMAT = "flatmin-suggest/1"
# Where to look: |d| / |w| of an ascent, and the rise of the loss in noise over the loss.
MOVED = (0.005, 0.01, 0.02, 0.04)
RISES = (0.01, 0.1, 1.0, 10.0)
# Times the control's learning rate (a perturbed method often takes a larger one) and weight decay.
AROUND = ((0.5, 1.0, 2.0, 4.0), (0.0, 0.3, 1.0, 3.0))
NUM_BATCHES, NUM_SEEDS = 8, 2


@dataclass(kw_only=True)
class Suggest:
    """Say which learning rates and radii to try on a task, and what tuning and comparing will take.

    Looks for a learning rate and weight decay of the control (some ten settings, two seeds), and then at the end of its
    best run: how far each method moves the weights for a radius, how much the loss of a mini-batch rises there, and
    what a step takes. Prints a command `flatmin tune` with a grid for each method. It says where to look; what is best
    is for `tune` to find.
    """

    task: str = "digits"
    """Data, model and loss: a name (see: flatmin tasks), or a Python file that makes one Task."""
    methods: tuple[str, ...] = ("base", "sam", "nso-one-point", "nso")
    """Methods, by name; the first is the control."""
    lr: float = 0.03
    """Learning rate of the control to begin with."""
    weight_decay: float = 1e-3
    """Its weight decay to begin with; at 0 none is tried."""
    num_gradients: int | None = None
    """Mini-batch gradients of a run. Default: the task's."""
    num_seeds: int = 10
    """Seeds of the comparison whose time is told."""
    out: Path | None = None
    """Where the runs and suggest.json are written. Default: runs/suggest-<task>."""
    jobs: int = 2
    """Runs at the same time, here and in what is told."""
    if_stopped: ClassVar[str] = IF_STOPPED

    def run(self) -> None:
        """Trains, looks, prints, and writes suggest.json.

        Raises:
            ValueError: for an unknown task or method, a control with a radius, or one that diverges at all rates.
        """
        forget()
        task = get_task(self.task)
        self._check()
        check_importing()
        check_task(task, FIRST_SEED)
        folder = Path("runs") / f"suggest-{task.name}" if self.out is None else self.out
        make_writable(folder)
        with locked(folder):
            self._run(task, folder)

    def _check(self) -> None:
        check_counts(num_seeds=self.num_seeds, jobs=self.jobs, num_gradients=self.num_gradients)
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"--methods names at least one method, and none twice, got {' '.join(self.methods)!r}.")
        if split_name(self.methods[0])[0].radius_name is not None:
            raise ValueError(f"the first of --methods is the control and has no radius, got {self.methods[0]}.")
        Settings(lr=self.lr, weight_decay=self.weight_decay)
        for name in self.methods:
            split_name(name)[0].num_steps(self._budget)

    @property
    def _budget(self) -> int:
        return self.num_gradients or get_task(self.task).num_gradients

    def _run(self, task: Task, folder: Path) -> None:
        seeds = range(FIRST_SEED, FIRST_SEED + NUM_SEEDS)
        tried = walk((self.lr, self.weight_decay), partial(self._spec, self.methods[0]), seeds, folder, self.jobs)
        best = min(tried, key=lambda point: tried[point])
        if not math.isfinite(tried[best]):
            raise ValueError(
                f"{self.methods[0]} diverged at all learning rates near {self.lr:g}: begin with another --lr."
            )
        splits, model = task.splits(FIRST_SEED), task.build_model()
        load_weights(model, place(folder, best) / f"{run_name(self.methods[0], FIRST_SEED)}.safetensors")
        grids = {name: self._grid(task, splits, model, name) for name in self.methods[1:]}
        build = {name: partial(self._optimizer, name, _middle(grids.get(name)), splits) for name in self.methods}
        price = costs(task, splits, model, build, num_gradients=self._budget, num_seeds=self.num_seeds)
        command = self._command(best, grids)
        self._print(Console(), best, tried[best], grids, price, command)
        record = {
            "format": FORMAT,
            **environment(),
            "task": task.name,
            "num_gradients": self._budget,
            "control": [{"lr": lr, "weight_decay": wd, "validation_loss": loss} for (lr, wd), loss in tried.items()],
            "best": {"lr": best[0], "weight_decay": best[1]},
            "radii": {name: [asdict(strength) for strength in grid] for name, grid in grids.items()},
            "seconds": {name: asdict(cost) for name, cost in price.items()},
            "command": command,
        }
        write_json(folder / "suggest.json", record)
        print(f"all numbers: {folder / 'suggest.json'}")

    def _spec(self, method: str, settings: Settings, seed: int = FIRST_SEED) -> RunSpec:
        steps = split_name(method)[0].num_steps(self._budget)
        return RunSpec(task=self.task, method=method, seed=seed, num_steps=steps, settings=settings, measured=False)

    def _optimizer(self, method: str, radius: float | None, splits: Splits, model: nn.Module) -> Optimizer:
        settings = Settings(lr=self.lr, radius=radius, parts=split_name(method)[1])
        return build_optimizer(self._spec(method, settings), model, len(splits.train[1]))

    def _grid(self, task: Task, splits: Splits, model: nn.Module, method: str) -> list[Strength]:
        """Radii to try; none for a method without a radius, or one of whose radius nothing is seen."""
        rule = split_name(method)[0]
        if rule.radius_name is None:
            return []
        is_noise = rule.radius_name == "sigma"
        batches = list(itertools.islice(shuffled(splits.train, task.batch_size, FIRST_SEED), NUM_BATCHES))
        strengths = Strengths(
            model,
            copy.deepcopy(task.criterion),
            batches,
            lambda radius: self._optimizer(method, radius, splits, model),
            mirrored=is_noise,
        )
        default = self._optimizer(method, None, splits, model).param_groups[0][rule.radius_name]

        def value(radius: float) -> float:
            found = strengths.at(radius)
            return found.rise if is_noise else found.moved

        radii = [radius_for(target, value, default) for target in (RISES if is_noise else MOVED)]
        return [strengths.at(rounded(radius)) for radius in radii if radius is not None]

    def _command(self, best: Point, grids: Mapping[str, Sequence[Strength]]) -> str:
        """To tune, around what was found."""
        rates, decays = (
            [f"{rounded(x * factor):g}" for factor in factors] for x, factors in zip(best, AROUND, strict=True)
        )
        command = ["flatmin", "tune", "--task", self.task, "--methods", *self.methods]
        command += ["--lr", *rates, "--weight-decay", *decays]
        own = [f"{name}={','.join(f'{s.radius:g}' for s in grid)}" for name, grid in grids.items() if grid]
        budget = [] if self.num_gradients is None else ["--num-gradients", str(self.num_gradients)]
        return shlex.join([*command, *(["--radii", *own] if own else []), *budget])

    def _print(
        self,
        console: Console,
        best: Point,
        loss: float,
        grids: Mapping[str, Sequence[Strength]],
        price: Mapping[str, Cost],
        command: str,
    ) -> None:
        console.print(
            f"{self.methods[0]}: lr {best[0]:g}, weight decay {best[1]:g} (validation loss {loss:.4g}, {NUM_SEEDS} "
            "seeds). At the end of that run a radius moves the weights w by d, and the loss of a mini-batch rises:",
            highlight=False,
        )
        rows = [(name, strength) for name, grid in grids.items() for strength in grid]
        print_columns([name for name, _ in rows], _strengths([strength for _, strength in rows]), console)
        for name in grids:
            if not grids[name] and (radius := split_name(name)[0].radius_name):
                console.print(
                    f"{name}: no {radius} does so much and no more; tune takes its own --{radius}.", highlight=False
                )
        print_columns(list(price), _prices(price), console)
        tuning, comparison = (
            _time(sum(getattr(cost, kind) for cost in price.values()) / self.jobs) for kind in ("tuning", "comparison")
        )
        console.print(
            f"On {self.jobs} process{'es' if self.jobs > 1 else ''}: about {tuning} to tune ({TRIALS} settings x "
            f"{TUNING_SEEDS} seeds each), {comparison} to compare ({self.num_seeds} seeds, measured).\nWhere to look:",
            highlight=False,
        )
        print(command)


def _strengths(found: Sequence[Strength]) -> list[tuple[str, list[Text]]]:
    rises = [f"{s.rise:.2g}" if s.rise < 10 else f"{s.rise:.0f}" for s in found]
    return [
        ("radius", [Text(f"{s.radius:g}") for s in found]),
        ("|d| / |w|", [Text(f"{s.moved:.1%}") for s in found]),
        ("rise / loss", [Text(rise) for rise in rises]),
    ]


def _prices(price: Mapping[str, Cost]) -> list[tuple[str, list[Text]]]:
    first = next(iter(price.values()))
    return [
        ("ms a step", [Text(f"{1000 * cost.step:.3g}") for cost in price.values()]),
        ("over the first", [Text(f"{cost.step / first.step:.2f}") for cost in price.values()]),
        ("a run", [Text(_time(cost.run)) for cost in price.values()]),
    ]


def _middle(grid: Sequence[Strength] | None) -> float | None:
    return grid[len(grid) // 2].radius if grid else None


def _time(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"
