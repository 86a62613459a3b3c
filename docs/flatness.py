"""What docs/concepts/flatness.md shows: `python -m docs.flatness` trains and measures small networks on digits.

It takes some minutes and writes docs/records/flatness.json (arguments: only these parts of it). From that
`python -m docs.flatness_pictures` draws.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

import flatmin
from flatmin.lab.tasks import get_task

RECORD = Path(__file__).parent / "records" / "flatness.json"
SIGMAS = (1e-4, 3e-4, 1e-3, 3e-3, 6e-3, 0.01, 0.02, 0.03, 0.05, 0.1)
SIZES = (1, 4, 16, 80, 400)
FACTORS = (1, 2, 4, 8)

Data = tuple[Tensor, Tensor]


def digits(rows: slice) -> Data:
    """Some of the digits, in double precision."""
    images, labels = get_task("digits").load(0).validation
    return images[rows].double(), labels[rows]


def network(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """64-32-32-10, 3,466 parameters."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, 10)]
    return nn.Sequential(*layers).double()


def train(model: nn.Module, data: Data, steps: int, *, sigma: float = 0.0, tracker: Any = None) -> None:
    """SGD with momentum on batches of 40, or noise stability optimization around it."""
    base = SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = flatmin.NSO(base, sigma=sigma)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        if tracker is not None and step % 50 == 0 and step > 0:
            tracker.update(step)
        rows = torch.randint(len(data[1]), (40,), generator=generator)
        optimizer.zero_grad()
        for _ in optimizer.probes():
            nn.functional.cross_entropy(model(data[0][rows]), data[1][rows]).backward()
        optimizer.step()


def objective(model: nn.Module, data: Data, criterion: Any = None) -> flatmin.Objective:
    """The loss of a model on all of the data, in one batch."""
    return flatmin.Objective(model, criterion or nn.CrossEntropyLoss(), [data])


def pair(estimate: Any) -> dict[str, float]:
    """Value and error as plain numbers."""
    return {"value": estimate.value, "stderr": estimate.stderr}


def numbers(model: nn.Module, data: Data) -> dict[str, Any]:
    """Every measure of one network."""
    of = objective(model, data)
    ascent = {m: flatmin.ascent_sharpness(of, rho, m) for m, rho in (("euclidean", 0.2), ("adaptive", 0.5))}
    return {
        "loss": of.loss(),
        "num_params": of.num_params,
        "trace": pair(flatmin.trace(of, rtol=0.02)),
        "lambda_max": pair(flatmin.top_eigenvalues(of)),
        "noise": pair(flatmin.noise_stability(of, 0.02, rtol=0.03)),
        "noise_filter": pair(flatmin.noise_stability(of, 0.05, rtol=0.03, scale="filter")),
        "average": pair(flatmin.average_sharpness(of, 0.2, rtol=0.03)),
        "ascent": ascent["euclidean"].value,
        "one_step": ascent["euclidean"].one_step,
        "ascent_adaptive": ascent["adaptive"].value,
    }


def rescaled(data: Data) -> list[dict[str, Any]]:
    """The same function with other weights: the first layer times a factor, the second one divided by it."""
    found = []
    for factor in FACTORS:
        model = network()
        train(model, data, 300)
        with torch.no_grad():
            first, second = model[0], model[2]
            first.weight.mul_(factor)
            first.bias.mul_(factor)
            second.weight.div_(factor)
        found.append({"factor": factor, **numbers(model, data)})
    return found


def noise_curves(data: Data) -> dict[str, Any]:
    """What the rise under noise implies for the trace, at many sigmas, with and without kinks."""
    found = {}
    for name, activation in (("ReLU", nn.ReLU), ("tanh", nn.Tanh)):
        model = network(activation)
        train(model, data, 300)
        of = objective(model, data)
        curve = [pair(flatmin.noise_stability(of, s, num_draws=300).implied_trace) for s in SIGMAS]
        found[name] = {"trace": pair(flatmin.trace(of, rtol=0.02)), "sigmas": SIGMAS, "implied": curve}
    return found


def batch_sizes(data: Data) -> list[dict[str, Any]]:
    """Trace (mean over all batches) and lambda_max (mean over twenty at most) of batches of several sizes."""
    model = network()
    train(model, data, 300)
    found = []
    for size in SIZES:
        parts = [objective(model, (x, y)) for x, y in zip(data[0].split(size), data[1].split(size), strict=True)]
        traces = [flatmin.trace(part, rtol=0.05).value for part in parts]
        tops = [flatmin.top_eigenvalues(part).value for part in parts[:20]]
        found.append({"size": size, "trace": sum(traces) / len(traces), "lambda_max": sum(tops) / len(tops)})
    return found


