"""One run: train a model by a method, record its progress, measure how flat it ended."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from flatmin.extras import need
from flatmin.lab.fingerprint import fingerprint
from flatmin.lab.flatness import flatness_of
from flatmin.lab.parts import Evaluation, Training, check_used, split_name
from flatmin.lab.processes import Alone
from flatmin.lab.records import RunWriter, Unwritten, environment
from flatmin.lab.tasks import Settings, Splits, Task, get_task
from flatmin.lab.tasks.check import counted
from flatmin.quiet import undisturbed

NUM_PROGRESS = (5, 10, 20)  # progress records of a run that is measured: each has those of the one before
SHARE = 0.5  # of the time of its gradients, the most that they may take beyond the least

Progress = Callable[[str, int, int, float], None]  # run name, step, number of steps, training loss
ALONE = Alone()


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Everything that decides a run's numbers.

    Attributes:
        task: its name, or the file that it is in (its record has the name).
        measured: whether its flatness is measured at the end, which decides none of the others.

    Raises:
        ValueError: for an unknown method, or settings that it would not use.
    """

    task: str
    method: str
    seed: int
    num_steps: int
    settings: Settings
    measured: bool = True

    def __post_init__(self) -> None:
        check_used(self.method, self.settings)

    @property
    def name(self) -> str:
        """The run's file name."""
        return run_name(self.method, self.seed)

    @property
    def title(self) -> str:
        """How messages call it."""
        return f"{self.method} on {get_task(self.task).name}, seed {self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in the header of its record."""
        data = dataclasses.asdict(self)
        data["task"] = get_task(self.task).name
        del data["measured"]
        if not data["settings"]["parts"]:  # as it was before there were any
            del data["settings"]["parts"]
        return data


def run_name(method: str, seed: int) -> str:
    """The name of the run's files, without their endings."""
    return f"{method}-seed{seed}"


class Diverged(Exception):
    """Training met a number that is not finite."""


def train(spec: RunSpec, folder: Path, report: Progress = lambda *_: None, processes: Alone = ALONE) -> None:
    """Trains one run and writes `<name>.jsonl` and `<name>.safetensors` into `folder`.

    One thread and the spec's seed: the same spec gives the same numbers on the same machine. An interrupt leaves
    whole records and no finished file. A loss that is not finite, a step that the optimizer skipped for that reason,
    and flatness that cannot be measured end the run with status "diverged" and a message. On several processes all
    compute, and the first one writes. Whatever the precision of training, scores and flatness are of full precision.
    """
    with one_thread():
        task = get_task(spec.task)
        splits = task.splits(spec.seed)
        header = {"spec": spec.to_dict(), "task": fingerprint(task, splits), **environment(), **processes.about()}
        if not spec.measured:
            header["measured"] = False
        with RunWriter(folder / f"{spec.name}.jsonl", header) if processes.is_first else Unwritten() as writer:
            writer.finish(_train(spec, splits, writer, report, folder / f"{spec.name}.safetensors", processes))


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread: the same spec gives the same numbers, and runs stand beside each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train(
    spec: RunSpec, splits: Splits, writer: RunWriter | Unwritten, report: Progress, weights: Path, processes: Alone
) -> dict[str, Any]:
    task = get_task(spec.task)
    splits = Splits(*((x.to(processes.device), y.to(processes.device)) for x, y in splits))
    torch.manual_seed(spec.seed)
    model = task.build_model().to(processes.device)
    criterion = copy.deepcopy(task.criterion).to(processes.device)  # it may have a state
    optimizer = build_optimizer(spec, model, len(splits.train[1]))
    gradients_per_step = getattr(optimizer, "gradients_per_step", 1)
    training = training_of(spec, model, criterion, splits)
    evaluate, scheduler = training.evaluation(optimizer), training.schedule(optimizer, spec.num_steps)
    replica, stepper, scheduler = processes.prepare(model, optimizer, scheduler)
    times = num_progress(task, splits, spec.num_steps * gradients_per_step) if spec.measured else 1
    shown, scored = _evenly(spec.num_steps, NUM_PROGRESS[-1]), _evenly(spec.num_steps, times)
    seconds, step, scores = 0.0, 0, {}
    initial = scores_of(model, criterion, {"train": splits.train})["train_loss"] if spec.measured else math.nan
    to_training(model)
    batches = shuffled(splits.train, task.batch_size, spec.seed)
    try:
        for step in range(1, spec.num_steps + 1):
            started = time.perf_counter()
            loss = _step(replica, stepper, evaluate, next(batches), processes)
            scheduler.step()
            training.after_step()
            seconds += time.perf_counter() - started
            _check_step(spec, step, loss, 0 if processes.finds_scale else getattr(optimizer, "num_skipped", 0))
            if step in scored:
                training.refresh(_in_order(splits.train, task.batch_size))
                with training.worn():
                    scores = scores_of(model, criterion, splits._asdict())
                scores["gap"] = scores["test_loss"] - scores["train_loss"]
                _check_scores(spec, step, scores)
                writer.write({"type": "progress", "step": step, "gradients": step * gradients_per_step, **scores})
            if step in shown:
                report(spec.name, step, spec.num_steps, loss)
        result = {"status": "finished", **scores}
        if spec.measured:
            result["initial_loss"] = initial if math.isfinite(initial) else None
            with training.worn():
                result |= _flatness(spec, model, criterion, splits)
    except Diverged as error:
        result = {"status": "diverged", "message": str(error)}
    if not processes.is_first:
        return {}
    with training.worn():
        tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
        need("safetensors.torch", "lab").save_file(tensors, weights)
    return {**result, "seconds": seconds, "steps": step, "gradients": step * gradients_per_step}


