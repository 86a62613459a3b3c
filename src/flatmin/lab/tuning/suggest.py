"""`flatmin suggest`: which learning rates and radii to try on a task, and what tuning and comparing will take."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from rich.console import Console
from torch import nn

from flatmin.curvature import Objective
from flatmin.files import write_json
from flatmin.lab.budget import Kind
from flatmin.lab.folder import check_counts, locked
from flatmin.lab.parts import split_name
from flatmin.lab.pool import IF_STOPPED, check_importing
from flatmin.lab.records import environment, make_writable
from flatmin.lab.script import forget
from flatmin.lab.tasks import Settings, Splits, Task, get_task
from flatmin.lab.tasks.check import check_task
from flatmin.lab.train import RunSpec, build_optimizer, run_name, shuffled, training_of
from flatmin.lab.tuning.advice import Advice
from flatmin.lab.tuning.costs import Cost, costs
from flatmin.lab.tuning.standing import Standing
from flatmin.lab.tuning.strength import Strength, Strengths, radius_for
from flatmin.lab.tuning.trials import label, train_trials, validation_loss
from flatmin.lab.tuning.tune import Tune
from flatmin.lab.tuning.tuned import FIRST_SEED
from flatmin.lab.tuning.walk import Walk, rounded, walk
from flatmin.lab.weights import load_weights

FORMAT = "flatmin-suggest/1"
# Where to look: at the radii at which the loss of a mini-batch rises by so much of the control's validation loss.
RISES = {"rho": (0.03, 0.1, 0.3, 1.0), "sigma": (0.003, 0.03, 0.3, 3.0)}
NUM_BATCHES, SEEDS = 8, range(FIRST_SEED, FIRST_SEED + 2)


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
    """Its weight decay to begin with; at 0 it stays there."""
    budget: Kind = "gradients"
    """What is to be equal between methods: mini-batch gradients, or steps."""
    num_gradients: int | None = None
    """Mini-batch gradients of a run, or steps with --budget steps. Default: the task's."""
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
            ValueError: for an unknown task or method, a control with a radius, or one that diverges everywhere.
        """
        forget()
        task = get_task(self.task)
        check_counts(num_seeds=self.num_seeds)
        Settings(lr=self.lr, weight_decay=self.weight_decay)
        self._tuning.check()
        check_importing()
        check_task(task, FIRST_SEED)
        folder = Path("runs") / f"suggest-{task.name}" if self.out is None else self.out
        make_writable(folder)
        with locked(folder):
            advice = self._advice(task, folder)
        equal = self._tuning.equal
        budget = {"budget": equal.kind, "num_gradients": equal.amount}
        record = {"format": FORMAT, **environment(), "task": task.name, **budget}
        write_json(folder / "suggest.json", {**record, **advice.to_dict()})
        advice.print(Console(), self.num_seeds)
        print(f"all numbers: {folder / 'suggest.json'}")

    @property
    def _tuning(self) -> Tune:
        """What will be tuned, but for the grids."""
        return Tune(
            task=self.task,
            methods=self.methods,
            budget=self.budget,
            num_gradients=self.num_gradients,
            jobs=self.jobs,
        )

    def _advice(self, task: Task, folder: Path) -> Advice:
        splits, model = task.splits(FIRST_SEED), task.model(FIRST_SEED)
        untrained = Objective(model, copy.deepcopy(task.criterion), [splits.validation]).loss()
        found = self._walk(folder, untrained)
        if not math.isfinite(found.tried[found.best]):
            raise ValueError(f"{self.methods[0]} diverged at all rates near {self.lr:g}: begin at another --lr.")
        best = self._place(folder, self._settings(self.methods[0], *found.best))
        load_weights(model, best / f"{run_name(self.methods[0], FIRST_SEED)}.safetensors")
        unit = found.tried[found.best]
        grids = {name: self._grid(task, splits, model, name, unit) for name in self.methods[1:]}
        return Advice(
            walk=found,
            walk_seeds=len(SEEDS),
            untrained=untrained,
            grids=grids,
            price=self._price(task, splits, model, grids),
            tuning=self._tuning,
        )

    def _walk(self, folder: Path, untrained: float) -> Walk:
        control = self.methods[0]

        def losses(points: Sequence[tuple[float, float]]) -> list[float]:
            found = train_trials(
                [self._settings(control, *point) for point in points],
                partial(self._spec, control),
                SEEDS,
                partial(self._place, folder),
                jobs=self.jobs,
                title=f"{folder} {control}: lr, weight decay",
            )
            return [validation_loss(results) for results in found]

        return walk(self.lr, self.weight_decay, losses, untrained)

    @staticmethod
    def _place(folder: Path, settings: Settings) -> Path:
        return folder / label(settings)

    def _settings(self, method: str, lr: float, decay: float = 0.0, radius: float | None = None) -> Settings:
        return Settings(lr=lr, weight_decay=decay, radius=radius, parts=split_name(method)[1])

    def _spec(self, method: str, settings: Settings, seed: int) -> RunSpec:
        steps = self._tuning.equal.num_steps(method)
        return RunSpec(task=self.task, method=method, seed=seed, num_steps=steps, settings=settings, measured=False)

    def _standing(self, task: Task, splits: Splits, method: str, radius: float | None, model: nn.Module) -> Standing:
        """The method at the weights of the model; `None` is its default radius."""
        spec = self._spec(method, self._settings(method, self.lr, radius=radius), FIRST_SEED)
        training = training_of(spec, model, copy.deepcopy(task.criterion), splits)
        return Standing(model, training, build_optimizer(spec, model, len(splits.train[1])))

    def _grid(self, task: Task, splits: Splits, model: nn.Module, method: str, unit: float) -> list[Strength]:
        """Radii to try; none for a method without a radius, or where not four of them do what is looked for."""
        rule = split_name(method)[0]
        if rule.radius_name is None:
            return []
        batches = list(itertools.islice(shuffled(splits.train, task.batch_size, FIRST_SEED), NUM_BATCHES))
        build, criterion = partial(self._standing, task, splits, method), copy.deepcopy(task.criterion)
        is_noise = rule.radius_name == "sigma"
        strengths = Strengths(model, criterion, batches, build, unit=unit, mirrored=is_noise)
        radii = [radius_for(target, lambda radius: strengths.at(radius).rise) for target in RISES[rule.radius_name]]
        found = sorted({rounded(radius) for radius in radii if radius is not None})
        return [strengths.at(radius) for radius in found] if len(found) == len(radii) else []

    def _price(self, task: Task, splits: Splits, model: nn.Module, grids: dict[str, list[Strength]]) -> dict[str, Cost]:
        middle = {name: grid[len(grid) // 2].radius for name, grid in grids.items() if grid}
        build = {name: partial(self._standing, task, splits, name, middle.get(name)) for name in self.methods}
        return costs(task, splits, model, build, budget=self._tuning.equal, num_seeds=self.num_seeds)
