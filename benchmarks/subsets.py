"""Whether products over a part of the data make a search for eigenvalues cheaper, for somebody who knows the truth.

    python -m benchmarks.subsets             some ten minutes on one thread

The five largest eigenvalues of the tanh network of `benchmarks/measured.py`, whose data are four batches. From its
dense Hessians, one for each batch, in double precision:

    late products over some batches    Lanczos, with m of the four batches, drawn anew for each product, from the first
                                       product on that an oracle finds best; such a product costs m / 4
    a preconditioner                   Davidson's method (Olsen's correction): residuals of the whole data, divided by
                                       H_m - theta, with H_m of m batches; this division costs nothing here

Counted is what is spent until all five Ritz values are within 1e-3.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import flatmin
from benchmarks.measured import CASES
from benchmarks.spectrum import dense_hessian, error

RESULTS = Path(__file__).parent / "results" / "subsets.json"
K, TOL, SEEDS, MOST = 5, 1e-3, 20, 40.0
FIRST = range(12, 22, 2)  # the products from which on some batches are left out, of which the best is taken
CLOSE = 0.02  # |eigenvalue of H_m - theta| below which a preconditioner would be divided by next to nothing
FOUND = 0.02  # residual over value, from which on the next value is improved

Product = Callable[[np.ndarray], np.ndarray]


class Subspace:
    """Orthonormal vectors and what the matrix makes of them."""

    def __init__(self, start: np.ndarray, product: Product):
        self.basis = start[:, None] / np.linalg.norm(start)
        self.images = product(self.basis[:, 0])[:, None]

    def extend(self, direction: np.ndarray, product: Product) -> None:
        """By the part of the direction that is orthogonal to the others, twice for rounding."""
        for _ in range(2):
            direction = direction - self.basis @ (self.basis.T @ direction)
        direction = direction / np.linalg.norm(direction)
        self.basis = np.column_stack([self.basis, direction])
        self.images = np.column_stack([self.images, product(direction)])

    def ritz(self) -> tuple[np.ndarray, np.ndarray]:
        """The largest values, and their coordinates in the basis."""
        matrix = self.basis.T @ self.images
        values, coordinates = np.linalg.eigh((matrix + matrix.T) / 2)
        return values[::-1][:K], coordinates[:, ::-1][:, :K]


class Data:
    """The Hessians of the batches and of all, and the gradient."""

    def __init__(self) -> None:
        (case,) = (case for case in CASES if case.name.startswith("MLP, tanh"))
        model, batches = case.make()
        self.parts = [dense_hessian(model, [batch]).numpy() for batch in batches]
        grads = flatmin.Objective(model, torch.nn.CrossEntropyLoss(), batches).gradient()
        self.gradient = torch.cat([g.flatten() for g in grads.present]).double().numpy()
        self.whole = self.of(range(len(batches)))
        self.truth = np.linalg.eigvalsh(self.whole)[::-1][:K]

    def of(self, batches: Sequence[int]) -> np.ndarray:
        """The mean of these Hessians."""
        return np.mean([self.parts[i] for i in batches], axis=0)

    def start(self, seed: int) -> np.ndarray:
        """The gradient and as much of a random vector, as `top_eigenvalues` starts."""
        chance = np.random.default_rng(seed).standard_normal(len(self.gradient))
        return self.gradient / np.linalg.norm(self.gradient) + chance / np.linalg.norm(chance)

    def right(self, values: np.ndarray) -> bool:
        """Whether all five are."""
        return len(values) == K and error(values, self.truth) <= TOL


def krylov(data: Data, seed: int, first: int, num_batches: int) -> float:
    """The cost of Lanczos whose products have `num_batches` batches from product `first` on; `MOST` if it never is."""
    rng, cost = np.random.default_rng(seed), 1.0
    space = Subspace(data.start(seed), lambda v: data.whole @ v)
    while not data.right(space.ritz()[0]) and cost < MOST:
        late = space.basis.shape[1] >= first
        chosen = rng.permutation(len(data.parts))[:num_batches] if late else range(len(data.parts))
        space.extend(space.images[:, -1], lambda v, chosen=chosen: np.mean([data.parts[i] @ v for i in chosen], axis=0))
        cost += len(chosen) / len(data.parts)
    return cost


def davidson(data: Data, seed: int, preconditioner: tuple[np.ndarray, np.ndarray]) -> float:
    """The products of Davidson's method; the preconditioner is given by its eigenvalues and eigenvectors."""
    spectrum, vectors = preconditioner
    space = Subspace(data.start(seed), lambda v: data.whole @ v)
    while True:
        values, coordinates = space.ritz()
        if data.right(values) or space.basis.shape[1] >= MOST:
            return float(space.basis.shape[1])
        direction = space.images[:, -1]
        if len(values) == K:
            ritz = space.basis @ coordinates
            residuals = space.images @ coordinates - ritz * values
            poor = np.linalg.norm(residuals, axis=0) > FOUND * np.abs(values)
            i = int(np.argmax(poor)) if poor.any() else K - 1
            shifted = spectrum - values[i]
            shifted = np.copysign(np.maximum(np.abs(shifted), CLOSE), shifted)
            divided = [vectors @ ((vectors.T @ v) / shifted) for v in (residuals[:, i], ritz[:, i])]
            along = (ritz[:, i] @ divided[0]) / (ritz[:, i] @ divided[1])
            direction = divided[0] - along * divided[1]
        space.extend(direction, lambda v: data.whole @ v)


def measured(data: Data) -> dict[str, dict[str, float]]:
    """Median and most over the seeds, by way."""
    count = len(data.parts)
    costs = {"products over all batches": [krylov(data, seed, 10**6, count) for seed in range(SEEDS)]}
    for m in range(1, count):
        tried = [[krylov(data, seed, first, m) for seed in range(SEEDS)] for first in FIRST]
        costs[f"late products over {m} of {count} batches"] = min(tried, key=np.median)
    for m in range(1, count + 1):
        solved = np.linalg.eigh(data.of(range(m)))
        costs[f"divided by H_m - theta, m = {m} of {count}"] = [davidson(data, seed, solved) for seed in range(SEEDS)]
    return {name: {"median": float(np.median(found)), "most": max(found)} for name, found in costs.items()}


def table(results: dict[str, Any]) -> str:
    """As Markdown."""
    lines = ["| way | products of the whole data, median / most |", "|---|---:|"]
    lines += [f"| {name} | {_cell(row)} |" for name, row in results["ways"].items()]
    return "\n".join(lines)


def _cell(row: dict[str, float]) -> str:
    return " / ".join("never" if value >= MOST else f"{value:g}" for value in (row["median"], row["most"]))


def main() -> None:
    """Writes the results."""
    torch.set_num_threads(1)
    results = {"torch": torch.__version__, "flatmin": flatmin.__version__, "machine": platform.machine()}
    data = Data()
    apart = [float(np.linalg.norm(part - data.whole, 2) / np.linalg.norm(data.whole, 2)) for part in data.parts]
    results |= {"seeds": SEEDS, "tol": TOL, "apart": apart, "ways": measured(data)}
    RESULTS.write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
