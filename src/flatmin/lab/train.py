"""One run: train a model by a method, record its progress, measure how flat it ended."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from flatmin.curvature import measure
from flatmin.extras import need
from flatmin.lab.records import RunWriter, environment
from flatmin.lab.tasks import Settings, Splits, get_task
from flatmin.optim.registry import get_method

NUM_PROGRESS = 20  # progress records per run

Progress = Callable[[str, int, int, float], None]  # run name, step, number of steps, training loss


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Everything that decides a run's numbers."""

    task: str
    method: str
    seed: int
    num_steps: int
    settings: Settings

    @property
    def name(self) -> str:
        """The run's file name."""
        return f"{self.method}-seed{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in the header of its record."""
        return dataclasses.asdict(self)


class Diverged(Exception):
    """Training met a loss that is not finite."""


def train(spec: RunSpec, folder: Path, report: Progress = lambda *_: None) -> None:
    """Trains one run and writes `<name>.jsonl` and `<name>.safetensors` into `folder`.

    One thread and the spec's seed: the same spec gives the same numbers on the same machine. An interrupt leaves
    whole records and no finished file. A loss that is not finite ends the run with status "diverged".
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    header = {"spec": spec.to_dict(), **environment()}
    try:
        with RunWriter(folder / f"{spec.name}.jsonl", header) as writer:
            model, result = _train(spec, writer, report)
            tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
            need("safetensors.torch", "lab").save_file(tensors, folder / f"{spec.name}.safetensors")
            writer.finish(result)
    finally:
        torch.set_num_threads(threads)


def _train(spec: RunSpec, writer: RunWriter, report: Progress) -> tuple[nn.Module, dict[str, Any]]:
    task = get_task(spec.task)
    splits = task.load(spec.seed)
    torch.manual_seed(spec.seed)
    model = task.build_model()
    optimizer = build_optimizer(spec, model)
    gradients_per_step = getattr(optimizer, "gradients_per_step", 1)
    scheduler = CosineAnnealingLR(optimizer, spec.num_steps)
    every = max(1, spec.num_steps // NUM_PROGRESS)
    seconds, step, status = 0.0, 0, {"status": "finished"}
    batches = _batches(splits.train, task.batch_size, spec.seed)
    try:
        for step in range(1, spec.num_steps + 1):
            started = time.perf_counter()
            loss = _step(model, optimizer, task.criterion, next(batches))
            scheduler.step()
            seconds += time.perf_counter() - started
            if not math.isfinite(loss):
                raise Diverged(_divergence(spec, step, loss))
            if step % every == 0 or step == spec.num_steps:
                scores = _scores(model, task.criterion, splits)
                writer.write({"type": "progress", "step": step, "gradients": step * gradients_per_step, **scores})
                report(spec.name, step, spec.num_steps, loss)
    except Diverged as error:
        status = {"status": "diverged", "message": str(error)}
    cost = {"seconds": seconds, "steps": step, "gradients": step * gradients_per_step}
    if status["status"] == "diverged":
        return model, {**status, **cost}
    flatness = measure(model, task.criterion, [splits.train], seed=spec.seed)
    return model, {**status, **cost, **_scores(model, task.criterion, splits), "flatness": flatness.to_dict()}


def build_optimizer(spec: RunSpec, model: nn.Module) -> Optimizer:
    """SGD with momentum 0.9 and the spec's settings, inside the spec's method."""
    settings, method = spec.settings, get_method(spec.method)
    base = SGD(model.parameters(), lr=settings.lr, momentum=0.9, weight_decay=settings.weight_decay)
    options: dict[str, Any] = {}
    if settings.radius is not None and method.radius_name is not None:
        options[method.radius_name] = settings.radius
    if spec.method.startswith("nso"):
        options["seed"] = spec.seed
    return method.build(base, **options)


def _step(model: nn.Module, optimizer: Optimizer, criterion: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    inputs, labels = batch

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = criterion(model(inputs), labels)
        loss.backward()
        return loss

    with warnings.catch_warnings():  # a skipped step ends the run below, with a message of its own
        warnings.filterwarnings("ignore", message=".*skipped step", category=RuntimeWarning)
        return float(optimizer.step(closure).detach())  # type: ignore[arg-type, union-attr]


def _batches(data: tuple[Tensor, Tensor], size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled epochs without end; the order depends on the seed alone, so all methods see the same."""
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = data
    while True:
        for rows in torch.randperm(len(labels), generator=generator).split(size):
            yield inputs[rows], labels[rows]


@torch.no_grad()
def _scores(model: nn.Module, criterion: nn.Module, splits: Splits) -> dict[str, float]:
    model.eval()
    scores: dict[str, float] = {}
    for name, (inputs, labels) in splits._asdict().items():
        outputs = model(inputs)
        scores[f"{name}_loss"] = float(criterion(outputs, labels))
        scores[f"{name}_accuracy"] = float((outputs.argmax(1) == labels).double().mean())
    model.train()
    return {**scores, "gap": scores["test_loss"] - scores["train_loss"]}


def _divergence(spec: RunSpec, step: int, loss: float) -> str:
    radius = get_method(spec.method).radius_name
    settings = f"lr={spec.settings.lr:g}" + (f", {radius}={spec.settings.radius:g}" if radius else "")
    return (
        f"{spec.method} on {spec.task}, seed {spec.seed}: the loss became {loss} at step {step} ({settings}). A lower "
        f"learning rate{f' or {radius}' if radius else ''} usually mends it."
    )
