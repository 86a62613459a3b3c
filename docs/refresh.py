"""Writes the tables of README.md and the pages below from the committed records (between their markers)."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import SGD

import flatmin
from benchmarks.collectives import table as collectives_table
from benchmarks.measuring import markdown as measuring_tables
from benchmarks.scale import table as scale_table
from benchmarks.spectrum import RESULTS as SPECTRUM
from benchmarks.spectrum import markdown as spectrum_table
from benchmarks.split_batch import markdown as split_table
from benchmarks.step import markdown as cost_table
from benchmarks.step_peers import markdown as peers_table
from benchmarks.stopping import RESULTS as STOPPING
from benchmarks.stopping import rules_table, starts_table
from benchmarks.subsets import RESULTS as SUBSETS
from benchmarks.subsets import table as subsets_table
from benchmarks.tuning_rules import RESULTS as TUNING_RULES
from benchmarks.tuning_rules import table as rules_of_tuning
from docs.flatness import RECORD
from docs.flatness_pictures import flatness_tables
from flatmin.lab.claims import CLAIMS
from flatmin.lab.claims.reproduce import TITLES
from flatmin.lab.display import SIGNS, differences_table, format_difference, markdown_table
from flatmin.lab.records import read_run
from flatmin.lab.summary import summarize
from flatmin.lab.tuning.tuned import at_edge
from tests.contracts.combinations import table as combinations_table

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "docs" / "records"
KEYS = ("lr", "weight_decay", "radius")
DECAYS = (0.0003, 0.001, 0.003)
EXPERIMENTS = {  # records -> how it was tuned
    "earlier": "by hand, 5 tuning seeds, noise in another order",
    "by-hand": "by hand, 5 tuning seeds",
    "suggested": "suggested, 5 tuning seeds",
    "one-decay": "suggested, 20 tuning seeds",
    "digits": "suggested, 20 tuning seeds, each method's decay",
}
SOLAR = {  # records -> what was equal
    "solar-cells": "400 gradients",
    "solar-cells-steps": "400 steps",
    "solar-cells-800": "800 gradients",
}
PAGES = (
    "results.md",
    "claims.md",
    "methods.md",
    "how-to/compare.md",
    "decisions/0013-stopping.md",
    "decisions/0015-tuning.md",
    *(f"concepts/{name}.md" for name in ("step", "scale", "flatness", "measuring")),
)


def methods_table() -> str:
    """The registry as a Markdown table."""
    rows = [
        "| method | class | gradients a step | radius, by default | kept | sparse | needs | source |",
        "|---|---|---:|---|---:|---|---|---|",
    ]
    for method in flatmin.methods().values():
        if method.factory is None:
            rows.append(f"| {method.name} | | {method.gradients:g} | | 0 | | | {method.paper} |")
            continue
        optimizer: Any = method.build(SGD([Parameter(torch.zeros(1))], lr=0.1), **dict.fromkeys(method.needs, 1))
        fixed = ", ".join(f"{k}={v!r}" for k, v in method.options.items())
        needs = [f"`{name}=`" for name in method.needs]
        needs += ["take"] * optimizer.needs_take + ["mean"] * optimizer.needs_losses
        kept, radius = len(optimizer.remembers), optimizer.param_groups[0][optimizer.radius_name]
        rows.append(
            f"| {method.name} | `{type(optimizer).__name__}({fixed})` | {method.gradients:g} "
            f"| {optimizer.radius_name} = {radius:g} | {kept} "
            f"| {'yes' if optimizer.takes_sparse else 'no'} | {', '.join(needs)} | {method.paper} |"
        )
    return "\n".join(rows)


def experiments_table() -> str:
    """The digits, each time that they were tuned: what was chosen, and what came out, less the control."""
    rows = [
        "| tuned | method | lr, weight decay, radius | validation loss | test loss less base | trace less base |",
        "|---|---|---|---:|---:|---:|",
    ]
    for name, how in EXPERIMENTS.items():
        summary, tuning = (json.loads((RECORDS / name / f"{part}.json").read_text()) for part in ("summary", "tuning"))
        for number, method in enumerate(summary["methods"]):
            best = tuning["best"][method]
            setting = ", ".join(f"{best[key]:g}" for key in KEYS if best[key] is not None)
            cells = [_versus(summary["versus"][column].get(method)) for column in ("test_loss", "trace")]
            first = f"{how}; {summary['num_seeds']} seeds" if number == 0 else ""
            rows.append(f"| {first} | {method} | {setting} | {best['validation_loss']:.4f} | {' | '.join(cells)} |")
    return "\n".join(rows)


def solar_tables() -> dict[str, str]:
    """The photos: each comparison of them, and its differences to the control."""
    found = {}
    for name in SOLAR:
        summary = json.loads((RECORDS / name / "summary.json").read_text())
        found |= {name: markdown_table(summary), f"{name}-differences": differences_table(summary)}
    return found


def decays_table() -> str:
    """Validation losses of the digits by weight decay, at the learning rate and radius that are best for the method."""
    trials = json.loads((RECORDS / "digits" / "tuning.json").read_text())["trials"]
    rows = ["| weight decay | " + " | ".join(f"{decay:g}" for decay in DECAYS) + " |", "|---|" + "---:|" * len(DECAYS)]
    for method, tried in trials.items():
        best = min(tried, key=lambda trial: trial["validation_loss"])
        line = {
            t["weight_decay"]: t["validation_loss"] for t in tried if all(t[k] == best[k] for k in ("lr", "radius"))
        }
        cells = [f"{line[decay]:.4f}" for decay in DECAYS]
        rows.append(f"| {method} (lr {best['lr']:g}{_radius(best)}) | {' | '.join(cells)} |")
    return "\n".join(rows)


def _radius(setting: dict[str, Any]) -> str:
    return "" if setting["radius"] is None else f", radius {setting['radius']:g}"


def _versus(entry: dict[str, Any] | None) -> str:
    return f"{format_difference(entry)} {SIGNS.get(entry['mark'], '')}".rstrip() if entry else ""


def suggested_table() -> str:
    """The best settings on the grids of `flatmin suggest`."""
    rows = ["| task | method | lr | weight decay | radius | validation loss |", "|---|---|---:|---:|---:|---:|"]
    for task in ("digits", "cancer", "diabetes", "solar-cells"):
        rows += _winners(task, RECORDS / ("claims" if task in ("cancer", "diabetes") else "") / task)
    return "\n".join(rows)


def solar_across_table() -> str:
    """800 gradients each, and settings from two tunings: of SGD for 800 gradients, of the others for 400 steps."""
    places = {"base": "solar-cells-800", "sam": "solar-cells-steps", "nso": "solar-cells-steps"}
    runs = {
        method: [read_run(path) for path in sorted((RECORDS / place / "records").glob(f"{method}-seed*.jsonl"))]
        for method, place in places.items()
    }
    return differences_table(summarize(runs))


def solar_settings_table() -> str:
    """The best settings for the photos, by what was equal."""
    rows = ["| equal | method | lr | weight decay | radius | validation loss |", "|---|---|---:|---:|---:|---:|"]
    for name, equal in SOLAR.items():
        rows += _winners(equal, RECORDS / name)
    return "\n".join(rows)


def _winners(what: str, place: Path) -> list[str]:
    """A row for each method's best settings; an asterisk where they are at the edge of what was tried."""
    tuning, rows = json.loads((place / "tuning.json").read_text()), []
    for method, best in tuning["best"].items():
        edges = at_edge(tuning["trials"][method])
        cells = [f"{best[key]:g}{'*' if key in edges else ''}" if best[key] is not None else "" for key in KEYS]
        rows.append(f"| {what} | {method} | {' | '.join(cells)} | {best['validation_loss']:.4f} |")
    return rows


