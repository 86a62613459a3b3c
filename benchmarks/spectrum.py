"""Top eigenvalues and spectral density: products needed, errors over seeds, and cost, against other tools.

    python -m benchmarks.spectrum            in the environment of `benchmarks.measuring`, for the other tools

Truth: the dense Hessian in double precision where it can be written down, else Lanczos in double precision, to
residuals of 3e-4. The unit of cost is the gradient of the same data, timed in turns with each call, in CPU time of one
thread.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import flatmin
from benchmarks.measured import CASES, Batches, Case
from flatmin.curvature.products.space import Space, flatten
from flatmin.curvature.spectra.lanczos import Lanczos

RESULTS = Path(__file__).parent / "results" / "spectrum.json"
SEEDS = {"MLP": 20, "ResNet": 3, "transformer": 3}  # of this library
GOAL = 1e-3


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.process_time()
    result = work()
    return time.process_time() - begin, result


def gradient(model: nn.Module, batches: Batches) -> None:
    """The unit."""
    params = list(model.parameters())
    for inputs, labels in batches:
        torch.autograd.grad(nn.functional.cross_entropy(model(inputs), labels), params)


def dense_spectrum(model: nn.Module, batches: Batches) -> np.ndarray:
    """All eigenvalues."""
    return torch.linalg.eigvalsh(dense_hessian(model, batches)).numpy()


def dense_hessian(model: nn.Module, batches: Batches) -> Tensor:
    """Reverse over reverse in double precision, at the same weights."""
    model = model.double()
    params = list(model.parameters())
    count = sum(len(labels) for _, labels in batches)
    parts = [nn.functional.cross_entropy(model(x.double()), y, reduction="sum") for x, y in batches]
    grads = torch.autograd.grad(torch.stack(parts).sum() / count, params, create_graph=True)
    flat = torch.cat([g.flatten() for g in grads])
    rows = [torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True) for g in flat]
    hessian = torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])
    model.float()
    return (hessian + hessian.T) / 2


def ours(objective: flatmin.Objective, k: int, seed: int) -> tuple[np.ndarray, int, bool]:
    result = flatmin.top_eigenvalues(objective, k, seed=seed)
    return np.array(result.values), result.num_products, result.converged


def oracle(objective: flatmin.Objective, k: int, seed: int, truth: np.ndarray) -> tuple[np.ndarray, int, bool]:
    """Our search, stopped by somebody who knows the values: as soon as all are right."""
    operator, space = flatmin.HessianOperator(objective), Space(objective.params)
    g = flatten(operator.gradient())
    start = space.nudged(g / space.norm(g), 1.0, seed)
    lanczos = Lanczos(operator.product, objective.params, seed=seed, start=start)
    while True:
        lanczos.extend()
        values = lanczos.ritz()[0][::-1][:k]
        if len(values) == k and error(values, truth[:k]) <= GOAL:
            return values, lanczos.num_products, True


def error(values: np.ndarray, truth: np.ndarray) -> float:
    """The largest of the relative errors."""
    return float(np.max(np.abs(values - truth) / np.abs(truth)))


def pyhessian(model: nn.Module, batches: Batches, k: int, seed: int) -> tuple[np.ndarray, int, bool]:
    """Its power iteration with deflation, at the tolerance (1e-4) that meets the goal on small networks."""
    torch.manual_seed(seed)
    tool: Any = importlib.import_module("pyhessian")
    operator = tool.hessian(model, nn.CrossEntropyLoss(), dataloader=batches, cuda=False)
    products = 0
    multiply = operator.dataloader_hv_product

    def counted(v: Any) -> Any:
        nonlocal products
        products += 1
        return multiply(v)

    operator.dataloader_hv_product = counted
    with sdpa_kernel(SDPBackend.MATH):
        values = operator.eigenvalues(maxIter=200, tol=1e-4, top_n=k)[0]
    return np.array(values), products, True


def eigenthings(model: nn.Module, batches: Batches, k: int, seed: int) -> tuple[np.ndarray, int, bool]:
    """Its Lanczos with its default number of steps."""
    tool: Any = importlib.import_module("hessian_eigenthings")
    lanczos: Any = importlib.import_module("hessian_eigenthings.algorithms.lanczos")
    operator = tool.HessianOperator(model, batches, tool.supervised_loss(nn.CrossEntropyLoss()))
    with sdpa_kernel(SDPBackend.MATH):
        result = lanczos.lanczos(operator, k=k, which="LA", seed=seed)
    return result.eigenvalues.numpy(), 2 * k, bool(np.all(result.converged.numpy()))


OTHERS = {
    "PyHessian, tol=1e-4": (pyhessian, "pyhessian"),
    "hessian-eigenthings, Lanczos": (eigenthings, "hessian-eigenthings"),
}


def eigenvalues(
    case: Case, model: nn.Module, batches: Batches, truth: np.ndarray, only: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each tool found, row by row."""
    objective = flatmin.Objective(model, nn.CrossEntropyLoss(), batches)
    tools: dict[str, Callable[[int, int], Any]] = {
        "flatmin": lambda k, seed: ours(objective, k, seed),
        "oracle": lambda k, seed: oracle(objective, k, seed, truth),
    }
    for name, (tool, package) in OTHERS.items():
        if installed(package):
            tools[name] = lambda k, seed, tool=tool: tool(model, batches, k, seed)
    for name, tool in tools.items():
        for k in (1, 5) if name.startswith(only) else ():
            seeds = num_seeds(case, name, k)
            if not seeds:
                continue
            runs = [
                one(model, batches, lambda k=k, seed=seed, tool=tool: tool(k, seed), truth[:k]) for seed in range(seeds)
            ]
            costs, products, errors, converged = map(np.array, zip(*runs, strict=True))
            row = {
                "seeds": seeds,
                "products": float(np.median(products)),
                "products_q95": float(np.quantile(products, 0.95)),
                "within_goal": float(np.mean(errors <= GOAL)),
                "worst_error": float(errors.max()),
                "gradients": float(np.median(costs)),
                "wrong_and_converged": int(np.sum((errors > GOAL) & converged)),
            }
            print(case.name, name, k, row, flush=True)
            yield f"{name}, top-{k}", row


