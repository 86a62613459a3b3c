"""What the contract suite runs over: registered methods x base optimizers x models.

A new method in the registry is picked up here by itself; a test that should hold for it need not be written again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import flatmin

METHODS = [name for name in flatmin.methods() if name != "base"]

BASES: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda params: AdamW(params, lr=1e-2),
    "fused-adamw": lambda params: AdamW(params, lr=1e-2, fused=True),
}


class Normalizer(nn.Module):
    """A home-made normalisation: one buffer updated in place, one replaced, and a counter."""

    mean: Tensor
    scale: Tensor
    count: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        self.scale = 0.9 * self.scale + 0.1 * x.detach().std(0)
        self.count += 1
        return (x - self.mean) / self.scale


class Unused(nn.Module):
    """A branch that the loss never sees, and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(6, 3)
        self.unused = nn.Linear(6, 3)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(self.frozen(x).tanh())


class Sometimes(nn.Module):
    """A branch that only every other forward uses, as in stochastic depth or a mixture of experts."""

    def __init__(self):
        super().__init__()
        self.always = nn.Linear(6, 3)
        self.sometimes = nn.Linear(6, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out = self.always(x)
        return out + self.sometimes(x) if self.calls % 2 else out


class Tied(nn.Module):
    """One weight used twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(x).tanh()).tanh())


class Embedded(nn.Module):
    """The signs of the inputs as an index into an embedding, whose gradient may be sparse."""

    def __init__(self, sparse: bool):
        super().__init__()
        self.embed = nn.Embedding(64, 5, sparse=sparse)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        index = ((x > 0).long() * 2 ** torch.arange(6)).sum(1)
        return self.head(self.embed(index).tanh())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
    "batchnorm": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
    "dropout": lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)),
    "spectral-norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)
    ),
    "custom-norm": lambda: nn.Sequential(nn.Linear(6, 8), Normalizer(8), nn.ReLU(), nn.Linear(8, 3)),
    "unused-and-frozen": Unused,
    "tied": Tied,
}


@dataclass
class Case:
    """A model, its optimizer and its data, all functions of one seed."""

    method: str
    base: str = "sgd"
    model_name: str = "plain"
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        torch.default_generator.manual_seed(0)  # a thousandth of torch.manual_seed, which thinks of other devices
        self.model = MODELS[self.model_name]().to(self.dtype)
        base = BASES[self.base](self.model.parameters())
        self.optimizer: Any = build(self.method, base, **self.options)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(self.batch_size, 6, generator=generator).to(self.dtype)
        self.y = torch.randint(3, (self.batch_size,), generator=generator)

    @property
    def radius_name(self) -> str:
        name = flatmin.methods()[self.method].radius_name
        assert name is not None, "the control has no radius"
        return name

    def loss(self, rows: slice = slice(None)) -> Tensor:
        """As a caller writes it who uses everything that any method may need."""
        x, y = self.x[rows], self.y[rows]
        if self.method == "base":
            return F.cross_entropy(self.model(x), y, reduction="none").mean()
        x, y = self.optimizer.take(x, y)
        return self.optimizer.mean(F.cross_entropy(self.model(x), y, reduction="none"))

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def step(self) -> Any:
        return self.optimizer.step(self.closure)

    def loop_step(self) -> None:
        for _ in self.optimizer.probes():
            self.loss().backward()
        self.optimizer.step()

    def run(self, steps: int) -> Case:
        for _ in range(steps):
            self.step()
        return self

    def snapshot(self) -> dict[str, Tensor]:
        """Every parameter and buffer, and the random state: what a step may change."""
        return {**{k: v.clone() for k, v in self.model.state_dict().items()}, "rng": torch.get_rng_state()}


# Options where the defaults do not suit a test: what has none, batch norm on one sample, a choice of tensors by
# chance, a second gradient at every fifth step only.
OPTIONS: dict[str, dict[str, Any]] = {
    "bsam": {"num_data": 1000},
    "sap": {"num_samples": 4},
    "esam": {"beta": 1.0},
    "looksam": {"k": 2},
}


def build(method: str, base: Optimizer, **options: Any) -> Any:
    """The method around `base`, with the options that the tests need."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="BSAM has a momentum", category=UserWarning)
        return flatmin.methods()[method].build(base, **{**OPTIONS.get(method, {}), **options})


def write_into(p: Tensor, memory: Tensor) -> None:
    """Lets every gradient of `p` lie in `memory`."""

    def move(p: Tensor) -> None:
        if p.grad is not memory:  # with several backward passes the sum stands there already
            p.grad = memory.copy_(p.grad)  # type: ignore[arg-type]

    p.register_post_accumulate_grad_hook(move)


def radius_zero(method: str) -> dict[str, float]:
    name = flatmin.methods()[method].radius_name
    assert name is not None
    return {name: 0.0}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs by {(a[name].double() - b[name].double()).abs().max()}"


def differs(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return any(not torch.equal(a[name], b[name]) for name in a)


each_method = pytest.mark.parametrize("method", METHODS)
# Those that may evaluate the whole batch in any way; the others need `take` or `mean`, as in Case.loss.
each_whole_method = pytest.mark.parametrize(
    "method", [m for m in METHODS if m not in ("sap", "esam", "nso-split", "rwp")]
)
each_base = pytest.mark.parametrize("base", list(BASES))
each_model = pytest.mark.parametrize("model_name", list(MODELS))