def verdicts_table(claims: dict[str, Any], before: dict[str, Any]) -> str:
    """What is claimed, by whom, the verdict, and the verdict when settings were tuned otherwise."""
    rows = ["| claim | verdict | before |", "|---|---|---|"]
    for name, judged in claims.items():
        claim = CLAIMS[name]
        said = f"{claim.statement} ({claim.paper})."
        text = f"{' '.join(filter(None, (said, claim.here)))} `{name}`"
        earlier = "-" if claim.tasks == ("bad-start",) else before[name]["verdict"]  # was not run again
        rows.append(f"| {text} | **{judged['verdict']}** | {earlier} |")
    return "\n".join(rows)


def outcomes_table(claims: dict[str, Any]) -> str:
    """What came out on each task."""
    rows = ["| claim | task | of what | difference | p |", "|---|---|---|---:|---:|"]
    for name, judged in claims.items():
        claim = CLAIMS[name]
        for number, (task, entry) in enumerate(judged["tasks"].items()):
            first = f"{claim.better} less {claim.than}: `{name}`" if number == 0 else ""
            difference = f"{format_difference(entry)} | {entry['p']:.2g}"
            rows.append(f"| {first} | {task} | {TITLES[entry['column']]} | {difference} |")
    return "\n".join(rows)


