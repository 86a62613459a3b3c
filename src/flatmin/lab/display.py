"""What the terminal shows: live progress, and the table of a comparison."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from flatmin.curvature.results import format_estimate
from flatmin.lab.summary import shown

# The marks against the control, and what stands before an interval; PLAIN where the output is not in Unicode.
SIGNS = {"better": "▲", "worse": "▼", "confounded": "†", "interval": "±"}
PLAIN = {"better": "+", "worse": "-", "confounded": "?", "interval": "+-"}
STYLES = {"better": "green", "worse": "red", "confounded": "dim"}


class Live:
    """Live progress of a comparison: one line for all runs, one for each that is under way."""

    def __init__(self, total: int, done: int, folder: str):
        self._console = Console()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
        )
        note = f"{done} finished before" if done else ""
        self._all = self._progress.add_task(folder, total=total, completed=done, note=note)
        self._runs: dict[str, TaskID] = {}

    def update(self, name: str, step: int, num_steps: int, loss: float) -> None:
        """Moves the line of one run."""
        if name not in self._runs:
            self._runs[name] = self._progress.add_task(f"  {name}", total=num_steps, note="")
        self._progress.update(self._runs[name], completed=step, note=f"loss {loss:.4f}")

    def done(self, name: str) -> None:
        """Takes the line of a finished run away."""
        if name in self._runs:
            self._progress.remove_task(self._runs.pop(name))
        self._progress.advance(self._all)

    def stopping(self) -> None:
        """Says why it is not over yet: a worker hears of the end at the next step of its run."""
        self._progress.update(self._all, note="stopping")
        self._progress.refresh()

    def __enter__(self) -> Live:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def budget_line(summary: dict[str, Any]) -> str:
    """One sentence on what was equal."""
    if summary["budget"] == "gradients":
        return (
            f"Equal gradient budget: {summary['amount']} mini-batch gradients a run, so a method that needs two "
            "gradients a step takes half the steps."
        )
    return f"Equal steps: {summary['amount']} a run, so a method that needs two gradients a step costs twice as much."


def confounded_note(summary: dict[str, Any]) -> str:
    """What a dagger says; nothing without one."""
    if all(entry["mark"] != "confounded" for versus in summary["versus"].values() for entry in versus.values()):
        return ""
    return (
        "Different, but the lower value is at the higher training loss, which alone lowers it: it counts neither way."
    )


def format_cell(cell: dict[str, Any]) -> str:
    """`91.20 ±0.40`, a number without its interval where it has none, or a dash without data."""
    if cell["mean"] is None:
        return "-"
    if cell["half_width"] is None or len(set(cell["values"])) == 1:
        return f"{cell['mean']:.0f}" if abs(cell["mean"]) >= 1000 else f"{cell['mean']:.4g}"
    if len(cell["values"]) == 2:  # whose interval is so wide that it would leave the mean no digits
        return f"{cell['mean']:.4g} ±{cell['half_width']:.2g}"
    return _interval(cell["mean"], cell["half_width"])


def format_difference(versus: Mapping[str, Any]) -> str:
    """`+0.26 ±0.44`, or a dash where no seed has both."""
    if versus["difference"] is None:
        return "-"
    return _interval(versus["difference"], versus["half_width"] or 0.0, "+")


def _interval(mean: float, half_width: float, sign: str = "") -> str:
    return format_estimate(mean, half_width, sign).replace("+- ", "±")


def trace_error(error: float) -> str:
    """The error of one run's trace, in a table."""
    return f"±{error:.2g}" if error else "exact"


def print_table(summary: dict[str, Any], console: Console | None = None) -> None:
    """The comparison, one method a row: mean and 95% interval over seeds; in as many tables as the width asks for."""
    console = console or Console()
    names, signs = list(summary["methods"]), PLAIN if console.options.ascii_only else SIGNS
    seeds = f"{summary['num_seeds']} seed{'s' if summary['num_seeds'] != 1 else ''}"
    about = f"mean {signs['interval']} 95% interval over {seeds}"
    console.print(f"{escape(summary['task'])}: {about}", highlight=False)
    print_columns(names, _columns(summary, signs), console)
    if summary["num_seeds"] >= 3 and len(names) > 1:
        console.print(
            f"{signs['better']} better, {signs['worse']} worse than {names[0]}; * better than every other method, too: "
            "paired t-tests over seeds, Holm, p < 0.05.",
            highlight=False,
        )
    if note := confounded_note(summary):
        console.print(f"{signs['confounded']} {note}")
    console.print(budget_line(summary))
    if summary.get("mixed_versions"):
        console.print(f"[yellow]{escape(summary['mixed_versions'])}[/]", highlight=False)
    for name in names:
        for message in summary["methods"][name]["messages"]:
            console.print(f"[red]diverged[/]: {escape(message)}", highlight=False)
        if seeds := summary["methods"][name]["untrained"]:
            console.print(f"[yellow]not trained[/]: {escape(not_trained(name, seeds))}", highlight=False)


