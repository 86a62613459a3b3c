"""The cost of Hessian products and of the trace, in gradients of the same data, against other tools.

The other tools bring requirements of their own, so they live in an environment of their own:

    python -m venv .venv-peers
    .venv-peers/bin/pip install -c constraints.txt -e . pyhessian==0.1 hessian-eigenthings==1.0.0a5 \
        curvlinops-for-pytorch==3.0.1
    .venv-peers/bin/python -m benchmarks.measuring

All tools take turns within each round, in CPU time of one thread; a ratio is formed within a round, and its median and
quartiles over rounds are reported. Other tools run under attention in math mode: as users have it, all of them raise.

What a trace costs, for an error below 5% (1%) nine times of ten:

    other tools      (1.645 sd / 0.05)^2 products, with sd the standard deviation of one probe for all the data, over
                     its mean; times the cost of one of their products
    this library     `trace(objective, rtol=0.05 / 1.645)`, timed, over several seeds
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import flatmin
from benchmarks.measured import CASES, Batches, Case
from benchmarks.peers import BLOCK, PEERS, Product, flat, unflat
from flatmin.curvature import HessianOperator
from flatmin.vectors import Vector

RESULTS = Path(__file__).parent / "results" / "measuring.json"
OURS = {"flatmin, graphs kept": 2**31, "flatmin, fresh graphs": 0}
BY_HAND = {"by hand, graphs kept": True, "by hand, fresh graphs": False}
QUANTILE = 1.645  # of the normal distribution: |x| is below in 90% of cases
GOALS = {"5%": 0.05, "1%": 0.01}
RUNS = {("5%", True): 21, ("1%", True): 21, ("5%", False): 6, ("1%", False): 5}  # (goal, small model)


def gradient_of(model: nn.Module, batches: Batches) -> Callable[[], None]:
    """A hand-written gradient of the whole data: the unit."""
    params = list(model.parameters())

    def gradient() -> None:
        total = [torch.zeros_like(p) for p in params]
        for inputs, labels in batches:
            grads = torch.autograd.grad(nn.functional.cross_entropy(model(inputs), labels), params)
            torch._foreach_add_(total, grads)

    return gradient


def products_of(model: nn.Module, batches: Batches) -> dict[str, Product]:
    """The tools that are there, each as a product with a flat vector."""
    found: dict[str, Product] = {}
    objective = flatmin.Objective(model, nn.CrossEntropyLoss(), batches)
    for name, memory in OURS.items():
        operator = HessianOperator(objective, graph_memory=memory)
        found[name] = lambda v, operator=operator: flat(
            operator.product(Vector(unflat(v, operator.objective.params))).present
        )
    found |= {name: in_math_mode(lambda keep=keep: by_hand(model, batches, keep)) for name, keep in BY_HAND.items()}
    for name, (make, package) in PEERS.items():
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        found[name] = in_math_mode(lambda make=make: make(model, batches))
    return found


def by_hand(model: nn.Module, batches: Batches, keep: bool) -> Product:
    """Reverse over reverse with nothing around it: what any library has to do."""
    params = list(model.parameters())

    def graph(inputs: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(nn.functional.cross_entropy(model(inputs), labels), params, create_graph=True)

    kept = [graph(*batch) for batch in batches] if keep else []

    def product(v: Tensor) -> Tensor:
        total = [torch.zeros_like(p) for p in params]
        for i, batch in enumerate(batches):
            grads = kept[i] if keep else graph(*batch)
            torch._foreach_add_(total, torch.autograd.grad(grads, params, unflat(v, params), retain_graph=keep))
        return flat(total) / len(batches)

    return product


def in_math_mode(make: Callable[[], Product]) -> Product:
    with sdpa_kernel(SDPBackend.MATH):
        product = make()

    def call(v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return product(v)

    return call


def random_vector(model: nn.Module, columns: int = 0) -> Tensor:
    size = sum(p.numel() for p in model.parameters())
    return torch.randint(2, (size, columns) if columns else (size,)).float() * 2 - 1


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def cost_of_products(case: Case, model: nn.Module, batches: Batches) -> dict[str, Any]:
    """Median and quartiles of the time of a product over that of a gradient; error against double precision."""
    gradient, tools = gradient_of(model, batches), products_of(model, batches)
    v = random_vector(model)
    block = random_vector(model, BLOCK)
    work: dict[str, Callable[[], Tensor]] = {
        name: (lambda product=product: product(v)) for name, product in tools.items()
    }
    if "curvlinops" in tools and "MLP" in case.name:
        work[f"curvlinops, {BLOCK} columns"] = lambda: tools["curvlinops"](block)
    for call in (gradient, *work.values()):
        call()
    ratios: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(case.rounds):
        unit = statistics.mean(timed(gradient)[0] for _ in range(2))
        for name, call in work.items():
            ratios[name].append(timed(call)[0] / unit / (BLOCK if "columns" in name else 1))
    found = {}
    for name, values in ratios.items():
        low, median, high = np.percentile(values, [25, 50, 75])
        found[name] = {"low": float(low), "median": float(median), "high": float(high)}
    for name, error in errors_of_products(case, model, batches).items():
        found[name]["error"] = error
    return found


def errors_of_products(case: Case, model: nn.Module, batches: Batches) -> dict[str, float]:
    """Relative error of a product on one batch, against reverse over reverse in double precision."""
    inputs, labels = batches[0]
    v = random_vector(model)
    double = case.build().double().eval()
    double.load_state_dict(model.state_dict())
    params = list(double.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        loss = nn.functional.cross_entropy(double(inputs.double()), labels)
        grads = torch.autograd.grad(loss, params, create_graph=True)
        truth = flat(torch.autograd.grad(grads, params, unflat(v.double(), params)))
    tools = products_of(model, [batches[0]])
    return {name: float((product(v).double() - truth).norm() / truth.norm()) for name, product in tools.items()}


def spread_of_one_probe(model: nn.Module, batches: Batches, product: Product, trace: float, probes: int) -> float:
    """Standard deviation of v' H v over the trace, with one v for all batches: what every other tool draws."""
    forms = []
    for _ in range(probes):
        v = random_vector(model)
        forms.append(float(v.double() @ product(v).double()))
    return statistics.stdev(forms) / trace


