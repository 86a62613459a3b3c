"""The three models of the step benchmark, with their data and base optimizers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer


@dataclass(frozen=True)
class Workload:
    """A model, a batch, and the optimizer that users would give it."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    base: Callable[[nn.Module], Optimizer]
    repeats: int


class Block(nn.Module):
    """A residual block of ResNet-20 for 32 x 32 images."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        same = stride == 1 and width_in == width
        self.skip = nn.Identity() if same else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """relu(x + f(x))."""
        return F.relu(self.skip(x) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def resnet20() -> nn.Module:
    """0.27 M parameters."""
    widths = [16] * 4 + [32] * 3 + [64] * 3
    blocks = [Block(a, b, 1 if a == b else 2) for a, b in itertools.pairwise(widths)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *blocks, *head)


class Transformer(nn.Module):
    """A patch transformer: 5 layers of width 128, 1.0 M parameters."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 128, 4, 4)
        layer = nn.TransformerEncoderLayer(128, 4, 512, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 5, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 3, 32, 32) to logits (n, 10)."""
        return self.head(self.layers(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def mlp() -> nn.Module:
    """26,122 parameters."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def _sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=1e-4, momentum=0.9)


def _adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-5)


WORKLOADS = (
    Workload("MLP 64-128-128-10, batch 64, SGD", mlp, lambda: torch.randn(64, 64), _sgd, 12),
    Workload("ResNet-20, batch 16, SGD", resnet20, lambda: torch.randn(16, 3, 32, 32), _sgd, 1),
    Workload("transformer 1.0 M, batch 8, AdamW", Transformer, lambda: torch.randn(8, 3, 32, 32), _adamw, 1),
)
LARGE_BATCHES = (
    Workload("ResNet-20, batch 64", resnet20, lambda: torch.randn(64, 3, 32, 32), _sgd, 1),
    Workload("transformer, batch 32", Transformer, lambda: torch.randn(32, 3, 32, 32), _adamw, 1),
)