def main() -> None:
    """Replaces what stands between `<!-- name -->` and `<!-- /name -->`."""
    summary, again, halves = (
        json.loads((RECORDS / name / "summary.json").read_text()) for name in ("digits", "digits-again", "halves")
    )
    claims, before = (
        json.loads((RECORDS / name / "claims.json").read_text())["claims"] for name in ("claims", "claims-by-hand")
    )
    peers = json.loads((ROOT / "benchmarks" / "results" / "step_peers.json").read_text())
    cost = json.loads((ROOT / "benchmarks" / "results" / "step.json").read_text())
    split = json.loads((ROOT / "benchmarks" / "results" / "split_batch.json").read_text())
    sent = json.loads((ROOT / "benchmarks" / "results" / "collectives.json").read_text())
    stopping = json.loads(STOPPING.read_text())
    measuring = json.loads((ROOT / "benchmarks" / "results" / "measuring.json").read_text())
    tables = {
        "demo": markdown_table(summary),
        "differences": differences_table(summary),
        "again": markdown_table(again),
        "again-differences": differences_table(again),
        "halves": markdown_table(halves),
        **solar_tables(),
        "solar-across": solar_across_table(),
        "solar-settings": solar_settings_table(),
        "experiments": experiments_table(),
        "decays": decays_table(),
        "rules": rules_of_tuning(json.loads(TUNING_RULES.read_text())),
        "suggested": suggested_table(),
        "verdicts": verdicts_table(claims, before),
        "outcomes": outcomes_table(claims),
        "escapes": markdown_table(json.loads((RECORDS / "claims" / "bad-start" / "summary.json").read_text())),
        "cost": cost_table(cost),
        "peers": peers_table(peers),
        "methods": methods_table(),
        "combinations": combinations_table(),
        "split": split_table(split),
        "collectives": collectives_table(sent),
        "scale": scale_table(),
        "spectrum": spectrum_table(json.loads(SPECTRUM.read_text())),
        **flatness_tables(json.loads(RECORD.read_text())),
        "measuring": measuring_tables(measuring),
        "stopping": rules_table(stopping),
        "starts": starts_table(stopping),
        "subsets": subsets_table(json.loads(SUBSETS.read_text())),
    }
    for path in (ROOT / "README.md", *(ROOT / "docs" / name for name in PAGES)):
        text = path.read_text()
        for name, table in tables.items():
            pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
            text = re.sub(pattern, lambda _, n=name, t=table: f"<!-- {n} -->\n\n{t}\n\n<!-- /{n} -->", text, flags=re.S)
        path.write_text(text)


if __name__ == "__main__":
    main()