def training_of(spec: RunSpec, model: nn.Module, criterion: nn.Module, splits: Splits) -> Training:
    """What the parts of the spec's method do around its steps."""
    task, labels = get_task(spec.task), torch.cat([labels.flatten() for _, labels in splits])
    classes = None if labels.is_floating_point() else int(labels.max()) + 1
    if "mixup" in spec.settings.parts and classes and not all(counted(labels, criterion)):
        raise ValueError(f"mixup mixes labels, and some of task {task.name} are ignored by the loss.")
    return Training(
        model,
        criterion,
        spec.settings.parts,
        num_steps=spec.num_steps,
        epoch=-(-len(splits.train[1]) // task.batch_size),
        num_classes=classes,
    )


def build_optimizer(spec: RunSpec, model: nn.Module, num_data: int) -> Optimizer:
    """The task's base with the spec's settings, inside the spec's method; `num_data` training samples.

    Plain SGD where the method has a momentum and a prior of its own.

    Raises:
        ValueError: for a base with another learning rate or weight decay than the settings'.
    """
    settings, method = spec.settings, split_name(spec.method)[0]
    if method.replaces_momentum:
        base = SGD(model.parameters(), lr=settings.lr)
    else:
        task = get_task(spec.task)
        base = task.build_base(model, settings)
        _check_base(spec, task, base)
    options: dict[str, Any] = {}
    if settings.radius is not None and method.radius_name is not None:
        options[method.radius_name] = settings.radius
    if getattr(method.factory, "is_random", False):
        options["seed"] = spec.seed
    if "num_data" in method.needs:
        options["num_data"] = num_data
    return method.build(base, **options)


def _check_base(spec: RunSpec, task: Task, base: Optimizer) -> None:
    for name in ("lr", "weight_decay"):
        found, wanted = [group.get(name, 0.0) for group in base.param_groups], getattr(spec.settings, name)
        if wanted not in found:  # another group may be without weight decay, say
            raise ValueError(
                f"build_base of task {task.name!r} made {type(base).__name__} with {name}={found[0]:g}, where the "
                f"settings of {spec.method} say {wanted:g}: it is to take both lr and weight_decay from them."
            )


def _step(
    model: nn.Module, optimizer: Optimizer, evaluate: Evaluation, batch: tuple[Tensor, Tensor], processes: Alone
) -> float:
    share, weight = processes.share(batch)
    with warnings.catch_warnings():  # a skipped step ends the run below, with a message of its own
        warnings.filterwarnings("ignore", message=".*skipped step", category=RuntimeWarning)
        return processes.step(optimizer, lambda: evaluate(model, share) * weight)


def shuffled(data: tuple[Tensor, Tensor], size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled epochs without end; the order depends on the seed alone, so all methods see the same."""
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = data
    while True:
        for rows in torch.randperm(len(labels), generator=generator).split(size):
            yield inputs[rows], labels[rows]


def to_training(model: nn.Module) -> None:
    """Puts a model that is in evaluation mode as a whole (it may come so from a library) into training mode.

    In one that is in training mode, parts may be frozen on purpose, and stay so.
    """
    if not model.training:
        model.train()


def num_progress(task: Task, splits: Splits, num_gradients: float) -> int:
    """How often the scores of a measured run are recorded: 5, 10 or 20 times.

    As often as takes half as long as its gradients, but 5 times at least; a forward pass counts for a third of one.
    A trial, of which only the outcome is wanted, is scored at its end alone.
    """
    batch = min(task.batch_size, len(splits.train[1]))
    times = SHARE * num_gradients * 3 * batch / sum(len(labels) for _, labels in splits)
    return max((n for n in NUM_PROGRESS if n <= times), default=NUM_PROGRESS[0])


def _evenly(num_steps: int, times: int) -> set[int]:
    """So many steps, or all if there are fewer; the last is one of them."""
    return {-(-num_steps * k // times) for k in range(1, times + 1)}


def _in_order(data: tuple[Tensor, Tensor], size: int) -> list[tuple[Tensor, ...]]:
    return list(zip(*(part.split(size) for part in data), strict=True))


@torch.no_grad()
def scores_of(model: nn.Module, criterion: nn.Module, splits: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The loss on each, in evaluation mode, and the accuracy where targets are labels; nothing is left of it behind."""
    criterion = copy.deepcopy(criterion)  # it may have a state
    scores: dict[str, float] = {}
    with undisturbed(model):
        for name, (inputs, labels) in splits.items():
            outputs = model(inputs)
            scores[f"{name}_loss"] = float(criterion(outputs, labels))
            if not labels.is_floating_point():
                hits = (outputs.argmax(1) == labels)[counted(labels, criterion)]
                scores[f"{name}_accuracy"] = float(hits.double().mean())
    return scores


def _check_step(spec: RunSpec, step: int, loss: float, num_skipped: int) -> None:
    if not math.isfinite(loss):
        raise Diverged(_divergence(spec, f"the loss became {loss} at step {step}"))
    if num_skipped:
        raise Diverged(_divergence(spec, f"step {step} was skipped, since its direction or a loss is not finite"))


def _check_scores(spec: RunSpec, step: int, scores: dict[str, float]) -> None:
    for name, value in scores.items():
        if not math.isfinite(value):
            raise Diverged(_divergence(spec, f"the {name} became {value} at step {step}"))


def _flatness(spec: RunSpec, model: nn.Module, criterion: nn.Module, splits: Splits) -> dict[str, Any]:
    try:
        return flatness_of(model, criterion, splits.train, spec.seed)
    except ValueError as error:
        raise Diverged(f"{spec.title}: trained, but its flatness could not be measured: {error}") from error


def _divergence(spec: RunSpec, what: str) -> str:
    radius = split_name(spec.method)[0].radius_name
    settings = f"lr={spec.settings.lr:g}" + (f", {radius}={spec.settings.radius:g}" if radius else "")
    return (
        f"{spec.title}: {what} ({settings}). A lower learning rate{f' or {radius}' if radius else ''} usually mends it."
    )
