"""What a step costs a large model, by the cost model of benchmarks/collectives.py and stated assumptions.

Nothing here is measured: the counts are (there), the speeds are the makers' figures and the rest is arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.collectives import RULES, expected

PARAMETERS = 7e9
TOKENS_PER_GPU = 8192  # in a step
TOKENS = 20 * PARAMETERS  # of a run
FLOPS_PER_TOKEN = 6 * PARAMETERS  # forward and backward, without recomputation
SENT = 2  # bytes a number in collectives: bf16
KEPT = 4  # bytes a number of sharded weights, gradients and each of Adam's moments: fp32


@dataclass(frozen=True)
class Cluster:
    """A number of GPUs (H100 SXM by its maker's figures) and the slowest link between them."""

    gpus: int
    bandwidth: float  # bytes a second, in each direction, of one GPU
    flops: float = 989e12  # bf16, dense
    use: float = 0.4  # the part of it that training reaches
    memory_bandwidth: float = 3.35e12


CLUSTERS = (Cluster(8, 450e9), Cluster(256, 50e9))  # NVLink; 400 Gbit/s a GPU between machines

# name -> (evaluations of how much of the batch, copies of the weights inside a step); tests/contracts/test_10_memory.py
# holds the copies, tests/distributed the collectives.
COSTS: dict[str, tuple[float, int]] = {
    "base": (1, 0),
    "SAM, sync_ascent": (1, 1),
    "GSAM": (1, 4),
    "RSP": (1, 3),
    "MomentumSAM": (1, 1),
    "NSO": (1, 2),
    "NSO, split": (0.5, 2),
}


def step(name: str, cluster: Cluster) -> dict[str, float]:
    """Seconds and bytes of one step on one GPU under FSDP2, communication overlapped with arithmetic."""
    share, copies = COSTS[name]
    evaluations, sent = RULES[name][3], expected(name, "fsdp")
    arithmetic = evaluations * share * TOKENS_PER_GPU * FLOPS_PER_TOKEN / (cluster.flops * cluster.use)
    moved = (sent["all_gather"] + sent["reduce_scatter"]) * PARAMETERS * SENT * (cluster.gpus - 1) / cluster.gpus
    weights = KEPT * PARAMETERS / cluster.gpus
    # To and fro for each evaluation: read, write, and read what is added.
    moves = 6 * evaluations * weights / cluster.memory_bandwidth if copies else 0.0
    return {
        "seconds": max(arithmetic, moved / cluster.bandwidth) + moves,
        "arithmetic": arithmetic,
        "communication": moved / cluster.bandwidth,
        "moves": moves,
        "moved": moved,
        "state": 4 * weights,
        "extra": copies * weights,
    }


def table() -> str:
    """Rules by clusters, as Markdown."""
    lines = [
        "| rule | GPUs | GB sent | s arithmetic | s sending | ms moving weights | GB state | GB extra | days of a run "
        "| over base |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for cluster in CLUSTERS:
        base = step("base", cluster)["seconds"]
        for name in COSTS:
            cost = step(name, cluster)
            days = TOKENS / (TOKENS_PER_GPU * cluster.gpus) * cost["seconds"] / 86400
            lines.append(
                f"| {name} | {cluster.gpus} | {cost['moved'] / 1e9:.0f} | {cost['arithmetic']:.2f} "
                f"| {cost['communication']:.2f} | {1e3 * cost['moves']:.1f} | {cost['state'] / 1e9:.1f} "
                f"| {cost['extra'] / 1e9:.1f} | {days:.1f} | {cost['seconds'] / base:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
