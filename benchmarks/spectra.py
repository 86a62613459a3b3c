"""What the benchmark of stopping rules runs on.

Simulated spectra, most of them harder than a network's, and the tanh network of `benchmarks/measured.py` in the
eigenvectors of its dense Hessian.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measured import CASES
from benchmarks.spectrum import dense_hessian

POWERS = {"1/i": 1.0, "1/i^2": 2.0, "1/sqrt(i)": 0.5}
APART = ("apart", "apart in pairs", "last wanted in a pair")
KINDS = (
    *POWERS, *APART, "exponential", "uniform", "squares", "semicircle", "Marchenko-Pastur", "network-like", "shifted",
    "two bulks", "clusters",
)  # fmt: skip


def spectrum_of(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """Eigenvalues, in any order."""
    i = np.arange(1, n + 1)
    if kind in POWERS:
        return i ** -POWERS[kind]
    if kind in APART:
        return apart(kind, n, rng)
    if kind == "exponential":
        return np.exp(-i * 10 ** rng.uniform(-2.5, -0.3))
    if kind == "uniform":
        return rng.uniform(0, 1, n)
    if kind == "squares":
        return np.linspace(0, 1, n) ** 2
    if kind == "semicircle":
        return semicircle(n, rng)
    if kind == "Marchenko-Pastur":
        size = min(n, 200)
        sample = rng.standard_normal((size, int(size * rng.uniform(0.2, 3)) + 1))
        return np.concatenate([np.linalg.eigvalsh(sample @ sample.T / sample.shape[1]), np.zeros(n - size)])
    if kind == "network-like":
        sizes = np.abs(rng.standard_normal(n)) ** rng.uniform(2, 8)
        return sizes / sizes.max() * np.where(rng.random(n) < 0.3, -0.2, 1)
    if kind == "shifted":
        return rng.uniform(0, 1, n) ** rng.uniform(1, 6) + 10 ** rng.uniform(-1, 1.5)
    if kind == "two bulks":
        return np.concatenate([0.1 * semicircle(n - n // 10, rng), 1 + 0.2 * semicircle(n // 10, rng)])
    width = 10 ** rng.uniform(-4, -1, 6)
    return (rng.uniform(0, 1, 6) + width * rng.standard_normal((n // 6, 6))).ravel()


def semicircle(n: int, rng: np.random.Generator) -> np.ndarray:
    return 2 * rng.beta(1.5, 1.5, n) - 1


def apart(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """A bulk and some values above it."""
    bulk = 0.3 * semicircle(n, rng) + 0.1
    above = np.sort(rng.uniform(0.5, 1.5, 6 if kind == APART[2] else rng.integers(1, 13)))[::-1]
    if kind == APART[1]:
        above = np.concatenate([above, above * (1 - 10 ** rng.uniform(-4, -1, len(above)))])
    if kind == APART[2]:
        above[5] = above[4] * (1 - 10 ** rng.uniform(-4, -1))
    return np.concatenate([bulk[len(above) :], above])


def unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v)


def simulated(count: int, seed: int) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Kind, spectrum, a vector with less of the small eigenvalues' vectors (as a gradient), and a random one."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        spectrum = spectrum_of(kind, int(rng.choice([60, 300, 1500])), rng)
        gradient = rng.standard_normal(len(spectrum)) * np.abs(spectrum) ** rng.uniform(0.3, 1.5)
        yield kind, spectrum, gradient, unit(rng.standard_normal(len(spectrum)))


class Network:
    """The trained network in the eigenvectors of its Hessian."""

    def __init__(self) -> None:
        model, batches = next(case for case in CASES if "tanh" in case.name).make()
        spectrum, vectors = torch.linalg.eigh(dense_hessian(model, batches))
        self.spectrum, self._vectors = spectrum.numpy(), vectors.numpy()
        half = torch.linalg.eigh(dense_hessian(model, batches[: len(batches) // 2]))[1]
        self.half = (half[:, -5:].T @ vectors).numpy()  # its top five, of half of the data
        model = model.double()
        inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        self.gradient = self._gradient(model, inputs, labels)
        self.batches = np.stack([self._gradient(model, x, y) for x, y in batches])
        members = [labels == label for label in labels.unique()]
        self.classes = np.stack(
            [self._gradient(model, inputs[m], labels[m]) * float(m.double().mean()) for m in members]
        )

    def _gradient(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> np.ndarray:
        """Of the mean loss, in the eigenvectors."""
        loss = nn.functional.cross_entropy(model(inputs.double()), labels)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([g.flatten() for g in grads]).numpy() @ self._vectors

    def start(self, seed: int) -> np.ndarray:
        """The gradient and an equal part of a random vector."""
        return next(self.starts(seed))[1]

    def starts(self, seed: int) -> Iterator[tuple[str, np.ndarray]]:
        """By name."""
        rng = np.random.default_rng(seed)
        chance = unit(rng.standard_normal(len(self.spectrum)))
        top = np.zeros(len(self.spectrum))
        top[-5:] = 1
        yield "gradient and an equal part of a random vector (as now)", unit(self.gradient) + chance
        yield "gradient and a tenth of a random vector", unit(self.gradient) + 0.1 * chance
        yield "random", chance
        yield "batch gradients, random signs", rng.choice([-1, 1], len(self.batches)) @ self.batches
        signs = rng.choice([-1, 1], len(self.classes))
        yield "class gradients, random signs", signs @ self.classes
        yield "class gradients of equal size, random signs", signs @ np.stack([unit(c) for c in self.classes])
        coarse = unit(rng.choice([-1, 1], 5) @ self.half)
        yield "top five of half of the data, random signs, and a tenth of a random vector", coarse + 0.1 * chance
        yield "(the exact top five in equal parts, and a third of a random vector)", unit(top) + chance / 3

    def truth(self, sign: int) -> np.ndarray:
        """The five largest eigenvalues, or the five smallest with the other sign."""
        return np.sort(sign * self.spectrum)[::-1][:5]
