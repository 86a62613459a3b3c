"""What runs of a task take: seconds of a step of each method, timed in turns, and what follows for whole runs."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from flatmin.lab.budget import Budget
from flatmin.lab.flatness import flatness_of
from flatmin.lab.tasks import Splits, Task
from flatmin.lab.train import num_progress, one_thread, scores_of, shuffled, to_training
from flatmin.lab.tuning.further import number_further
from flatmin.lab.tuning.standing import Standing
from flatmin.lab.tuning.tune import Tune

SECONDS, ROUNDS = 0.1, 7  # of steps in each round, and how many rounds
NUM_TRIALS = len(Tune.lr) * len(Tune.weight_decay) + number_further(Tune.lr, Tune.weight_decay)  # by default
NUM_TUNING_SEEDS = Tune.num_seeds


@dataclass(frozen=True)
class Cost:
    """Seconds that a method takes, on one process.

    Attributes:
        step: one step; the median over rounds.
        run: the steps of one run.
        tuning: all trials, each with its scores.
        comparison: all runs, with the scores on the way and the measuring at the end of each.
    """

    step: float
    run: float
    tuning: float
    comparison: float


def costs(
    task: Task,
    splits: Splits,
    model: nn.Module,
    build: Mapping[str, Callable[[nn.Module], Standing]],
    *,
    budget: Budget,
    num_seeds: int,
) -> dict[str, Cost]:
    """What each method takes, on one thread as `train` runs.

    Args:
        task: whose loss and batch size.
        splits: its data.
        model: trained; steps are taken by copies of it.
        build: method -> (model -> the method at its weights).
        budget: of a run.
        num_seeds: of the comparison.
    """
    with one_thread():
        own, criterion = copy.deepcopy(model), copy.deepcopy(task.criterion)  # both may have a state
        scoring = _seconds(lambda: scores_of(own, criterion, splits._asdict()))
        measuring = _seconds(lambda: flatness_of(own, criterion, splits.train, 0))
        steps = _seconds_of_steps(task, splits, model, build)
    found = {}
    for name, seconds in steps.items():
        run = seconds * budget.num_steps(name)
        ending = num_progress(task, splits, budget.num_gradients(name)) * scoring + measuring
        trials = NUM_TRIALS * NUM_TUNING_SEEDS
        found[name] = Cost(seconds, run, (run + scoring) * trials, (run + ending) * num_seeds)
    return found


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _seconds_of_steps(
    task: Task, splits: Splits, model: nn.Module, build: Mapping[str, Callable[[nn.Module], Standing]]
) -> dict[str, float]:
    """The median over rounds, in each of which all methods have their turn."""
    turns = {name: _steps(task, splits, copy.deepcopy(model), make) for name, make in build.items()}
    for turn in turns.values():
        turn()  # the first step allocates
    rounds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(ROUNDS):
        for name, turn in turns.items():
            count, begin, passed = 0, time.perf_counter(), 0.0
            while passed < SECONDS:
                turn()
                count, passed = count + 1, time.perf_counter() - begin
            rounds[name].append(passed / count)
    return {name: statistics.median(found) for name, found in rounds.items()}


def _steps(task: Task, splits: Splits, model: nn.Module, make: Callable[[nn.Module], Standing]) -> Callable[[], None]:
    """A function that takes one step, after which the weights are as before, so that nothing diverges."""
    to_training(model)
    standing, batches = make(model), shuffled(splits.train, task.batch_size, 0)
    return lambda: standing.step(next(batches))
