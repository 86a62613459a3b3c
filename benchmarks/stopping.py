"""When a search for eigenvalues may stop: rules on simulated spectra, and what an oracle needs from several starts.

    python -m benchmarks.stopping            a few minutes on one thread

Each run is Lanczos on a diagonal matrix (`benchmarks/spectra.py`), followed to its end. From its Ritz values, residuals
and guesses of the next Ritz values all rules are judged, so that they see the same runs.
"""

from __future__ import annotations

import json
import math
import platform
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import flatmin
from benchmarks.spectra import KINDS, Network, simulated, unit
from benchmarks.spectrum import error
from flatmin.curvature.spectra.eigen import FALL, FALLS, MIN_PRODUCTS, STABLE, TINY
from flatmin.curvature.spectra.lanczos import Lanczos
from flatmin.vectors import Vector

RESULTS = Path(__file__).parent / "results" / "stopping.json"
TOL, WEAK = 1e-3, 0.1
COUNTS = (1, 2, 3, 5)  # how many eigenvalues are wanted
SPECTRA, SHARED, SEEDS, LOWER_SEEDS = 2400, 600, 20, 10
PRODUCTS, NETWORK_PRODUCTS, LOWER_PRODUCTS = 70, 45, 150


@dataclass(frozen=True)
class Rule:
    """Stops when every condition holds for every wanted value."""

    name: str
    residual: float = math.inf  # at most this many times what is allowed
    estimate: bool = False  # the estimate of the error is at most what is allowed
    stays: int = STABLE  # products over which the value moves by at most what is allowed
    falling: bool = False
    ahead: bool = False  # of the values with one more row, which are also what is returned


NOW = Rule("residual <= tol and falling, value stayed (the rule now)", 1, falling=True)
RULES = (
    Rule("error estimate <= tol, moved by at most tol over 1 product", estimate=True, stays=1),
    Rule("the same, over 3 products", estimate=True),
    Rule("residual <= tol, value stayed (the rule before)", 1),
    Rule("residual <= 0.3 tol, value stayed", 0.3),
    NOW,
    Rule("residual <= 3 tol and falling, error estimate <= tol, values of `errors` stayed", 3, True, 3, True, True),
)


@dataclass(frozen=True)
class Run:
    """What is known after each product, (products, k), the largest first; NaN where there are fewer values."""

    values: np.ndarray
    bounds: np.ndarray
    ahead: np.ndarray
    spread: np.ndarray  # (products, 1)
    floor: np.ndarray  # (products, 1)
    complete: bool

    def first(self, k: int) -> Run:
        """Of the first k values."""
        values, bounds, ahead = (x[:, :k] for x in (self.values, self.bounds, self.ahead))
        return replace(self, values=values, bounds=bounds, ahead=ahead)

    def stop(self, rule: Rule) -> tuple[int, np.ndarray] | None:
        """The products after which the rule stops, and the values that it returns."""
        allowed = TOL * np.minimum(np.abs(self.values), self.spread)
        found = self.ahead if rule.ahead else self.values
        good = (self.bounds / rule.residual <= allowed) | (self.bounds <= self.floor)
        if rule.estimate:
            good &= np.minimum(np.abs(self.ahead - self.values), self.bounds) <= np.maximum(allowed, self.floor)
        for back in range(1, rule.stays + 1):
            good &= np.abs(found - before(found, back)) <= np.maximum(allowed, 10 * self.floor)
        if rule.falling:
            tiny = self.bounds <= np.maximum(TINY * allowed, self.floor)
            falls = [before(self.bounds, j) <= FALL * before(self.bounds, j + 1) for j in range(FALLS)]
            good &= (np.all(falls, 0) | tiny) & ~np.isnan(before(self.values, FALLS))
        stops: np.ndarray = np.logical_and.reduce(good, axis=1)
        stops[: MIN_PRODUCTS - 1] = False
        stops[-1] |= self.complete
        last = int(np.argmax(stops))
        return (last + 1, found[last]) if stops[last] else None


