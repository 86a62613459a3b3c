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
SIGMAS = (1e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 6e-3, 0.01, 0.02, 0.03, 0.05, 0.1)
SIZES = (1, 4, 16, 80, 400)
FACTORS = (1, 2, 4, 8)
LOSSES = (1e-2, 5e-3, 2e-3, 1e-3, 8e-4)  # at which two trainings are compared
SEEDS = (1, 2, 3)
NOISES = (0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)  # whose bounds are compared

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


def train(model: nn.Module, data: Data, steps: int, *, sigma: float = 0.0, tracker: Any = None, seed: int = 1) -> None:
    """SGD with momentum on batches of 40, or noise stability optimization around it."""
    base = SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = flatmin.NSO(base, sigma=sigma)
    generator = torch.Generator().manual_seed(seed)
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
        "gradient_norm": float(of.gradient().norm()),
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
    """The same function with other weights: units of the first layer times a factor, the second layer divided by it."""
    found = []
    for factor, units in [*((factor, 32) for factor in FACTORS), (FACTORS[-1], 16)]:
        model = network()
        train(model, data, 300)
        with torch.no_grad():
            first, second = model[0], model[2]
            first.weight[:units].mul_(factor)
            first.bias[:units].mul_(factor)
            second.weight[:, :units].div_(factor)
        found.append({"factor": factor, "units": units, **numbers(model, data)})
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
    """Trace and lambda_max of batches of several sizes, means over all batches."""
    model = network()
    train(model, data, 300)
    found = []
    for size in SIZES:
        parts = [objective(model, (x, y)) for x, y in zip(data[0].split(size), data[1].split(size), strict=True)]
        traces = [flatmin.trace(part, rtol=0.05).value for part in parts]
        tops = [flatmin.top_eigenvalues(part).value for part in parts]
        found.append({"size": size, "trace": sum(traces) / len(traces), "lambda_max": sum(tops) / len(tops)})
    return found


def followed(data: Data, seed: int) -> dict[str, flatmin.Tracker]:
    """Two trainings that reach the same losses: SGD for 1,500 steps, NSO for 3,000."""
    trackers = {}
    for name, sigma in (("SGD", 0.0), ("NSO", 0.03)):
        model = network()
        trackers[name] = flatmin.Tracker(objective(model, data), max_overhead=1.0, num_probes=16, num_steps=8)
        train(model, data, 1500 if sigma == 0 else 3000, sigma=sigma, tracker=trackers[name], seed=seed)
    return trackers


def saturated(data: Data) -> dict[str, Any]:
    """Loss and trace along two trainings, and comparisons at the same loss, over losses and seeds."""
    runs = {seed: followed(data, seed) for seed in SEEDS}
    first = runs[SEEDS[0]]
    comparisons = []
    for seed, trackers in runs.items():
        for loss in LOSSES:
            found = flatmin.compare_at_matched_loss(trackers["SGD"].points, trackers["NSO"].points, loss=loss)
            comparisons.append({"seed": seed, "loss": loss, "ratio": pair(found.ratio), "p": found.p_value})
    compared = flatmin.compare_at_matched_loss(first["SGD"].points, first["NSO"].points)
    return {
        "curves": {name: tracker.to_dict()["points"] for name, tracker in first.items()},
        "matched": {"loss": compared.loss, "SGD": pair(compared.first), "NSO": pair(compared.second)},
        "ratio": pair(compared.ratio),
        "sentence": str(compared),
        "comparisons": comparisons,
    }


def pictures_of(data: Data) -> dict[str, Any]:
    """The spectrum, and the loss around the weights."""
    model = network()
    train(model, data, 300)
    of = objective(model, data)
    density = flatmin.spectral_density(of, num_probes=10, num_steps=60)
    top = flatmin.top_eigenvalues(of, 2, vectors=True)
    random = [unit(flatmin.random_direction(of, seed=seed)) for seed in (0, 1)]
    planes = {
        "random": flatmin.loss_slice(of, *random, span=2.0, num_points=21, labels=["random", "another"]),
        "eigenvectors": flatmin.loss_slice(
            of, *top.vectors, span=2.0, num_points=21, labels=["largest eigenvector", "second"]
        ),
    }
    return {
        "density": {**density.to_dict(), "stderr": density.stderr},
        "planes": {name: plane.to_dict() for name, plane in planes.items()},
        "numbers": numbers(model, data),
    }


def unit(direction: Any) -> Any:
    """The direction with length 1, so that a slice's axes are Euclidean distances."""
    return direction * (1.0 / direction.norm())


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
    for sigma in NOISES:
        rise = flatmin.noise_stability(of, sigma, num_draws=1000)
        # The mean over the noise is known from 1,000 draws only: an upper bound that fails once in a hundred, over all.
        losses[sigma] = flatmin.bounds.inverse_kl(rise.clean_loss + rise.value, math.log(len(NOISES) / 0.01) / 1000)
    options = {"largest_loss": 1.0, "distance": distance, "num_samples": n}
    classical = flatmin.bounds.best_gaussian(losses, num_params=3466, delta=0.04, **options)
    each = {
        sigma: flatmin.bounds.gaussian_bound(q, sigma=sigma, num_params=3466, delta=0.04 / len(losses), **options).value
        for sigma, q in losses.items()
    }
    trace = flatmin.trace(objective(model, data), rtol=0.02).value
    loss = objective(model, data).loss()
    paper = flatmin.bounds.trace_bound(loss, trace=trace, **{**options, "largest_loss": math.log(10) * 2})
    return {
        "distance": distance,
        "by_sigma": [{"sigma": s, "training": losses[s], "bound": each[s]} for s in losses],
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
