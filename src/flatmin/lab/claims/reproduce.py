"""`flatmin reproduce`: runs what the claims need, and says which the records support."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from flatmin.lab.claims.claim import Claim, judge
from flatmin.lab.claims.of_papers import CLAIMS
from flatmin.lab.compare import Compare, read_runs
from flatmin.lab.display import format_difference
from flatmin.lab.folder import check_counts, read_config
from flatmin.lab.pool import IF_STOPPED
from flatmin.lab.records import environment, write_json
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
        write_json(path, {"format": FORMAT, "num_seeds": self.num_seeds, **environment(), "claims": found})
        print_claims(found)
        print(f"claims: {path}")


def _claim(name: str) -> Claim:
    if name not in CLAIMS:
        raise ValueError(unknown("claim", name, CLAIMS))
    return CLAIMS[name]


def needed(task: str, claims: list[Claim]) -> tuple[str, ...]:
    """The methods that the claims compare on a task; the control first, if it is one of them."""
    methods = dict.fromkeys(method for claim in claims if task in claim.tasks for method in (claim.than, claim.better))
    return tuple(sorted(methods, key=lambda method: method != "base"))


def print_claims(found: dict[str, Any], console: Console | None = None) -> None:
    """The verdicts, one row for each claim and task."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("claim", "task", "in", "difference", "p", "verdict"):
        table.add_column(title, justify="right" if title in ("difference", "p") else "left")
    for name, judged in found.items():
        for number, (task, entry) in enumerate(judged["tasks"].items()):
            first = (name, judged["verdict"]) if number == 0 else ("", "")
            p = "-" if entry["p"] is None else f"{entry['p']:.2g}"
            table.add_row(first[0], task, TITLES[entry["column"]], format_difference(entry), p, first[1])
    (console or Console()).print(table)


def markdown(found: dict[str, Any]) -> str:
    """The verdicts as a Markdown table, one row for each claim."""
    lines = ["| claim | here | verdict |", "|---|---|---|"]
    for name, judged in found.items():
        claim = CLAIMS[name]
        parts = [
            f"{task}: {TITLES[entry['column']]} {format_difference(entry)}{_p(entry['p'])}"
            for task, entry in judged["tasks"].items()
        ]
        lines.append(f"| {claim.statement} | {'; '.join(parts)} | **{judged['verdict']}** |")
    return "\n".join(lines)


def _p(p: float | None) -> str:
    return "" if p is None else f" (p = {p:.2g})"
