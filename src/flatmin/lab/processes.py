"""One run on several processes: `torchrun -m flatmin train`, `accelerate launch -m flatmin train`."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from flatmin.extras import need
from flatmin.lab.tasks import Splits


class Alone:
    """One process: nothing to share, nothing to agree on.

    Attributes:
        number: of processes.
        is_first: whether this one writes and prints.
    """

    number = 1
    is_first = True

    def prepare(self, model: nn.Module, splits: Splits) -> tuple[nn.Module, Splits]:
        """The model to evaluate, and the data where it is."""
        return model, splits

    def share(self, batch: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], float]:
        """This process's rows of a batch, and the weight that makes a mean over them count as it should."""
        return batch, 1.0

    def mean(self, value: float) -> float:
        """The mean over the processes."""
        return value

    def end(self) -> None:
        """Leaves the others."""


class Together(Alone):
    """Several processes, started by a launcher; Accelerate finds devices and wraps the model for them."""

    def __init__(self) -> None:
        # Without `cpu` Accelerate does not bring processes on a machine without accelerators together.
        on_cpu = not torch.accelerator.is_available()
        self._accelerator: Any = need("accelerate", "hf").Accelerator(cpu=on_cpu)
        self.number = self._accelerator.num_processes
        self.is_first = self._accelerator.is_main_process

    def prepare(self, model: nn.Module, splits: Splits) -> tuple[nn.Module, Splits]:
        """The model around which gradients are averaged, and the data on its device."""
        device = self._accelerator.device
        return self._accelerator.prepare(model), Splits(*((x.to(device), y.to(device)) for x, y in splits))

    def share(self, batch: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], float]:
        """Every n-th row. A batch that does not divide evenly is a mean over all of its rows all the same."""
        whole = len(batch[1])
        if whole < self.number:
            raise ValueError(f"a batch of {whole} samples cannot be shared by {self.number} processes.")
        inputs, labels = (part[self._accelerator.process_index :: self.number] for part in batch)
        return (inputs, labels), len(labels) * self.number / whole

    def mean(self, value: float) -> float:
        """One all-reduce of one number."""
        return float(self._accelerator.reduce(torch.tensor(value, device=self._accelerator.device), "mean"))

    def end(self) -> None:
        """Waits for the others and closes the group."""
        self._accelerator.end_training()


def launched() -> Alone:
    """The processes that a launcher has started, or this one alone."""
    return Together() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Alone()