def cost_of_trace(case: Case, model: nn.Module, batches: Batches, products: dict[str, Any]) -> dict[str, Any]:
    """Gradients for each goal; the truth, and how far off our runs were."""
    small = "MLP" in case.name
    gradient = gradient_of(model, batches)
    objective = flatmin.Objective(model, nn.CrossEntropyLoss(), batches)
    truth, how = reference(objective, small)
    operator = HessianOperator(objective)
    kept = lambda v: flat(operator.product(Vector(unflat(v, objective.params))).present)  # noqa: E731
    spread = spread_of_one_probe(model, batches, kept, truth, 400 if small else 24)
    found: dict[str, Any] = {"truth": truth, "truth_from": how, "spread_of_one_probe": spread, "costs": {}}
    for goal, size in GOALS.items():
        needed = max((QUANTILE * spread / size) ** 2, 2)
        costs = {
            name: needed * row["median"]
            for name, row in products.items()
            if "flatmin" not in name and "by hand" not in name
        }
        costs["flatmin"], ours = our_cost(objective, gradient, size, truth, RUNS[goal, small])
        found["costs"][goal] = costs
        found[f"flatmin, {goal}"] = ours
    return found


def reference(objective: flatmin.Objective, small: bool) -> tuple[float, str]:
    """The trace: by unit vectors where that is possible, else from many probes."""
    if small:
        operator, total = HessianOperator(objective), 0.0
        for i, p in enumerate(objective.params):
            for j in range(p.numel()):
                unit = torch.zeros(p.numel())
                unit[j] = 1.0
                entries = [None] * len(objective.params)
                entries[i] = unit.view_as(p)  # type: ignore[call-overload]
                product = operator.product(Vector(entries)).tensors[i]
                assert product is not None
                total += float(product.flatten()[j])
        return total, "all unit vectors"
    result = flatmin.trace(objective, max_products=200, method="gauss-newton", seed=99)
    text = f"Gauss-Newton split, {result.num_products} probes, standard error {result.stderr:.3g}"
    other = flatmin.trace(objective, max_products=16, method="hutchinson", seed=99)
    return result.value, f"{text}; Hutchinson {other.value:.5g}, standard error {other.stderr:.2g}"


