"""The pictures of a comparison, as SVG text."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from flatmin.extras import need
from flatmin.lab.records import RunRecord

Runs = Mapping[str, Sequence[RunRecord]]

# Colour-blind safe (Okabe, Ito 2008), in the order of the methods.
COLOURS = ("#444444", "#E69F00", "#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#F0E442")
STYLE = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "font.size": 10,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "flatmin",  # the same records give the same file
}


def figures(runs: Runs) -> list[tuple[str, str, str]]:
    """(title, note, svg) of each picture."""
    finished = {name: [r for r in records if r.finished] for name, records in runs.items()}
    finished = {name: records for name, records in finished.items() if records}
    if not finished:
        return []
    band = "Mean over seeds and 95% interval."
    return [
        ("Training", f"Against gradients spent, so that methods are at equal cost. {band}", _svg(_curves, finished)),
        ("Trace per layer", f"At the end, on the training data. {band}", _svg(_layers, finished)),
        (
            f"{_score(finished).title} against trace",
            "One point per seed, with the standard error of its trace. Flatter is to the left.",
            _svg(_scatter, finished),
        ),
    ]


@dataclass(frozen=True)
class Score:
    """What a method is judged by: the accuracy, or the loss where targets are no labels."""

    key: str
    title: str
    label: str
    scale: float


ACCURACY = Score("test_accuracy", "Accuracy", "test accuracy, %", 100)
LOSS = Score("test_loss", "Test loss", "test loss", 1)


def _score(runs: Runs) -> Score:
    found = all(ACCURACY.key in r.result for records in runs.values() for r in records)
    return ACCURACY if found else LOSS


def _svg(draw: Any, runs: Runs) -> str:
    matplotlib = need("matplotlib", "lab")
    with matplotlib.rc_context(STYLE):
        figure = need("matplotlib.figure", "lab").Figure(figsize=(9, 3.6), layout="constrained")
        draw(figure, runs, dict(zip(runs, _cycle(len(runs)), strict=True)))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return re.sub(r'width="[^"]*pt" height="[^"]*pt"', 'width="100%"', svg[svg.index("<svg") :], count=1)


def _cycle(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]


def _curves(figure: Any, runs: Runs, colours: Mapping[str, str]) -> None:
    left, right = figure.subplots(1, 2)
    score = _score(runs)
    for name, records in runs.items():
        gradients, lines = _common(records)
        if not gradients:
            continue
        for axes, key, scale in ((left, "train_loss", 1), (right, score.key, score.scale)):
            values = scale * np.array([[p[key] for p in run] for run in lines])
            if key == "train_loss":  # on a logarithmic axis the interval is that of the logarithms
                mean, half = _interval(np.log(np.maximum(values, 1e-12)))
                mean, low, high = np.exp(mean), np.exp(mean - half), np.exp(mean + half)
            else:
                mean, half = _interval(values)
                low, high = mean - half, mean + half
            axes.plot(gradients, mean, color=colours[name], label=name, marker="o" if len(gradients) < 3 else None)
            axes.fill_between(gradients, low, high, color=colours[name], alpha=0.15, lw=0)
            axes.set_xlabel("mini-batch gradients")
    left.set_yscale("log")
    left.set_ylabel("training loss (geometric mean)")
    right.set_ylabel(score.label)
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper")


def _common(records: Sequence[RunRecord]) -> tuple[list[int], list[list[dict[str, Any]]]]:
    """Where all runs have progress lines, and these: runs of another version may have more of them."""
    found = [{p["gradients"]: p for p in run.progress} for run in records]
    gradients = sorted(set.intersection(*(set(lines) for lines in found)))
    return gradients, [[lines[g] for g in gradients] for lines in found]


def _layers(figure: Any, runs: Runs, colours: Mapping[str, str]) -> None:
    axes = figure.subplots()
    layers = list(next(iter(runs.values()))[0].result["flatness"]["trace"]["per_layer"])
    width = 0.8 / len(runs)
    for i, (name, records) in enumerate(runs.items()):
        parts = [r.result["flatness"]["trace"]["per_layer"] for r in records]
        mean, half = _interval(np.array([[part[layer]["value"] for layer in layers] for part in parts]))
        at = np.arange(len(layers)) + (i - (len(runs) - 1) / 2) * width
        axes.bar(at, mean, width, yerr=half, color=colours[name], label=name, capsize=2, error_kw={"lw": 1})
    axes.set_xticks(range(len(layers)), [f"layer {name}" for name in layers])
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("Hessian trace")
    figure.legend(loc="outside right upper")


def _scatter(figure: Any, runs: Runs, colours: Mapping[str, str]) -> None:
    axes = figure.subplots()
    score = _score(runs)
    for name, records in runs.items():
        traces = [r.result["flatness"]["trace"] for r in records]
        axes.errorbar(
            [t["value"] for t in traces],
            [score.scale * r.result[score.key] for r in records],
            xerr=[t["stderr"] for t in traces],
            fmt="o",
            ms=5,
            lw=1,
            color=colours[name],
            label=name,
            alpha=0.8,
        )
    axes.set_xlabel("Hessian trace of the training loss")
    axes.set_ylabel(score.label)
    figure.legend(loc="outside right upper")


def _interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n = len(values)
    mean = values.mean(0)
    if n < 2:
        return mean, np.zeros_like(mean)
    return mean, stdtrit(n - 1, 0.975) * values.std(0, ddof=1) / np.sqrt(n)
