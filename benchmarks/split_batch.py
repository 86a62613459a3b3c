"""What NSO gives up when each of its two points gets half of the batch: the variance of its direction, at equal cost.

On the digits network, after training, directions are drawn for random batches and noise; the same for each estimate:

    two-point      [g_B(W + U) + g_B(W - U)] / 2            two gradients
    one-point      g_B(W + U)                               one gradient
    split          [g_B1(W + U) + g_B2(W - U)] / 2          one gradient (two halves)

The figure is the variance E|G - E G|^2 times the gradients that a direction costs (so at equal cost), over that of the
plain gradient g_B(W), with the standard error of the ratio over blocks of draws. Run: python -m benchmarks.split_batch
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

import flatmin
from flatmin.lab.tasks import get_task

RESULTS = Path(__file__).parent / "results" / "split_batch.json"
ESTIMATES: dict[str, tuple[dict[str, Any], int]] = {
    "two-point": ({}, 2),
    "one-point": ({"antithetic": False}, 1),
    "split": ({"split_batch": True}, 1),
}
SIGMAS = (0.01, 0.02, 0.04, 0.08)
BATCH, BLOCKS, DRAWS = 20, 20, 100


def trained() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The digits network after 1,000 steps of SGD, and its training data."""
    torch.manual_seed(0)
    task = get_task("digits")
    inputs, labels = task.load(0).train
    model = task.build_model()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(1000):
        rows = torch.randint(len(labels), (BATCH,))
        optimizer.zero_grad()
        task.criterion(model(inputs[rows]), labels[rows]).backward()
        optimizer.step()
    return model, inputs, labels


def variance(optimizer: Any, model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, seed: int) -> float:
    """E|G - E G|^2 from one block of draws."""
    generator = torch.Generator().manual_seed(seed)
    total, squares = None, 0.0
    for _ in range(DRAWS):
        rows = torch.randperm(len(labels), generator=generator)[:BATCH]
        for _ in optimizer.probes():
            x, y = optimizer.take(inputs[rows], labels[rows])
            nn.functional.cross_entropy(model(x), y).backward()
        direction = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
        optimizer.step()  # at learning rate 0: only the stream of the noise goes on
        total = direction if total is None else total + direction
        squares += float(direction @ direction)
    assert total is not None
    return (squares - float(total @ total) / DRAWS) / (DRAWS - 1)


def measure() -> dict[str, Any]:
    """Sigma -> estimate -> cost-weighted variance over the plain gradient's, and its standard error."""
    model, inputs, labels = trained()
    found: dict[str, Any] = {}
    for sigma in SIGMAS:
        row = {}
        for name, (options, cost) in {"plain": ({"clean_weight": 1.0}, 1), **ESTIMATES}.items():
            optimizer = flatmin.NSO(SGD(model.parameters(), lr=0.0), sigma=sigma, **options)
            row[name] = [cost * variance(optimizer, model, inputs, labels, seed) for seed in range(BLOCKS)]
        plain = torch.tensor(row.pop("plain"))
        ratios = {name: torch.tensor(values) / plain.mean() for name, values in row.items()}
        found[str(sigma)] = {
            name: {"ratio": float(r.mean()), "stderr": float(r.std() / math.sqrt(BLOCKS))} for name, r in ratios.items()
        }
    return found


def markdown(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = [f"| sigma | {' | '.join(ESTIMATES)} |", "|---|" + "---:|" * len(ESTIMATES)]
    for sigma, row in results.items():
        cells = [f"{row[name]['ratio']:.2f} ± {row[name]['stderr']:.2f}" for name in ESTIMATES]
        lines.append(f"| {sigma} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = measure()
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(markdown(results))