def our_cost(
    objective: flatmin.Objective, gradient: Callable[[], None], size: float, truth: float, runs: int
) -> tuple[float, dict[str, Any]]:
    """Median time over that of a gradient, and the errors."""
    ratios, errors, result = [], [], None
    for seed in range(runs):
        unit = statistics.mean(timed(gradient)[0] for _ in range(2))
        work = lambda seed=seed: flatmin.trace(objective, rtol=size / QUANTILE, max_products=20_000, seed=seed)  # noqa: E731
        seconds, result = timed(work)
        ratios.append(seconds / unit)
        errors.append(abs(result.value - truth) / abs(truth))
    assert result is not None
    low, median, high = np.percentile(ratios, [25, 50, 75])
    return float(median), {
        "low": float(low),
        "high": float(high),
        "largest_error": max(errors),
        "within_goal": float(np.mean(np.array(errors) <= size)),
        "runs": runs,
        "counted": result.num_gradients,
        "method": result.method,
    }


def attention_as_users_have_it(model: nn.Module, batches: Batches) -> dict[str, str]:
    """What each other tool says without math mode."""
    said = {}
    for name, (make, package) in PEERS.items():
        try:
            metadata.version(package)
            make(model, batches[:1])(random_vector(model))
            said[name] = "works"
        except metadata.PackageNotFoundError:
            continue
        except (RuntimeError, NotImplementedError) as error:
            said[name] = str(error).splitlines()[0][:120]
    return said


def markdown(results: dict[str, Any]) -> str:
    """Two tables: gradients per product, and gradients per trace."""
    cases = results["cases"]
    lines = ["| gradients per product | " + " | ".join(cases) + " |", "|---" * (len(cases) + 1) + "|"]
    names = dict.fromkeys(name for case in cases.values() for name in case["products"])
    for name in names:
        cells = []
        for case in cases.values():
            row = case["products"].get(name)
            if row is None:
                cells.append("")
                continue
            error = f", error {row['error']:.0e}" if "error" in row else ""
            cells.append(f"{row['median']:.2f} [{row['low']:.2f}, {row['high']:.2f}]{error}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for goal in GOALS:
        lines += ["", f"| gradients for the trace to {goal} | " + " | ".join(cases) + " |"]
        lines.append("|---" * (len(cases) + 1) + "|")
        for name in dict.fromkeys(name for case in cases.values() for name in case["trace"]["costs"][goal]):
            costs = [case["trace"]["costs"][goal].get(name) for case in cases.values()]
            cells = ["" if cost is None else f"{cost:.3g}" for cost in costs]
            if name == "flatmin":
                runs = [case["trace"][f"flatmin, {goal}"] for case in cases.values()]
                within = [f"{r['within_goal'] * r['runs']:.0f} of {r['runs']} within" for r in runs]
                cells = [f"{cell}, {said}" for cell, said in zip(cells, within, strict=True)]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark and writes `results/measuring.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    packages = ["torch", *(package for _, package in PEERS.values())]
    results: dict[str, Any] = {"machine": f"{platform.machine()}, CPU, 1 thread", "versions": {}, "cases": {}}
    for package in packages:
        try:
            results["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            results["versions"][package] = None
    if arguments.out.exists():
        results["cases"] = json.loads(arguments.out.read_text())["cases"]
    for case in CASES:
        if arguments.only in case.name:
            model, batches = case.make()
            products = cost_of_products(case, model, batches)
            said = attention_as_users_have_it(model, batches) if "transformer" in case.name else {}
            trace = cost_of_trace(case, model, batches, products)
            results["cases"][case.name] = {
                "rounds": case.rounds,
                "products": products,
                "trace": trace,
                "without_math_mode": said,
            }
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    main()