def before(x: np.ndarray, products: int) -> np.ndarray:
    """What was known so many products earlier."""
    return np.concatenate([np.full_like(x[:products], np.nan), x[: len(x) - products]])


def follow(spectrum: np.ndarray, start: np.ndarray, products: int, seed: int) -> Run:
    """Lanczos on the diagonal matrix with these entries."""
    diagonal = torch.from_numpy(spectrum)
    lanczos = Lanczos(
        lambda v: Vector(diagonal * part for part in v.present), [diagonal], seed=seed, start=torch.from_numpy(start)
    )
    rows, seen = [], [math.inf, -math.inf]
    while lanczos.num_products < products and not lanczos.complete:
        lanczos.extend()
        theta, bounds, _ = lanczos.ritz()
        seen = [min(seen[0], theta[0]), max(seen[1], theta[-1])]
        missing = max(0, max(COUNTS) - lanczos.size)
        ends = (x[::-1][: min(lanczos.size, max(COUNTS))] for x in (theta, bounds, lanczos.ahead()))
        top = [np.pad(x, (0, missing), constant_values=np.nan) for x in ends]
        rows.append([*top, np.array([seen[1] - seen[0]]), np.array([lanczos.floor])])
    values, bounds, ahead, spread, floor = (np.stack(column) for column in zip(*rows, strict=True))
    return Run(values, bounds, ahead, spread, floor, lanczos.complete)


@dataclass(frozen=True)
class Simulated:
    """A run on a simulated spectrum: its largest eigenvalues, and the size of the start's part in each of them."""

    kind: str
    truth: np.ndarray
    parts: np.ndarray  # in units of the root mean square over all
    run: Run

    @classmethod
    def of(cls, kind: str, spectrum: np.ndarray, start: np.ndarray, seed: int) -> Simulated:
        """Follows Lanczos."""
        order = np.argsort(-spectrum)[: max(COUNTS) + 1]
        parts = np.abs(unit(start)[order]) * math.sqrt(len(start))
        return cls(kind, spectrum[order], parts, follow(spectrum, start, PRODUCTS, seed))

    def trouble(self, k: int) -> str:
        """What may have misled a rule that stopped at wrong values."""
        gaps = -np.diff(self.truth[: k + 1]) / np.abs(self.truth[:k])
        if gaps.min() <= TOL:
            return "two values closer than tol"
        return "a part below a tenth" if self.parts[:k].min() < WEAK else "neither"


def judged(rule: Rule, cases: list[Simulated], counts: tuple[int, ...]) -> dict[str, Any]:
    """How often the rule stopped, and was wrong."""
    converged, kinds, troubles = 0, Counter[str](), Counter[str]()
    for case in cases:
        for k in counts:
            stop = case.run.first(k).stop(rule)
            converged += stop is not None
            if stop is not None and error(stop[1], case.truth[:k]) > TOL:
                kinds[case.kind] += 1
                troubles[case.trouble(k)] += 1
    wrong = {"wrong": kinds.total(), "wrong_by_kind": dict(kinds.most_common()), "wrong_with": dict(troubles)}
    return {"converged": converged, "share": kinds.total() / converged, **wrong}


def products(rule: Rule, runs: list[Run], truth: np.ndarray) -> dict[str, Any]:
    """Of the runs that the rule stops, and their errors."""
    stops = [stop for stop in (run.stop(rule) for run in runs) if stop is not None]
    errors = [error(values, truth) for _, values in stops]
    wrong = {"stopped": len(stops), "wrong": sum(e > TOL for e in errors), "median_error": float(np.median(errors))}
    return summary([count for count, _ in stops]) | wrong


