"""`flatmin reproduce`: runs what the claims need, and says which the records support."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from flatmin.files import write_json
from flatmin.lab.claims.claim import Claim, judge
from flatmin.lab.claims.of_papers import CLAIMS
from flatmin.lab.compare import Compare, read_runs
from flatmin.lab.display import PLAIN, format_difference
from flatmin.lab.folder import check_counts, read_config
from flatmin.lab.pool import IF_STOPPED
from flatmin.lab.records import environment
from flatmin.lab.summary import COLUMNS
from flatmin.optim.registry import unknown

FORMAT = "flatmin-claims/1"
TITLES = {column.key: column.title for column in COLUMNS}


@dataclass(kw_only=True)
class Reproduce:
    """Put claims of the papers to the test on real data: supported, not supported, or inconclusive.

    Each claim says that one method is better than another. Both run on the same seeds at equal gradient budget, tuned
    alike on validation data; the verdict is computed from paired tests by a rule that was fixed beforehand. Writes one
    comparison for each task into <out>/, and claims.json. Interrupted, it continues where it stopped.
    """

    claims: tuple[str, ...] = ()
    """Which, by name. Default: all."""
    num_seeds: int = 20
    """Seeds of every comparison."""
    out: Path = Path("runs/claims")
    """Where the comparisons and claims.json are kept."""
    jobs: int = 2
    """Runs at the same time, one thread each."""
    if_stopped: ClassVar[str] = IF_STOPPED

    def run(self) -> None:
        """Runs the comparisons, prints the verdicts, writes claims.json.

        Raises:
            ValueError: for an unknown claim.
        """
        check_counts(num_seeds=self.num_seeds, jobs=self.jobs)
        chosen = [_claim(name) for name in self.claims or CLAIMS]
        tasks = dict.fromkeys(task for claim in chosen for task in claim.tasks)
        for task in tasks:
            methods = needed(task, chosen)
            Compare(task=task, methods=methods, num_seeds=self.num_seeds, out=self.out, jobs=self.jobs).run()
        comparisons = {task: read_runs(self.out / task, read_config(self.out / task)) for task in tasks}
        found = {claim.name: judge(claim, comparisons) for claim in chosen}
        path = self.out / "claims.json"
        write_json(path, {"format": FORMAT, **environment(), "claims": {**_earlier(path), **found}})
        print_claims(found)
        print(f"claims: {path}")


def _earlier(path: Path) -> dict[str, Any]:
    """Claims that were judged before."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record["claims"] if isinstance(record, dict) and record.get("format") == FORMAT else {}


def _claim(name: str) -> Claim:
    if name not in CLAIMS:
        raise ValueError(unknown("claim", name, CLAIMS))
    return CLAIMS[name]


def needed(task: str, claims: Sequence[Claim]) -> tuple[str, ...]:
    """The methods that the claims compare on a task, after the control of its table: base, where any claim needs it."""
    here = [claim for claim in CLAIMS.values() if task in claim.tasks]
    control = "base" if any("base" in (claim.than, claim.better) for claim in here) else here[0].than
    methods = (method for claim in claims if task in claim.tasks for method in (claim.than, claim.better))
    return tuple(dict.fromkeys((control, *methods)))


def print_claims(claims: Mapping[str, Any], console: Console | None = None) -> None:
    """The verdicts, each with its claim and what came out on each task: the difference, its 95% interval, p."""
    console = console or Console()
    for name, judged in claims.items():
        claim = CLAIMS[name]
        console.print(f"[bold]{name}[/]: {judged['verdict']}\n  {claim.statement}.", highlight=False)
        console.print(f"  {claim.better} less {claim.than}:", highlight=False)
        for task, entry in judged["tasks"].items():
            found = outcome(entry).replace("±", PLAIN["interval"] if console.options.ascii_only else "±")
            console.print(f"    {task:14} {found}", highlight=False)


def outcome(entry: Mapping[str, Any]) -> str:
    """`Hessian trace +0.62 ±0.12, p = 4.6e-09`."""
    diverged = f", {' and '.join(map(str, entry['diverged']))} runs diverged" if any(entry["diverged"]) else ""
    return f"{TITLES[entry['column']]} {format_difference(entry)}, p = {entry['p']:.2g}{diverged}"
