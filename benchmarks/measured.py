"""The models and data of the measuring benchmark: lightly trained, synthetic data, seconds to make."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.models import Transformer, resnet20

Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """A trained model and the batches on which it is measured."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    batch: int
    batches: int
    steps: int
    lr: float
    rounds: int

    def make(self) -> tuple[nn.Module, Batches]:
        """Trains for `steps` steps of Adam on noisy class means; returns the model in evaluation mode, and batches."""
        torch.manual_seed(0)
        means = torch.randn(self.classes, *self.shape)
        model = self.build()
        optimizer = torch.optim.Adam(model.parameters(), lr=self.lr)

        def draw(size: int) -> tuple[Tensor, Tensor]:
            labels = torch.randint(self.classes, (size,))
            return 0.5 * means[labels] + 2.0 * torch.randn(size, *self.shape), labels

        for _ in range(self.steps):
            inputs, labels = draw(64)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        optimizer.zero_grad()
        return model.eval(), [draw(self.batch) for _ in range(self.batches)]


def tiny(activation: Callable[[], nn.Module]) -> nn.Module:
    """1,926 parameters."""
    widths = [20, 32, 32]
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers, nn.Linear(32, 6))


CASES = (
    Case("MLP, ReLU, 1,926 parameters, 4 x 256", lambda: tiny(nn.ReLU), (20,), 6, 256, 4, 400, 3e-3, 21),
    Case("MLP, tanh, 1,926 parameters, 4 x 256", lambda: tiny(nn.Tanh), (20,), 6, 256, 4, 400, 3e-3, 21),
    Case("ResNet-20, 8 x 16", resnet20, (3, 32, 32), 10, 16, 8, 80, 1e-3, 9),
    Case("transformer 1.0 M, 8 x 16", Transformer, (3, 32, 32), 10, 16, 8, 60, 3e-3, 9),
)