def rules(network: Network) -> dict[str, Any]:
    """Wrong answers on simulated spectra, and products on the network: five values at either end."""
    cases = []
    for i, (kind, spectrum, gradient, chance) in enumerate(simulated(SPECTRA, seed=7)):
        start = chance if i // len(KINDS) % 2 else unit(gradient) + chance
        cases.append(Simulated.of(kind, spectrum, start, i))
    upper = [follow(network.spectrum, network.start(seed), NETWORK_PRODUCTS, seed) for seed in range(SEEDS)]
    lower = [follow(-network.spectrum, network.start(seed), LOWER_PRODUCTS, seed) for seed in range(LOWER_SEEDS)]
    return {
        rule.name: judged(rule, cases, COUNTS)
        | {"upper": products(rule, upper, network.truth(1)), "lower": products(rule, lower, network.truth(-1))}
        for rule in RULES
    }


def shares() -> dict[str, Any]:
    """The rule of now where the gradient has no part in half of the eigenvectors, by the share of a random vector."""
    found: dict[str, Any] = {}
    for share in (1.0, 0.1):
        cases, rng = [], np.random.default_rng(0)
        for i, (kind, spectrum, gradient, chance) in enumerate(simulated(SHARED, seed=11)):
            start = unit(gradient * (rng.random(len(spectrum)) < 0.5)) + share * chance
            cases.append(Simulated.of(kind, spectrum, start, i))
        found[str(share)] = judged(NOW, cases, (1, 5))
    return found


def oracle(network: Network) -> dict[str, Any]:
    """Products until five values are right, and until the values with one more row are, by start."""
    needed: dict[str, dict[str, list[int]]] = {}
    truth = network.truth(1)
    for seed in range(SEEDS):
        for name, start in network.starts(seed):
            run = follow(network.spectrum, start, NETWORK_PRODUCTS, seed)
            for which, found in (("values", run.values), ("ahead", run.ahead)):
                right = [error(values, truth) <= TOL for values in found]
                needed.setdefault(name, {}).setdefault(which, []).append(right.index(True) + 1)
    return {name: {which: summary(counts) for which, counts in row.items()} for name, row in needed.items()}


def summary(products: list[int]) -> dict[str, float]:
    return {"median": float(np.median(products)), "most": max(products)}


def rules_table(results: dict[str, Any]) -> str:
    """Wrong answers and products of each rule."""
    lines = ["| rule | converged | of these wrong | products, median / most | at the lower end |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for name, row in results["rules"].items():
        converged = row["converged"] / (results["spectra"] * len(COUNTS))
        mark = "**" if name == NOW.name else ""
        cells = [name, f"{converged:.0%}", f"{row['share']:.1%}", cell(row["upper"]), cell(row["lower"])]
        lines.append("| " + " | ".join(mark + text + mark for text in cells) + " |")
    return "\n".join(lines)


def starts_table(results: dict[str, Any]) -> str:
    """Products that an oracle needs from each start."""
    lines = ["| start | products until five values are right, median / most | with one more row |", "|---|---:|---:|"]
    lines += [f"| {name} | {cell(row['values'])} | {cell(row['ahead'])} |" for name, row in results["oracle"].items()]
    return "\n".join(lines)


def cell(row: dict[str, Any]) -> str:
    wrong = f" ({row['wrong']} of {row['stopped']} wrong)" if row.get("wrong") else ""
    return f"{row['median']:g} / {row['most']}{wrong}"


def main() -> None:
    """Writes the results."""
    torch.set_num_threads(1)
    network = Network()
    results: dict[str, Any] = {"torch": torch.__version__, "flatmin": flatmin.__version__}
    results |= {"machine": platform.machine(), "tol": TOL, "spectra": SPECTRA, "kinds": len(KINDS), "seeds": SEEDS}
    results["top_six"] = np.sort(network.spectrum)[::-1][:6].tolist()
    results |= {"oracle": oracle(network), "rules": rules(network), "shares": shares()}
    RESULTS.write_text(json.dumps(results, indent=1))
    print(rules_table(results), starts_table(results), sep="\n\n")


if __name__ == "__main__":
    main()
