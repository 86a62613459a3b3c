"""The report of a comparison: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatmin.curvature.results import rounded
from flatmin.extras import need
from flatmin.files import write_text
from flatmin.lab.display import (
    SIGNS,
    budget_line,
    confounded_note,
    format_cell,
    format_difference,
    not_trained,
    trace_error,
)
from flatmin.lab.fingerprint import FIRST_BASE
from flatmin.lab.parts import split_name
from flatmin.lab.records import RunRecord
from flatmin.lab.report import charts
from flatmin.lab.summary import LEVEL, shown

TEMPLATE = Path(__file__).parent / "report.html.j2"
TITLES = {
    "test_accuracy": "test accuracy",
    "test_loss": "test loss",
    "trace": "Hessian trace",
    "trace_per_loss": "trace over loss",
    "adaptive_sharpness": "adaptive sharpness",
}


def write_report(path: Path, summary: dict[str, Any], runs: Mapping[str, Sequence[RunRecord]]) -> Path:
    """Writes the report; returns its path. Text is escaped by jinja2; pictures are inline SVG."""
    jinja2 = need("jinja2", "lab")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    safe = jinja2.filters.Markup
    first = next((r for records in runs.values() for r in records), None)
    html = template.render(
        summary=summary,
        about=summary["about"],
        rows=_rows(summary),
        differences=_differences(summary),
        SIGNS=SIGNS,
        confounded=confounded_note(summary),
        budget=budget_line(summary),
        verdict=_verdict(summary),
        figures=[(title, note, safe(svg)) for title, note, svg in charts.figures(runs)],
        untested=[column.title for column in shown(summary) if not column.better],
        settings=[_settings(name, records[0].header) for name, records in runs.items() if records],
        header=first.header if first else {},
        messages=[m for entry in summary["methods"].values() for m in entry["messages"]],
        untrained=[not_trained(n, e["untrained"]) for n, e in summary["methods"].items() if e["untrained"]],
    )
    write_text(path, html)
    return path


def _rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for column in shown(summary):
        cells = []
        for name, entry in summary["methods"].items():
            versus = summary["versus"].get(column.key, {}).get(name)
            cells.append(
                {
                    **_in_two_lines(format_cell(entry["columns"][column.key])),
                    "best": summary["best"].get(column.key) == name,
                    "mark": None if versus is None else versus["mark"],
                    "note": _trace_note(entry) if column.key == "trace" else "",
                }
            )
        rows.append({"title": column.title, "cells": cells})
    return rows


def _differences(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Each method less the control, with the interval of that difference: what these seeds could have shown."""
    rows = []
    for column in shown(summary):
        versus = summary["versus"].get(column.key)
        if versus:
            cells = [
                {**_in_two_lines(format_difference(v)), "mark": v["mark"], "note": _p_value(v["p"])}
                for v in versus.values()
            ]
            rows.append({"title": column.title, "cells": cells})
    return rows


def _in_two_lines(text: str) -> dict[str, str]:
    """A number and, below it, its interval; with a power of ten for both they stay together."""
    value, _, interval = text.partition(" ") if "(" not in text else (text, "", "")
    return {"value": value, "interval": interval}


def _p_value(p: float | None) -> str:
    return "not tested" if p is None else f"p = {p:.2g}"


def _settings(name: str, header: Mapping[str, Any]) -> dict[str, Any]:
    """What the method used: a record may have a weight decay that it did not."""
    method, given = split_name(name)[0], header["spec"]["settings"]
    return {
        "name": name,
        "base": "SGD" if method.replaces_momentum else header.get("task", {}).get("base", FIRST_BASE),
        "lr": given["lr"],
        "weight_decay": "-" if method.replaces_momentum else given["weight_decay"],
        "radius": _radius(method.radius_name, given["radius"]),
        "parts": given.get("parts", {}),
    }


def _radius(name: str | None, radius: float | None) -> str:
    return "-" if name is None else f"{name} {'by default' if radius is None else radius}"


def _trace_note(entry: dict[str, Any]) -> str:
    return "" if entry["trace_stderr"] is None else f"each trace {trace_error(entry['trace_stderr'])}"


def _verdict(summary: dict[str, Any]) -> list[str]:
    """One sentence per method: whether it generalises better than the control here, and whether it is flatter.

    By accuracy, where there is one, and loss. Where a low loss takes curvature with it, the trace over the loss is
    said, too; and what has no part in the scale of the weights, where it was measured.
    """
    control, *others = summary["methods"]
    score = "test_accuracy" if "test_accuracy" in summary["versus"] else "test_loss"
    keys = dict.fromkeys((score, "test_loss", "trace", "trace_per_loss", "adaptive_sharpness"))
    sentences = []
    for name in others:
        versus = {key: summary["versus"].get(key, {}).get(name) for key in keys}
        versus = {key: v for key, v in versus.items() if v is not None and v["difference"] is not None}
        if not {score, "trace"} <= versus.keys():
            sentences.append(f"{name}: no finished run to compare with {control}.")
            continue
        said = [
            f"{TITLES[key]} {_change(key, v['difference'], summary['methods'][control])} ({_significance(v)})"
            for key, v in versus.items()
        ]
        sentences.append(f"{name} against {control}: {', '.join(said)}.")
    return sentences


def _change(key: str, difference: float, control: dict[str, Any]) -> str:
    if key == "test_accuracy":
        return f"{rounded(difference, 2):+.2f} points"
    before = control["columns"][key]["mean"]
    change = 100 * difference / before if before else float("nan")
    return f"{rounded(change, 1):+.1f}%" if key == "test_loss" else f"{rounded(change, 0):+.0f}%"


def _significance(versus: dict[str, Any]) -> str:
    p = versus["p"]
    if p is None:
        return "not tested: too few seeds, or the same difference on each"
    if versus["mark"] == "confounded":
        return f"p = {p:.1g}, but at a {'higher' if versus['difference'] < 0 else 'lower'} training loss"
    return f"p = {p:.1g}" if p < LEVEL else f"not significant, p = {p:.2g}"
