"""What the terminal shows: live progress, and the table of a comparison."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from flatmin.lab.summary import Column, shown

MARKS = {"better": "▲", "worse": "▼", "confounded": "†"}  # against the control


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


def format_cell(column: Column, cell: dict[str, Any]) -> str:
    """`91.20 +- 0.40`, or a dash without data."""
    if cell["mean"] is None:
        return "-"
    text = f"{cell['mean']:.{column.digits}f}"
    if cell["half_width"] is None or len(set(cell["values"])) == 1:
        return text
    return f"{text} ±{cell['half_width']:.{column.digits}f}"


def trace_error(error: float) -> str:
    """The error of one run's trace, in a table."""
    return f"±{error:.2f}" if error else "exact"


def print_table(summary: dict[str, Any], console: Console | None = None) -> None:
    """The comparison as a table: mean and 95% interval over seeds; bold where significantly best."""
    console = console or Console()
    title = f"{summary['task']}: mean ± 95% interval over {summary['num_seeds']} seeds"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    names = list(summary["methods"])
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for column in shown(summary):
        row = []
        for name in names:
            text = format_cell(column, summary["methods"][name]["columns"][column.key]).replace(" ±", "±")
            if summary["best"].get(column.key) == name:
                text = f"[bold green]{text} *[/]"
            row.append(text)
        table.add_row(column.title, *row)
        if column.key == "trace":
            errors = [summary["methods"][name]["trace_stderr"] for name in names]
            table.add_row("  error of a trace", *["-" if e is None else trace_error(e) for e in errors])
    console.print(table)
    if summary["num_seeds"] >= 3 and len(names) > 1:
        console.print("* better than every other method: paired t-test over seeds, Holm, p < 0.05.")
    console.print(budget_line(summary))
    if summary.get("mixed_versions"):
        console.print(f"[yellow]{escape(summary['mixed_versions'])}[/]", highlight=False)
    for name in names:
        for message in summary["methods"][name]["messages"]:
            console.print(f"[red]diverged[/]: {escape(message)}", highlight=False)


def differences_table(summary: dict[str, Any]) -> str:
    """Each method less the control, by seeds, with the 95% interval of that difference; Markdown."""
    control, *others = summary["methods"]
    columns = [c for c in shown(summary) if c.better]
    lines = [f"| less {control} | {' | '.join(c.title for c in columns)} |", "|---|" + "---:|" * len(columns)]
    for name in others:
        cells = []
        for column in columns:
            difference, half = (summary["versus"][column.key][name][k] for k in ("difference", "half_width"))
            text = "-" if difference is None else f"{difference:+.{column.digits}f}"
            cells.append(text if half is None else f"{text} ±{half:.{column.digits}f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown_table(summary: dict[str, Any]) -> str:
    """The comparison as a Markdown table, one method a row; bold where significantly best."""
    columns = [c for c in shown(summary) if c.key != "steps"]
    lines = [f"| | {' | '.join(c.title for c in columns)} |", "|---|" + "---:|" * len(columns)]
    for name, entry in summary["methods"].items():
        cells = [format_cell(c, entry["columns"][c.key]) for c in columns]
        best = [f"**{t}**" if summary["best"].get(c.key) == name else t for c, t in zip(columns, cells, strict=True)]
        lines.append(f"| {name} | {' | '.join(best)} |")
    return "\n".join(lines)
