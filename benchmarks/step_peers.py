"""Time of a step over its bound, beside other libraries, in one interleaved run.

In an environment of their own:

    python3 -m venv peers
    peers/bin/pip install -c constraints.txt -e . pytorch-optimizer==4.1.0
    peers/bin/python -m benchmarks.step_peers --davda54 sam.py --nsm nsm.py

where sam.py is that of github.com/davda54/sam (commit 3c3afdb) and nsm.py that of
github.com/VirtuosoResearch/Noise-stability-optimization (commit bf11dc2, exps_on_graph_datasets/utils). Without the two
options only pytorch-optimizer is compared. The bound is that of `benchmarks/step.py`: the gradients that the method
needs, and one base step.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from benchmarks.models import WORKLOADS, Workload
from benchmarks.step import VARIANTS, K, pieces
from benchmarks.timing import Piece, Spread, interleaved, options, spread, table, write

RESULTS = Path(__file__).parent / "results" / "step_peers.json"
OURS = {name: VARIANTS[name] for name in ("SAM", "NSO (two-point)", "LookSAM, k = 5")}

# A peer's training step: (optimizer, backward) -> None, where `backward` evaluates the loss and its gradient.
Step = Callable[[Any, Callable[[], torch.Tensor]], None]


def _two_calls(optimizer: Any, backward: Callable[[], torch.Tensor]) -> None:
    backward()
    optimizer.first_step(zero_grad=True)
    backward()
    optimizer.second_step(zero_grad=True)


def _own_loop(optimizer: Any, backward: Callable[[], torch.Tensor]) -> None:
    """LookSAM as its documentation has it: the caller evaluates, then hands over a closure."""
    backward()
    optimizer.step(backward)
    optimizer.zero_grad()


def _published_nso(optimizer: Any, backward: Callable[[], torch.Tensor]) -> None:
    """The published trainer with a clean weight of 0: it evaluates at the weights all the same."""
    backward()
    optimizer.store_gradients(zero_grad=True, store_weights=True, update_weight=0.0)
    for first in (True, False):
        optimizer.first_step(zero_grad=True, store_perturb=first)
        backward()
        optimizer.store_gradients(zero_grad=True, store_weights=False, update_weight=0.5)
    optimizer.second_step(zero_grad=True)


def peers(davda54: Path | None, nsm: Path | None) -> dict[str, tuple[float, Callable[..., Any], Step]]:
    """Name -> gradients that the method needs, (params, base class, its options) -> optimizer, and its step."""
    found: dict[str, tuple[float, Callable[..., Any], Step]] = {}
    if davda54 is not None:
        sam = _load(davda54, "davda54_sam").SAM
        found["SAM of davda54"] = (2, lambda p, base, **o: sam(p, base, rho=0.05, **o), _two_calls)
    library = importlib.import_module("pytorch_optimizer")
    found["SAM of pytorch-optimizer"] = (2, lambda p, b, **o: library.SAM(p, b, rho=0.05, **o), _two_calls)
    found["LookSAM of pytorch-optimizer, k = 5"] = (
        1 + 1 / K,
        lambda p, base, **o: library.LookSAM(p, base, rho=0.05, k=K, **o),
        _own_loop,
    )
    if nsm is not None:
        published = _load(nsm, "published_nso").NSM
        found["NSO as published (clean weight 0)"] = (
            2,
            lambda p, b, **o: published(p, b, sigma=0.01, **o),
            _published_nso,
        )
    return found


def _load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _piece(workload: Workload, make: Callable[..., Any], step: Step) -> Piece:
    torch.manual_seed(0)
    inputs, criterion = workload.inputs(), nn.CrossEntropyLoss()
    targets = torch.randint(10, (len(inputs),))
    model = workload.build()
    base = workload.base(model)
    given = {name: base.defaults[name] for name in ("lr", "momentum", "betas", "weight_decay") if name in base.defaults}
    optimizer = make(model.parameters(), type(base), **given)

    def backward() -> torch.Tensor:
        loss = criterion(model(inputs), targets)
        loss.backward()
        return loss

    def repeated() -> None:
        for _ in range(K):
            step(optimizer, backward)

    return repeated


def measure(workload: Workload, rivals: dict[str, Any], rounds: int) -> dict[str, Spread]:
    """Median and quartiles of time over bound: ours and theirs."""

    def anew() -> dict[str, Piece]:
        theirs = {name: _piece(workload, make, step) for name, (_, make, step) in rivals.items()}
        return pieces(workload, OURS) | theirs

    times = interleaved(anew, rounds, workload.repeats)
    gradient, step = times["gradient"], times["base"] - times["gradient"]
    needed = {"SAM": 2.0, "NSO (two-point)": 2.0, "LookSAM, k = 5": 1 + 1 / K}
    needed |= {name: gradients for name, (gradients, _, _) in rivals.items()}
    return {name: spread(times[name] / (n * gradient + step)) for name, n in needed.items()}


def markdown(results: dict[str, Any]) -> str:
    """The results as a table; ours are the rows without "of" and "as"."""
    rows = dict.fromkeys(row for found in results["workloads"].values() for row in found)
    return table("step time over its bound", rows, results["workloads"])


def main() -> None:
    """Runs the benchmark and writes `results/peers.json`."""
    parser = options(__doc__, RESULTS)
    parser.add_argument("--davda54", type=Path, default=None)
    parser.add_argument("--nsm", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rivals = peers(arguments.davda54, arguments.nsm)
    workloads = {w.name: measure(w, rivals, arguments.rounds) for w in WORKLOADS}
    print(markdown(write(arguments.out, arguments.rounds, workloads=workloads)))


if __name__ == "__main__":
    main()
