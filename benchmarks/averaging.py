"""Time of a training step with an average of the weights over that of the plain step.

All variants take turns within each round, in CPU time of one thread. Beside the plain step runs one that updates an
`Averager` after it, and one that updates torch's `AveragedModel`; a ratio is formed within a round, and its median and
quartiles over rounds are reported. "plain again" is the noise of the measurement. Run with `make bench`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import flatmin
from benchmarks.models import WORKLOADS, Workload

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


def measure(workload: Workload, rounds: int) -> dict[str, dict[str, float]]:
    """Median and quartiles of time over that of the plain step, per variant."""
    steps = {name: _step(workload, make) for name, make in {"plain": lambda _: lambda: None, **VARIANTS}.items()}
    for step in steps.values():
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            for _ in range(workload.repeats):
                step()
            times[name].append(time.process_time() - start)
    found = {}
    for name in VARIANTS:
        low, median, high = np.percentile(np.array(times[name]) / np.array(times["plain"]), [25, 50, 75])
        found[name] = {"low": float(low), "median": float(median), "high": float(high)}
    return found


def markdown(results: dict[str, Any]) -> str:
    """The results as a table: median [quartiles] of time over that of the plain step."""
    workloads = results["workloads"]
    lines = ["| step time over a plain step | " + " | ".join(workloads) + " |", "|---" * (len(workloads) + 1) + "|"]
    for name in VARIANTS:
        cells = [f"{w[name]['median']:.2f} [{w[name]['low']:.2f}, {w[name]['high']:.2f}]" for w in workloads.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark and writes `results/averaging.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        "rounds": arguments.rounds,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, CPU, 1 thread",
        "workloads": {w.name: measure(w, arguments.rounds) for w in WORKLOADS},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    main()
