"""Time of a step over its bound: the gradients that the method needs, and one base step.

    bound(n) = n (zero_grad + forward + backward) + one base step

All variants take turns within each round, in CPU time of one thread; a ratio is formed within a round, and its median
and quartiles over rounds are reported. Run with `make bench` (about two minutes), or `--rounds 5` for a quick look.
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

import flatmin
from benchmarks.models import WORKLOADS, Workload

RESULTS = Path(__file__).parent / "results" / "step.json"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "SAM": ("sam", {}),
    "NSO (two-point)": ("nso", {}),
    "NSO, low_memory": ("nso", {"low_memory": True}),
    "NSO (one-point)": ("nso-one-point", {}),
}


def _pieces(workload: Workload) -> dict[str, Callable[[], Any]]:
    """What is timed: the bare pieces of the bound, the base step, and each method's step."""
    torch.manual_seed(0)
    inputs, criterion = workload.inputs(), nn.CrossEntropyLoss()
    targets = torch.randint(10, (len(inputs),))

    def evaluation(model: nn.Module, zero_grad: Callable[[], None]) -> Callable[[], torch.Tensor]:
        def closure() -> torch.Tensor:
            zero_grad()
            loss = criterion(model(inputs), targets)
            loss.backward()
            return loss

        return closure

    model = workload.build()
    base = workload.base(model)
    gradient = evaluation(model, base.zero_grad)

    def base_step() -> None:
        gradient()
        base.step()

    pieces: dict[str, Callable[[], Any]] = {"gradient": gradient, "base": base_step}
    for name, (method, options) in VARIANTS.items():
        model = workload.build()
        optimizer: Any = flatmin.methods()[method].build(workload.base(model), **options)
        closure = evaluation(model, optimizer.zero_grad)
        pieces[name] = lambda optimizer=optimizer, closure=closure: optimizer.step(closure)
    return pieces


def measure(workload: Workload, rounds: int) -> dict[str, dict[str, float]]:
    """Median and quartiles of time over bound, per variant."""
    pieces = _pieces(workload)
    for piece in pieces.values():
        piece()
    times: dict[str, list[float]] = {name: [] for name in pieces}
    for _ in range(rounds):
        for name, piece in pieces.items():
            start = time.process_time()
            for _ in range(workload.repeats):
                piece()
            times[name].append(time.process_time() - start)
    gradient, base = np.array(times["gradient"]), np.array(times["base"])
    found = {}
    for name, (method, _) in VARIANTS.items():
        bound = flatmin.methods()[method].gradients * gradient + (base - gradient)
        low, median, high = np.percentile(np.array(times[name]) / bound, [25, 50, 75])
        found[name] = {"low": float(low), "median": float(median), "high": float(high)}
    return found


def markdown(results: dict[str, Any]) -> str:
    """The results as a table: median [quartiles] of time over bound."""
    workloads = results["workloads"]
    lines = ["| step time over its bound | " + " | ".join(workloads) + " |", "|---" * (len(workloads) + 1) + "|"]
    for name in VARIANTS:
        cells = [f"{w[name]['median']:.2f} [{w[name]['low']:.2f}, {w[name]['high']:.2f}]" for w in workloads.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark and writes `results/step.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    workloads = {w.name: measure(w, arguments.rounds) for w in WORKLOADS}
    results = {
        "rounds": arguments.rounds,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, CPU, 1 thread",
        "workloads": workloads,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    main()