def num_seeds(case: Case, name: str, k: int) -> int:
    """Other tools: a fifth of the seeds on the small networks; elsewhere PyHessian's five values alone."""
    seeds = next(n for start, n in SEEDS.items() if case.name.startswith(start))
    if name in ("flatmin", "oracle"):
        return seeds
    if case.name.startswith("MLP"):
        return seeds // 5
    return seeds if name.startswith("PyHessian") and k == 5 else 0


def one(
    model: nn.Module, batches: Batches, work: Callable[[], Any], truth: np.ndarray
) -> tuple[float, int, float, bool]:
    """Cost in gradients, products, worst relative error, and whether it claims to be converged."""
    unit = min(cpu_seconds(lambda: gradient(model, batches))[0] for _ in range(3))
    seconds, (values, products, converged) = cpu_seconds(work)
    return seconds / unit, products, error(values, truth), converged


def densities(model: nn.Module, batches: Batches, spectrum: np.ndarray) -> dict[str, Any]:
    """Wasserstein-1 to the dense spectrum over the mean size of an eigenvalue, with 600 products each."""
    objective = flatmin.Objective(model, nn.CrossEntropyLoss(), batches)
    measures = {"flatmin, (1 + 9) x 60": [density(objective, seed) for seed in range(5)]}
    if installed("hessian-eigenthings"):
        measures["hessian-eigenthings, 10 x 60"] = [peer_density(model, batches, seed) for seed in range(5)]
    size = np.abs(spectrum).mean()
    return {
        name: summary([wasserstein_distance(nodes, spectrum, weights) / size for nodes, weights in found])
        for name, found in measures.items()
    }


def density(objective: flatmin.Objective, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return flatmin.spectral_density(objective, num_probes=9, num_steps=60, seed=seed).quadrature()


def peer_density(model: nn.Module, batches: Batches, seed: int) -> tuple[np.ndarray, np.ndarray]:
    tool: Any = importlib.import_module("hessian_eigenthings")
    slq: Any = importlib.import_module("hessian_eigenthings.algorithms.spectral_density")
    operator = tool.HessianOperator(model, batches, tool.supervised_loss(nn.CrossEntropyLoss()))
    found = slq.spectral_density(operator, num_runs=10, lanczos_steps=60, seed=100 * seed)
    return found.raw_eigenvalues.numpy().ravel(), found.raw_weights.numpy().ravel()


def summary(values: list[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "lowest": min(values), "highest": max(values)}


def installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def reference(model: nn.Module, batches: Batches) -> np.ndarray:
    """The five largest eigenvalues to 3% of the goal or better, in double precision, where the Hessian is too large."""
    double = [(x.double(), y) for x, y in batches]
    objective = flatmin.Objective(copy.deepcopy(model).double(), nn.CrossEntropyLoss(), double)
    found = flatmin.top_eigenvalues(objective, 5, tol=3e-4, max_products=80, max_basis=100, seed=1000)
    assert found.converged
    assert max(found.errors) < 0.03 * GOAL * found.values[-1]
    return np.array(found.values)


def markdown(results: dict[str, Any]) -> str:
    """Eigenvalues and densities as Markdown."""
    lines = ["| | products | gradients | seeds within 1e-3 | worst error | wrong without saying so |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for case, rows in results["eigenvalues"].items():
        lines.append(f"| **{case}** | | | | | |")
        for name, row in rows.items():
            share = f"{row['within_goal']:.0%} of {row['seeds']}"
            lines.append(
                f"| {name} | {row['products']:g} | {row['gradients']:.0f} | {share} | {row['worst_error']:.1g} "
                f"| {row['wrong_and_converged']} |"
            )
    lines += ["", "| distance of the density | median | lowest to highest |", "|---|---:|---:|"]
    for case, rows in results["density"].items():
        lines.append(f"| **{case}** | | |")
        lines += [f"| {n} | {r['median']:.3f} | {r['lowest']:.3f} to {r['highest']:.3f} |" for n, r in rows.items()]
    return "\n".join(lines)


def main() -> None:
    """Writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="only the cases whose name begins so; the others are kept")
    parser.add_argument("--tool", default="", help="only the tools whose name begins so; the others are kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= {"torch": torch.__version__, "flatmin": flatmin.__version__, "machine": platform.machine()}
    chosen = [c for c in CASES if c.name.startswith(tuple(SEEDS)) and c.name.startswith(arguments.case)]
    for case in chosen:
        model, batches = case.make()
        spectrum = dense_spectrum(model, batches) if case.name.startswith("MLP") else None
        truth = reference(model, batches) if spectrum is None else spectrum[::-1]
        rows = results.setdefault("eigenvalues", {}).setdefault(case.name, {})
        for label, row in eigenvalues(case, model, batches, truth, arguments.tool):
            rows[label] = row
            RESULTS.write_text(json.dumps(results, indent=1))
        if spectrum is not None and not arguments.tool:
            results.setdefault("density", {})[case.name] = densities(model, batches, spectrum)
        RESULTS.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
