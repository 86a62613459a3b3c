"""What the processes of a training step send each other, counted on 2 and 4 local processes, against a cost model.

    DDP      S all-reduces of all P numbers, S the synchronised gradients of a rule: its gradients, less those that may
             stay on their process (an ascent without `sync_ascent`, all but the last of a sum)
    FSDP2    for each evaluation two all-gathers (forward, backward) and one reduce-scatter of all P numbers
    both     single numbers: norms and inner products (FSDP2), whether all may step

The counts do not depend on the machine. Run: python -m benchmarks.collectives (a minute or two)
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.profiler import ProfilerActivity, profile

import flatmin

RESULTS = Path(__file__).parent / "results" / "collectives.json"
WORLD_SIZES = (2, 4)
WIDTH, DEPTH = 64, 6  # divisible by the world sizes: no padding, so that counts are exact

# name -> (method, options, gradients that DDP has to synchronise, evaluations of the model)
RULES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "base": ("base", {}, 1, 1),
    "SAM": ("sam", {}, 1, 2),
    "SAM, sync_ascent": ("sam", {"sync_ascent": True}, 2, 2),
    "MongeSAM": ("monge-sam", {}, 1, 2),
    "GSAM": ("gsam", {}, 2, 2),
    "RSP": ("rsp", {}, 2, 2),
    "MomentumSAM": ("momentum-sam", {}, 1, 1),
    "NSO": ("nso", {}, 1, 2),
    "NSO, k = 4": ("nso", {"num_perturbations": 4}, 1, 8),
    "NSO, split": ("nso-split", {}, 1, 2),
}

# torch's name of a collective -> ours, and which of its arguments says how many numbers it is about.
_WITH_SHAPE = {
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::_allgather_base_": ("all_gather", 0),
}


class Collectives:
    """Counts, by torch's profiler, the collectives that this process takes part in, over gloo.

    Attributes:
        sizes: for "all_reduce", "reduce_scatter" and "all_gather" how often each number of elements occurred.
    """

    def __init__(self) -> None:
        self._profile: Any = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self.sizes: dict[str, Counter[int]] = {}

    def __enter__(self) -> Collectives:
        self._profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._profile.__exit__(*error)
        sizes: dict[str, Counter[int]] = {"all_reduce": Counter(), "reduce_scatter": Counter(), "all_gather": Counter()}
        for event in self._profile.events():
            if event.name in _WITH_SHAPE:
                name, argument = _WITH_SHAPE[event.name]
                sizes[name][math.prod(event.input_shapes[argument])] += 1
            elif event.name == "gloo:all_reduce":
                sizes["all_reduce"][math.prod(event.input_shapes[0])] += 1
        sizes["all_reduce"] -= sizes["reduce_scatter"]  # gloo scatters what it has reduced everywhere
        self.sizes = sizes

    def count(self, name: str, *, single: bool = False) -> int:
        """Collectives of this name about more than one number; with `single`, about one."""
        return sum(count for size, count in self.sizes[name].items() if (size == 1) == single)

    def elements(self, name: str) -> int:
        """Numbers that these collectives were about, together."""
        return sum(size * count for size, count in self.sizes[name].items())


def _model(how: str, world_size: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)])
    if how == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _count(name: str, how: str, world_size: int) -> dict[str, Any]:
    """The collectives of one step in the loop form, once everything is set up."""
    method, options, _, _ = RULES[name]
    model = _model(how, world_size)
    base = SGD(model.parameters(), lr=0.01, momentum=0.9)
    optimizer: Any = flatmin.methods()[method].build(base, **options)
    x = torch.randn(8, WIDTH)

    def step() -> None:
        if method == "base":
            base.zero_grad()
            model(x).square().mean().backward()
        else:
            for probe in optimizer.probes():
                model(probe.take(x)).square().mean().backward()
        optimizer.step()

    for _ in range(2):
        step()
    with Collectives() as seen:
        step()
    return {name: {"numbers": seen.elements(name), "single": seen.count(name, single=True)} for name in seen.sizes}


def _serve(rank: int, world_size: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    found = {how: {name: _count(name, how, world_size) for name in RULES} for how in ("ddp", "fsdp")}
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    distributed.destroy_process_group()


def expected(name: str, how: str) -> dict[str, int]:
    """Numbers that a step sends by the cost model, over P; single numbers aside."""
    _, _, synchronised, evaluations = RULES[name]
    if how == "ddp":
        return {"all_reduce": synchronised, "all_gather": 0, "reduce_scatter": 0}
    return {"all_reduce": 0, "all_gather": 2 * evaluations, "reduce_scatter": evaluations}


def table(results: dict[str, Any]) -> str:
    """Measured numbers over P, and single numbers, as a Markdown table; all world sizes agree."""
    lines = [
        "| rule | evaluations | DDP: all-reduced | single | FSDP2: all-gathered | reduce-scattered | single |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    size = results["num_params"]
    for name, (_, _, _, evaluations) in RULES.items():
        cells = []
        for how, kinds in (("ddp", ["all_reduce"]), ("fsdp", ["all_gather", "reduce_scatter"])):
            found = [results["counts"][str(n)][how][name] for n in WORLD_SIZES]
            assert found[0] == found[1], f"{name} depends on the number of processes"
            single = found[0]["all_reduce"]["single"]
            for kind in kinds:
                numbers = found[0][kind]["numbers"] - (single if kind == "all_reduce" else 0)
                cells.append(f"{numbers / size:g} P")
            cells.append(str(single))
        lines.append(f"| {name} | {evaluations} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Counts everything and writes the results."""
    counts = {}
    for world_size in WORLD_SIZES:
        with tempfile.TemporaryDirectory() as folder:
            out = f"{folder}/counts.json"
            multiprocessing.spawn(_serve, (world_size, f"{folder}/store", out), nprocs=world_size)  # type: ignore[attr-defined]
            counts[str(world_size)] = json.loads(Path(out).read_text())
    results = {"torch": torch.__version__, "num_params": DEPTH * (WIDTH * WIDTH + WIDTH), "counts": counts}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
