"""Time of a training step with an average of the weights over that of the plain step.

All variants take turns within each round, in CPU time of one thread. Beside the plain step runs one that updates an
`Averager` after it, and one that updates torch's `AveragedModel`; a ratio is formed within a round, and its median and
quartiles over rounds are reported. "plain again" is the noise of the measurement. Run with `make bench`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import flatmin
from benchmarks.models import WORKLOADS, Workload
from benchmarks.timing import Spread, interleaved, options, spread, table, write

RESULTS = Path(__file__).parent / "results" / "averaging.json"


def _ours(kind: Any) -> Callable[[nn.Module], Callable[[], None]]:
    return lambda model: flatmin.Averager(model, kind).update


def _torch(**options: Any) -> Callable[[nn.Module], Callable[[], None]]:
    def make(model: nn.Module) -> Callable[[], None]:
        average = AveragedModel(model, **options)
        return lambda: average.update_parameters(model)

    return make


VARIANTS: dict[str, Callable[[nn.Module], Callable[[], None]]] = {
    "plain again": lambda _: lambda: None,
    "Averager, mean": _ours("mean"),
    "Averager, ema": _ours("ema"),
    "AveragedModel, mean": _torch(),
    "AveragedModel, ema": _torch(multi_avg_fn=get_ema_multi_avg_fn()),
}


def _step(workload: Workload, make_update: Callable[[nn.Module], Callable[[], None]]) -> Callable[[], None]:
    """A training step followed by an update of the average."""
    torch.manual_seed(0)
    inputs, criterion = workload.inputs(), nn.CrossEntropyLoss()
    targets = torch.randint(10, (len(inputs),))
    model = workload.build()
    base, update = workload.base(model), make_update(model)

    def step() -> None:
        base.zero_grad()
        criterion(model(inputs), targets).backward()
        base.step()
        update()

    return step


def measure(workload: Workload, rounds: int) -> dict[str, Spread]:
    """Median and quartiles of time over that of the plain step, per variant."""
    variants = {"plain": lambda _: lambda: None, **VARIANTS}
    times = interleaved(
        lambda: {name: _step(workload, make) for name, make in variants.items()}, rounds, 5 * workload.repeats
    )
    return {name: spread(times[name] / times["plain"]) for name in VARIANTS}


def markdown(results: dict[str, Any]) -> str:
    """The results as a table: median [quartiles] of time over that of the plain step."""
    return table("step time over a plain step", VARIANTS, results["workloads"])


def main() -> None:
    """Runs the benchmark and writes `results/averaging.json`."""
    arguments = options(__doc__, RESULTS).parse_args()
    torch.set_num_threads(1)
    workloads = {w.name: measure(w, arguments.rounds) for w in WORKLOADS}
    print(markdown(write(arguments.out, arguments.rounds, workloads=workloads)))


if __name__ == "__main__":
    main()