def not_trained(name: str, seeds: Sequence[str]) -> str:
    """A sentence for the runs of a method that ended where they began."""
    return f"{name}, {', '.join(seeds)}. They count like the others, and may decide what is told apart."


def note(text: str) -> None:
    """What a user should know beside the results: on stderr, so that it is no part of them."""
    print(f"flatmin: note: {text}", file=sys.stderr)


def print_columns(names: Sequence[str], columns: Sequence[tuple[str, list[Text]]], console: Console) -> None:
    """A row for each name, in as many tables as the width asks for; a column is its title and its cells."""
    while columns:
        count = next((n for n in range(len(columns), 1, -1) if _fits(console, _table(names, columns[:n]))), 1)
        console.print(_table(names, columns[:count]))
        columns = columns[count:]


def _columns(summary: dict[str, Any], signs: Mapping[str, str]) -> list[tuple[str, list[Text]]]:
    """Title and cells of each; the error of a trace stands beside it."""
    columns = []
    for column in shown(summary):
        columns.append((column.title, _marked(summary, column.key, signs)))
        if column.key == "trace":
            errors = [entry["trace_stderr"] for entry in summary["methods"].values()]
            texts = ["-" if e is None else trace_error(e).replace("±", signs["interval"]) for e in errors]
            columns.append(("error of each", [Text(text) for text in texts]))
    return columns


def _marked(summary: dict[str, Any], key: str, signs: Mapping[str, str]) -> list[Text]:
    """The cells of a column, each with its mark; numbers stay below each other."""
    best, versus = summary["best"].get(key), summary["versus"].get(key, {})
    width = 2 if best or any(entry["mark"] for entry in versus.values()) else 0
    cells = []
    for name, entry in summary["methods"].items():
        mark, is_best = versus.get(name, {}).get("mark"), name == best
        sign = ("*" if is_best else signs.get(mark, "")).rjust(width)
        number = format_cell(entry["columns"][key]).replace(" ±", signs["interval"])
        cells.append(Text.assemble((number, "bold green" if is_best else ""), (sign, STYLES.get(mark, "bold green"))))
    return cells


def _table(names: Sequence[str], columns: Sequence[tuple[str, list[Text]]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for title, cells in columns:
        title = title.replace(" / ", "/ ")  # no line of a slash alone
        width = max(len(part) for part in (*title.split(), *(cell.plain for cell in cells)))
        table.add_column(textwrap.fill(title, width), justify="right", vertical="bottom", no_wrap=True)
    for name, *cells in zip(names, *(cells for _, cells in columns), strict=True):
        table.add_row(Text(name), *cells)
    return table


def _fits(console: Console, table: Table) -> bool:
    unbounded = console.options.update_width(10_000)
    return Measurement.get(console, unbounded, table).maximum <= console.width


def differences_table(summary: dict[str, Any]) -> str:
    """Each method less the control, by seeds, with the 95% interval of that difference; Markdown."""
    control, *others = summary["methods"]
    columns = [c for c in shown(summary) if c.better]
    lines = [f"| less {control} | {' | '.join(c.title for c in columns)} |", "|---|" + "---:|" * len(columns)]
    for name in others:
        cells = [format_difference(summary["versus"][column.key][name]) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown_table(summary: dict[str, Any]) -> str:
    """The comparison as a Markdown table, one method a row; bold where significantly best."""
    columns = [c for c in shown(summary) if c.key != "steps"]
    lines = [f"| | {' | '.join(c.title for c in columns)} |", "|---|" + "---:|" * len(columns)]
    for name, entry in summary["methods"].items():
        cells = [format_cell(entry["columns"][c.key]) for c in columns]
        best = [f"**{t}**" if summary["best"].get(c.key) == name else t for c, t in zip(columns, cells, strict=True)]
        lines.append(f"| {name} | {' | '.join(best)} |")
    return "\n".join(lines)
