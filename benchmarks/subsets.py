"""Whether products with a matrix near the Hessian make a search for its eigenvalues cheaper, if one knows the truth.

    python -m benchmarks.subsets             some ten minutes on one thread

The five largest eigenvalues of the tanh network of `benchmarks/measured.py`, whose data are four batches. From its
dense Hessians, one for each batch, and its dense Gauss-Newton matrix G, in double precision:

    late products over some batches    Lanczos, with m of the four batches, drawn anew for each product, from the first
                                       product on that an oracle finds best; such a product costs m / 4
    a preconditioner                   Davidson's method (Olsen's correction): residuals of the whole data, divided by
                                       H_m - theta, with H_m of m batches, or by G - theta; this division costs
                                       nothing here
    from the largest of G              begun with eigenvectors of G in place of the gradient, then divided by G - theta;
                                       or with what Lanczos has of G after some products, and there is nothing else of G

Counted is what is spent on products of the Hessian until all five Ritz values are within 1e-3.
"""

from __future__ import annotations

import copy
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.func import functional_call, jacrev, vmap

import flatmin
from benchmarks.measured import CASES, Batches
from benchmarks.spectrum import dense_hessian, error

RESULTS = Path(__file__).parent / "results" / "subsets.json"
K, TOL, SEEDS, MOST = 5, 1e-3, 20, 40.0
FIRST = range(12, 22, 2)  # the products from which on some batches are left out, of which the best is taken
CLOSE = 0.02  # |eigenvalue of H_m - theta| below which a preconditioner would be divided by next to nothing
FOUND = 0.02  # residual over value, from which on the next value is improved
FIRST_OF_G, SEARCHES = 6, (20, 25)  # eigenvectors of G to begin with, and the products with G that Lanczos has for them

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


def dense_gauss_newton(model: torch.nn.Module, batches: Batches) -> np.ndarray:
    """mean_i J_i' (diag(p_i) - p_i p_i') J_i, from the Jacobian of the outputs of each sample, in double precision."""
    model = copy.deepcopy(model).double()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    inputs = torch.cat([x for x, _ in batches]).double()
    rows = vmap(jacrev(lambda w, x: functional_call(model, w, (x,))), (None, 0))(weights, inputs)
    jacobian = torch.cat([part.flatten(2) for part in rows.values()], 2)
    p = torch.softmax(model(inputs).detach(), 1)
    middle = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return torch.einsum("nad,nab,nbe->de", jacobian, middle, jacobian).numpy() / len(inputs)


class Data:
    """The Hessians of the batches and of all, the Gauss-Newton matrix, and the gradient."""

    def __init__(self) -> None:
        (case,) = (case for case in CASES if case.name.startswith("MLP, tanh"))
        model, batches = case.make()
        self.parts = [dense_hessian(model, [batch]).numpy() for batch in batches]
        grads = flatmin.Objective(model, torch.nn.CrossEntropyLoss(), batches).gradient()
        self.gradient = torch.cat([g.flatten() for g in grads.present]).double().numpy()
        self.whole = self.of(range(len(batches)))
        self.gauss_newton = dense_gauss_newton(model, batches)
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


def davidson(data: Data, start: np.ndarray, preconditioner: tuple[np.ndarray, np.ndarray]) -> float:
    """The products of Davidson's method; the preconditioner is given by its eigenvalues and eigenvectors.

    Args:
        data: the truth.
        start: columns to begin with.
        preconditioner: ascending eigenvalues, and eigenvectors as columns.
    """
    spectrum, vectors = preconditioner
    space = Subspace(start[:, 0], lambda v: data.whole @ v)
    for column in start.T[1:]:
        space.extend(column, lambda v: data.whole @ v)
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


def searched(data: Data, seed: int, num_products: int) -> tuple[np.ndarray, np.ndarray]:
    """What Lanczos knows of G after so many products: Ritz pairs, and the mean of the other eigenvalues elsewhere."""
    matrix = data.gauss_newton
    space = Subspace(data.start(seed), lambda v: matrix @ v)
    while space.basis.shape[1] < num_products:
        space.extend(space.images[:, -1], lambda v: matrix @ v)
    values, coordinates = np.linalg.eigh(space.basis.T @ space.images)
    rest = np.linalg.qr(space.basis, mode="complete")[0][:, num_products:]
    mean = (np.trace(matrix) - values.sum()) / rest.shape[1]
    return np.append(np.full(rest.shape[1], mean), values), np.column_stack([rest, space.basis @ coordinates])


def by_gauss_newton(data: Data) -> dict[str, list[float]]:
    """Products of the Hessian over the seeds, by way."""
    solved = np.linalg.eigh(data.gauss_newton)
    largest = solved[1][:, : -FIRST_OF_G - 1 : -1]
    costs = {
        "divided by G - theta": [davidson(data, data.start(seed)[:, None], solved) for seed in range(SEEDS)],
        "the same, from the six largest of G": [davidson(data, largest, solved)],
    }
    for products in SEARCHES:
        found = [searched(data, seed, products) for seed in range(SEEDS)]
        costs[f"the same, with what {products} products with G say of it"] = [
            davidson(data, pairs[1][:, : -FIRST_OF_G - 1 : -1], pairs) for pairs in found
        ]
    return costs


def measured(data: Data) -> dict[str, dict[str, float]]:
    """Median and most over the seeds, by way."""
    count = len(data.parts)
    costs = {"products over all batches": [krylov(data, seed, 10**6, count) for seed in range(SEEDS)]}
    for m in range(1, count):
        tried = [[krylov(data, seed, first, m) for seed in range(SEEDS)] for first in FIRST]
        costs[f"late products over {m} of {count} batches"] = min(tried, key=np.median)
    for m in range(1, count + 1):
        solved = np.linalg.eigh(data.of(range(m)))
        costs[f"divided by H_m - theta, m = {m} of {count}"] = [
            davidson(data, data.start(seed)[:, None], solved) for seed in range(SEEDS)
        ]
    costs |= by_gauss_newton(data)
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
    *apart, apart_g = [
        float(np.linalg.norm(part - data.whole, 2) / np.linalg.norm(data.whole, 2))
        for part in (*data.parts, data.gauss_newton)
    ]
    results |= {"seeds": SEEDS, "tol": TOL, "apart": apart, "apart_gauss_newton": apart_g, "ways": measured(data)}
    RESULTS.write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
