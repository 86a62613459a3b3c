"""Where a run is trained: in this process alone, or by Accelerate in those that a launcher has started."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from flatmin.extras import need
from flatmin.integrations.accelerate import probes
from flatmin.optim import FlatOptimizer
from flatmin.optim.engine.losses import Losses
from flatmin.optim.rule import HERE

STARTED = ("ACCELERATE_MIXED_PRECISION", "WORLD_SIZE")  # `accelerate launch` and `torchrun` set them

NOT_REPLICAS = (
    "flatmin train keeps all weights in each process, to measure their flatness, and {kind} would not. Launch it "
    "without."
)
NOT_TOGETHER = (
    "the launcher started {world} processes, but Accelerate cannot join them on {device}. Set "
    "ACCELERATE_USE_CPU=true, or start one process."
)
NO_SCALER = (
    "--mixed_precision {precision} needs a scaler, which Accelerate does not have on {device}: it would train in fp32 "
    "and not say so. Use bf16 or no."
)


class Alone:
    """One process on the CPU: nothing to share, nothing to agree on.

    Attributes:
        number: of processes.
        is_first: whether this one writes and prints.
        device: of the model and the data.
        finds_scale: whether a step that overflows is skipped while the scale of fp16 is being found.
    """

    number = 1
    is_first = True
    device = torch.device("cpu")
    finds_scale = False

    def about(self) -> dict[str, Any]:
        """What the header of a record says of them."""
        return {}

    def prepare(self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler) -> tuple[Any, Any, Any]:
        """What to evaluate, what to step with, and what to schedule by."""
        return model, optimizer, scheduler

    def share(self, batch: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], float]:
        """This process's rows of a batch, and the weight that makes a mean over them count as it should."""
        return batch, 1.0

    def step(self, optimizer: Any, evaluate: Callable[[], Tensor]) -> float:
        """One step of a prepared optimizer on the loss that `evaluate` computes; returns that loss, for display."""

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = evaluate()
            loss.backward()
            return loss

        return float(optimizer.step(closure).detach())

    def end(self) -> None:
        """Leaves the others."""


class Together(Alone):
    """What `accelerate launch` or `torchrun` has started: Accelerate has the devices, the replicas, the precision."""

    def __init__(self) -> None:
        # Without `cpu` Accelerate does not bring processes on a machine without accelerators together.
        on_cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        accelerate: Any = need("accelerate", "hf")
        split = accelerate.DataLoaderConfiguration(split_batches=True)  # so that a step is one step of the schedule
        accumulation = accelerate.utils.GradientAccumulationPlugin(num_steps=1)  # whatever the environment says
        self._accelerator: Any = accelerate.Accelerator(
            cpu=on_cpu, dataloader_config=split, gradient_accumulation_plugin=accumulation
        )
        self.number = self._accelerator.num_processes
        self.is_first = self._accelerator.is_main_process
        self.device = self._accelerator.device
        self.finds_scale = self._accelerator.scaler is not None
        self._check()

    def _check(self) -> None:
        kind, world = self._accelerator.distributed_type.value, int(os.environ.get("WORLD_SIZE", "1"))
        if kind != "NO" and not kind.startswith("MULTI_"):
            raise ValueError(NOT_REPLICAS.format(kind=kind))
        if world > self.number:
            raise ValueError(NOT_TOGETHER.format(world=world, device=self.device.type))
        precision = self._accelerator.mixed_precision
        if precision not in ("no", "bf16") and self._accelerator.scaler is None:
            raise ValueError(NO_SCALER.format(precision=precision, device=self.device.type))

    def about(self) -> dict[str, Any]:
        """Number, kind of device, precision."""
        precision = self._accelerator.mixed_precision
        return {"processes": self.number, "device": self.device.type, "mixed_precision": precision}

    def prepare(self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler) -> tuple[Any, Any, Any]:
        """Accelerate's replica, optimizer and scheduler."""
        # Accelerate makes the forward of what it gets one of lower precision, in place. The model itself, inside, is
        # judged in full precision.
        return self._accelerator.prepare(nn.Sequential(model), optimizer, scheduler)

    def share(self, batch: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], float]:
        """Every n-th row. A batch that does not divide evenly is a mean over all of its rows all the same.

        `split_between_processes` gives rows too, but no weight for an uneven share, and none at all of a small batch.
        """
        whole = len(batch[1])
        if whole < self.number:
            raise ValueError(f"a batch of {whole} samples cannot be shared by {self.number} processes.")
        inputs, labels = (part[self._accelerator.process_index :: self.number] for part in batch)
        return (inputs, labels), len(labels) * self.number / whole

    def step(self, optimizer: Any, evaluate: Callable[[], Tensor]) -> float:
        """In the loop form, which a scaler works with, and in which NSO averages gradients over processes once."""
        losses = Losses()
        if isinstance(optimizer.optimizer, FlatOptimizer):
            for probe in probes(self._accelerator, optimizer):
                losses.add(self._evaluated(evaluate), probe)
        else:
            optimizer.zero_grad()
            losses.add(self._evaluated(evaluate), HERE)
        optimizer.step()
        return float(self._accelerator.reduce(losses.reported(), "mean"))

    def _evaluated(self, evaluate: Callable[[], Tensor]) -> Tensor:
        loss = evaluate()
        self._accelerator.backward(loss)
        return loss.detach()

    def end(self) -> None:
        """Waits for the others and closes the group."""
        self._accelerator.end_training()


def launched() -> Alone:
    """The processes that a launcher has started, even if it is one, or this process alone."""
    return Together() if any(name in os.environ for name in STARTED) else Alone()
