"""Which settings to try: what three rules for 19 trials find, beside all 64 settings of a grid.

    python -m benchmarks.tuning_rules --case digits     half an hour on two processes; --case photos three times that

A method with a radius has three things to tune, four values each. Every setting of that grid is trained here, so that
what a rule would have chosen, and what was to be had, can both be looked up:

    radius first     learning rate x radius at the control's weight decay, then the other decays at the best of that
    decay first      learning rate x weight decay at the second radius, then the other radii at the best of that
    one at a time    from the second radius and the control's weight decay: all learning rates, the best of them; all
                     decays; all radii; and again, until nothing changes or 19 settings have been tried

A setting is chosen by some of the seeds, and its loss is that of the other seeds, averaged over ways to divide them:
what was chosen by chance does not count as found.

Fixed before anything was trained: another rule takes the place of the first if it loses less on average over the
methods of both cases, as a share of the best loss, and not a hundredth more than the first one for any of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flatmin.files import write_json
from flatmin.lab.budget import Budget
from flatmin.lab.records import environment
from flatmin.lab.tasks import Settings
from flatmin.lab.train import RunSpec
from flatmin.lab.tuning.trials import label, train_trials
from flatmin.lab.tuning.tuned import FIRST_SEED

RESULTS = Path(__file__).parent / "results" / "tuning_rules.json"
TRIALS, SPLITS = 19, 400
SECOND = 1  # the radius to begin with

Index = tuple[int, int, int]  # learning rate, weight decay, radius


@dataclass(frozen=True)
class Case:
    """A task and the grids of its methods: those of `flatmin suggest`, as the committed records have them.

    Attributes:
        task: its name.
        budget: of a run.
        lr: learning rates.
        weight_decay: weight decays.
        radii: method -> radii.
        num_seeds: of each setting.
        choosing: seeds of them that choose.
        controls: weight decays of the control; by the same seeds if there are none.
    """

    task: str
    budget: Budget
    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]
    radii: dict[str, tuple[float, ...]]
    num_seeds: int
    choosing: int
    controls: tuple[float, ...] = ()


SIGMAS = (0.013, 0.037, 0.076, 0.13)  # of noise, on the digits
CASES = {
    "digits": Case(
        "digits",
        Budget(2000),
        (0.033, 0.066, 0.14, 0.29),
        (0.0, 0.0003, 0.001, 0.003),
        {"sam": (0.069, 0.13, 0.2, 0.29), "nso-one-point": SIGMAS, "nso": SIGMAS},
        num_seeds=10,
        choosing=5,
    ),
    "photos": Case(
        "solar-cells",
        Budget(800),
        (0.00067, 0.0014, 0.0029, 0.0058),
        (0.01, 0.03, 0.1, 0.3),
        {"sam": (0.022, 0.06, 0.17, 0.5), "nso": (0.0029, 0.0085, 0.017, 0.031)},
        num_seeds=3,
        choosing=2,
        controls=(0.1, 0.03),  # of 800 gradients, and of 400 steps: the same runs of these two
    ),
}


def train(case: Case, folder: Path, jobs: int) -> dict[str, Any]:
    """Validation losses of every setting: method -> (rates, decays, radii, seeds); the control has one radius."""
    methods = {**({} if case.controls else {"base": (None,)}), **case.radii}
    return {method: _grid(case, method, radii, folder, jobs).tolist() for method, radii in methods.items()}


def _grid(case: Case, method: str, radii: tuple[float | None, ...], folder: Path, jobs: int) -> np.ndarray:
    settings = [
        Settings(lr=lr, weight_decay=decay, radius=radius)
        for lr, decay, radius in itertools.product(case.lr, case.weight_decay, radii)
    ]
    found = train_trials(
        settings,
        lambda one, seed: RunSpec(
            task=case.task,
            method=method,
            seed=seed,
            num_steps=case.budget.num_steps(method),
            settings=one,
            measured=False,
        ),
        range(FIRST_SEED, FIRST_SEED + case.num_seeds),
        lambda one: folder / f"{method}-{label(one)}",
        jobs=jobs,
        title=method,
    )
    losses = [[result.get("validation_loss", np.inf) for result in results] for results in found]
    return np.array(losses).reshape(len(case.lr), len(case.weight_decay), len(radii), case.num_seeds)


class Tried:
    """The losses that a rule has asked for, so that no setting counts twice and none beyond the 19th is seen."""

    def __init__(self, losses: np.ndarray):
        self._losses = losses
        self.seen: dict[Index, float] = {}

    def best(self, *settings: Index) -> Index:
        """The best of these and of all before."""
        for setting in settings:
            if len(self.seen) < TRIALS:
                self.seen.setdefault(setting, float(self._losses[setting]))
        return min(self.seen, key=lambda setting: self.seen[setting])


def _line(at: Index, axis: int) -> list[Index]:
    """The four settings that differ from `at` along one axis only."""
    lr, decay, radius = at
    return [[(i, decay, radius), (lr, i, radius), (lr, decay, i)][axis] for i in range(4)]


def radius_first(tried: Tried, decay: int) -> Index:
    """Today's rule but for what it does where there are no decays."""
    best = tried.best(*((lr, decay, radius) for lr, radius in itertools.product(range(4), range(4))))
    return tried.best(*_line(best, 1))