def saturated(data: Data) -> dict[str, Any]:
    """Loss and trace along two trainings, and the comparison at the same loss."""
    trackers = {}
    for name, sigma in (("SGD", 0.0), ("NSO", 0.03)):
        model = network()
        tracker = flatmin.Tracker(objective(model, data), max_overhead=1.0, num_probes=16, num_steps=8)
        train(model, data, 1500 if sigma == 0 else 3000, sigma=sigma, tracker=tracker)
        trackers[name] = tracker
    compared = flatmin.compare_at_matched_loss(trackers["SGD"].points, trackers["NSO"].points)
    return {
        "curves": {name: tracker.to_dict()["points"] for name, tracker in trackers.items()},
        "matched": {"loss": compared.loss, "SGD": pair(compared.first), "NSO": pair(compared.second)},
        "ratio": pair(compared.ratio),
        "sentence": str(compared),
    }


def pictures_of(data: Data) -> dict[str, Any]:
    """The spectrum, and the loss around the weights."""
    model = network()
    train(model, data, 300)
    of = objective(model, data)
    density = flatmin.spectral_density(of, num_probes=10, num_steps=60)
    top = flatmin.top_eigenvalues(of, 2, vectors=True)
    random = [flatmin.random_direction(of, seed=seed) for seed in (0, 1)]
    planes = {
        "random": flatmin.loss_slice(of, *random, span=0.5, num_points=15, labels=["random", "random"]),
        "eigenvectors": flatmin.loss_slice(
            of, *top.vectors, span=1.0, num_points=15, labels=["largest eigenvector", "second"]
        ),
    }
    return {
        "density": {**density.to_dict(), "stderr": density.stderr},
        "planes": {name: plane.to_dict() for name, plane in planes.items()},
        "numbers": numbers(model, data),
    }


def error_rate(outputs: Tensor, targets: Tensor) -> Tensor:
    """The 0-1 loss: bounded by 1, as the bounds want it."""
    return (outputs.argmax(1) != targets).double().mean()


def bounded(data: Data) -> dict[str, Any]:
    """PAC-Bayes bounds of the 0-1 loss, and of a bounded cross-entropy."""
    start, model = network(), network()
    train(model, data, 300)
    squares = [
        float((p - q).detach().square().sum()) for p, q in zip(model.parameters(), start.parameters(), strict=True)
    ]
    distance, n = math.sqrt(sum(squares)), len(data[1])
    of = objective(model, data, error_rate)
    losses = {}
    for sigma in (0.02, 0.04, 0.08, 0.16, 0.32):
        rise = flatmin.noise_stability(of, sigma, num_draws=100)
        losses[sigma] = min(1.0, rise.clean_loss + rise.value + 2 * rise.stderr)
    options = {"largest_loss": 1.0, "distance": distance, "num_samples": n}
    classical = flatmin.bounds.best_gaussian(losses, num_params=3466, **options)
    trace = flatmin.trace(objective(model, data), rtol=0.02).value
    loss = objective(model, data).loss()
    paper = flatmin.bounds.trace_bound(loss, trace=trace, **{**options, "largest_loss": math.log(10) * 2})
    return {
        "distance": distance,
        "classical": {**classical.to_dict(), "sentence": str(classical)},
        "paper": {**paper.to_dict(), "sentence": str(paper)},
        "test_error": float(error_rate(model(digits(slice(400, 800))[0]), digits(slice(400, 800))[1])),
    }


PARTS = {
    "model": pictures_of,
    "noise": noise_curves,
    "rescaled": rescaled,
    "batches": batch_sizes,
    "saturated": saturated,
    "bounds": bounded,
}


def record(names: list[str]) -> None:
    """Trains and measures these parts, and keeps the others of the record."""
    torch.set_num_threads(1)
    data = digits(slice(0, 400))
    found: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name in names:
        found[name] = PARTS[name](data)
        print(name, "done", flush=True)
    found |= {"flatmin": flatmin.__version__, "torch": torch.__version__}
    RECORD.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    record(sys.argv[1:] or list(PARTS))
