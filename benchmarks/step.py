"""Time of a step over its bound: the gradients that the method needs, and one base step.

    bound(n) = n (zero_grad + forward + backward) + one base step

All variants take turns within each round, in CPU time of one thread, and are made anew every few rounds; a ratio is
formed within a round, and its median and quartiles over rounds are reported. Run with `make bench` (ten minutes), or
`--rounds 5` for a quick look.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

import flatmin
from benchmarks.models import LARGE_BATCHES, WORKLOADS, Workload
from benchmarks.special import Special
from benchmarks.timing import Piece, Spread, interleaved, options, spread, table, write

RESULTS = Path(__file__).parent / "results" / "step.json"
K = 5  # LookSAM takes its second gradient at every fifth step
NAMED = "the model"  # stands for the model of the workload
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "SAM": ("sam", {}),
    "SAM, model named": ("sam", {"model": NAMED}),
    "NSO (two-point)": ("nso", {}),
    "NSO, signs as noise": ("nso", {"law": "rademacher"}),
    "NSO, low_memory": ("nso", {"low_memory": True}),
    "NSO (one-point)": ("nso-one-point", {}),
    "LookSAM, k = 5": ("looksam", {"k": K}),
}
OWN = {"SAM, a function of its own": 2, "NSO, a function of its own": 2}  # see benchmarks.special
SPLIT: dict[str, tuple[str, dict[str, Any]]] = {"NSO, split_batch": ("nso-split", {})}
Variants = dict[str, tuple[str, dict[str, Any]]]


def pieces(workload: Workload, variants: Variants) -> dict[str, Piece]:
    """What is timed, K steps each: the bare gradient, the base step, and each method's step."""
    torch.manual_seed(0)
    inputs, criterion = workload.inputs(), nn.CrossEntropyLoss()
    targets = torch.randint(10, (len(inputs),))

    def bare(step: bool) -> Piece:
        model = workload.build()
        base = workload.base(model)

        def piece() -> None:
            base.zero_grad()
            criterion(model(inputs), targets).backward()
            if step:
                base.step()

        return piece

    def stepping(method: str, given: dict[str, Any]) -> Piece:
        model = workload.build()
        options = {name: model if value is NAMED else value for name, value in given.items()}
        optimizer: Any = flatmin.methods()[method].build(workload.base(model), **options)
        take = optimizer.take if optimizer.needs_take else lambda *batch: batch

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            x, y = take(inputs, targets)
            loss = criterion(model(x), y)
            loss.backward()
            return loss

        return lambda: optimizer.step(closure)

    found = {"gradient": bare(False), "base": bare(True)}
    found |= {name: stepping(method, given) for name, (method, given) in variants.items()}
    if "SAM" in variants:
        found |= {name: _own(workload, inputs, targets, name.startswith("NSO")) for name in OWN}
    return {name: _times(K, piece) for name, piece in found.items()}


def _own(workload: Workload, inputs: torch.Tensor, targets: torch.Tensor, noisy: bool) -> Piece:
    model, criterion = workload.build(), nn.CrossEntropyLoss()
    special = Special(model, workload.base(model))

    def closure() -> torch.Tensor:
        special.clear()
        loss = criterion(model(inputs), targets)
        loss.backward()
        return loss

    return (lambda: special.nso(closure)) if noisy else (lambda: special.sam(closure))


def _times(number: int, piece: Piece) -> Piece:
    def repeated() -> None:
        for _ in range(number):
            piece()

    return repeated


def measure(workload: Workload, variants: Variants, rounds: int) -> dict[str, Spread]:
    """Median and quartiles of time over bound, per variant."""
    times = interleaved(lambda: pieces(workload, variants), rounds, workload.repeats)
    gradient, step = times["gradient"], times["base"] - times["gradient"]
    needed = {name: _gradients(method, given) for name, (method, given) in variants.items()} | OWN
    return {name: spread(times[name] / (n * gradient + step)) for name, n in needed.items() if name in times}


def _gradients(method: str, given: dict[str, Any]) -> float:
    return 1 + 1 / given["k"] if method == "looksam" else flatmin.methods()[method].gradients


def markdown(results: dict[str, Any]) -> str:
    """The results as a table: median [quartiles] of time over bound."""
    return table("step time over its bound", [*VARIANTS, *OWN, *SPLIT], results["workloads"])


def measured(name: str, rounds: int) -> dict[str, Spread]:
    """What there is to measure on the workload of that name."""
    torch.set_num_threads(1)
    workload = next(w for w in (*WORKLOADS, *LARGE_BATCHES) if w.name == name)
    return measure(workload, SPLIT if workload in LARGE_BATCHES else VARIANTS, rounds)


def main() -> None:
    """Runs the benchmark and writes `results/step.json`."""
    parser = options(__doc__, RESULTS, rounds=21)
    parser.add_argument("--case", default="", help="only the networks whose name begins so; the others are kept")
    arguments = parser.parse_args()
    names = [w.name for w in (*WORKLOADS, *LARGE_BATCHES) if w.name.startswith(arguments.case)]
    adds = arguments.case and arguments.out.exists()
    before = json.loads(arguments.out.read_text()) if adds else {"workloads": {}}
    # Each in a process of its own: what earlier ones have left in the allocator changes the times of later ones.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as process:
        found = process.map(measured, names, itertools.repeat(arguments.rounds))
        workloads = before["workloads"] | dict(zip(names, found, strict=True))
    fewest = min(arguments.rounds, before.get("rounds", arguments.rounds))
    print(markdown(write(arguments.out, fewest, workloads=workloads)))


if __name__ == "__main__":
    main()