def decay_first(tried: Tried, decay: int) -> Index:
    """The control's decay plays no part."""
    best = tried.best(*((lr, one, SECOND) for lr, one in itertools.product(range(4), range(4))))
    return tried.best(*_line(best, 2))


def one_at_a_time(tried: Tried, decay: int) -> Index:
    """Along each axis in turn."""
    at, before = (0, decay, SECOND), None
    while len(tried.seen) < TRIALS and at != before:
        before = at
        for axis in (0, 1, 2):
            at = tried.best(*_line(at, axis))
    return at


RULES = {"radius first": radius_first, "decay first": decay_first, "one at a time": one_at_a_time}


def judge(case: Case, losses: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Method -> what its choices lose: by rule, the mean held-out loss less that of the best of all 64 settings.

    Both are chosen by the same seeds. A rule may come out below 0: of more settings more is chosen by chance.
    """
    splits = list(_splits(case))
    return {name: _judged(case, np.array(losses[name]), losses.get("base"), splits) for name in case.radii}


def _splits(case: Case) -> Iterator[list[int]]:
    ways = list(itertools.combinations(range(case.num_seeds), case.choosing))
    rng = np.random.default_rng(0)
    yield from ([*ways[i]] for i in rng.permutation(len(ways))[:SPLITS])


def _judged(case: Case, losses: np.ndarray, control: Any, splits: list[list[int]]) -> dict[str, Any]:
    found: dict[str, list[float]] = {name: [] for name in RULES}
    for chosen_by in splits:
        others = [i for i in range(case.num_seeds) if i not in chosen_by]
        chosen, judged = losses[..., chosen_by].mean(-1), losses[..., others].mean(-1)
        best = judged[np.unravel_index(chosen.argmin(), chosen.shape)]
        for name, rule in RULES.items():
            picked = [rule(Tried(chosen), decay) for decay in _decays(case, control, chosen_by)]
            found[name].append(float(np.mean([judged[index] for index in picked]) - best))
    of_all = losses.mean(-1)
    return {
        "best": float(of_all.min()),
        "held_out": {name: float(np.mean(lost)) for name, lost in found.items()},
    }


def _decays(case: Case, control: Any, chosen_by: list[int]) -> list[int]:
    """The control's best weight decays: of those seeds, or as the case says."""
    if case.controls:
        return [case.weight_decay.index(decay) for decay in case.controls]
    chosen = np.array(control)[..., chosen_by].mean(-1)
    return [int(np.unravel_index(chosen.argmin(), chosen.shape)[1])]


def table(record: dict[str, Any]) -> str:
    """What is lost, as Markdown."""
    rows = [f"| | best of 64 | {' | '.join(RULES)} |", "|---" + "|---:" * (len(RULES) + 1) + "|"]
    for case, of_case in record["cases"].items():
        for method, found in judge(CASES[case], of_case).items():
            cells = [f"{found['held_out'][rule]:+.4f}" for rule in RULES]
            rows.append(f"| {case}, {method} | {found['best']:.4f} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Trains what is not trained yet, and writes `results/tuning_rules.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs") / "tuning-rules")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    before = json.loads(given.out.read_text()) if given.out.exists() else {"cases": {}}
    found = train(CASES[given.case], given.folder / given.case, given.jobs)
    record = {**environment(), "cases": before["cases"] | {given.case: found}}
    write_json(given.out, record)
    print(table(record))


if __name__ == "__main__":
    main()
