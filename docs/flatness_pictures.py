"""The pictures and tables of docs/concepts/flatness.md, from docs/records/flatness.json.

`python -m docs.flatness_pictures` draws; `python -m docs.refresh` writes the tables.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import flatmin
from docs.flatness import RECORD
from flatmin.curvature.results import format_estimate
from flatmin.curvature.store import revived
from flatmin.extras import need
from flatmin.lab.report.charts import COLOURS, STYLE

PICTURES = Path(__file__).parent / "pictures"


def numbers_table(found: dict[str, Any]) -> str:
    """Every measure of the one network, as Markdown."""
    n, density = found["model"]["numbers"], revived(flatmin.DensityResult, found["model"]["density"])
    rows = [
        ("loss", f"{n['loss']:.4g}"),
        ("norm of the gradient", f"{n['gradient_norm']:.4g}"),
        ("trace of H", format_estimate(**n["trace"])),
        ("trace / d", f"{n['trace']['value'] / n['num_params']:.4g}"),
        ("lambda_max", format_estimate(**n["lambda_max"])),
        (f"share of the eigenvalues below -{density.resolved:.2g}", str(density.negative_mass)),
        ("noise stability, sigma = 0.02", format_estimate(**n["noise"])),
        ("half sigma^2 tr H", f"{0.02**2 / 2 * n['trace']['value']:.4g}"),
        ("average-direction sharpness, rho = 0.2", format_estimate(**n["average"])),
        ("rho^2 / (2 d) tr H", f"{0.2**2 / 2 * n['trace']['value'] / n['num_params']:.4g}"),
        ("one step of SAM, rho = 0.2", f"{n['one_step']:.4g}"),
        ("ascent sharpness, rho = 0.2", f">= {n['ascent']:.4g}"),
        ("half rho^2 lambda_max", f"{0.2**2 / 2 * n['lambda_max']['value']:.4g}"),
        ("rho times the norm of the gradient", f"{0.2 * n['gradient_norm']:.4g}"),
    ]
    return "\n".join(["| number | value |", "|---|---:|", *[f"| {name} | {value} |" for name, value in rows]])


def rescaling_table(found: dict[str, Any]) -> str:
    """The measures of one function at several scales of its layers, as Markdown."""
    rows = {
        "trace": lambda r: f"{r['trace']['value']:.4g}",
        "lambda_max": lambda r: f"{r['lambda_max']['value']:.4g}",
        "noise stability, sigma = 0.02": lambda r: f"{r['noise']['value']:.3g}",
        "ascent, rho = 0.2": lambda r: f"{r['ascent']:.3g}",
        "noise stability, filter scale, 0.05": lambda r: f"{r['noise_filter']['value']:.3g}",
        "ascent, adaptive, rho = 0.5": lambda r: f"{r['ascent_adaptive']:.3g}",
    }
    runs = found["rescaled"]
    heads = [f"{r['factor']}" + ", half of its units" * (r["units"] < 32) for r in runs]
    lines = [f"| first layer times | {' | '.join(heads)} |", "|---|" + "---:|" * len(runs)]
    lines += [f"| {name} | {' | '.join(cell(r) for r in runs)} |" for name, cell in rows.items()]
    return "\n".join(lines)


def matched_table(found: dict[str, Any]) -> str:
    """The ratio of the traces at several losses and for several trainings, as Markdown."""
    runs = found["saturated"]["comparisons"]
    losses = list(dict.fromkeys(run["loss"] for run in runs))
    lines = [f"| trace of NSO over SGD at loss | {' | '.join(f'{x:g}' for x in losses)} |"]
    lines.append("|---|" + "---:|" * len(losses))
    for seed in dict.fromkeys(run["seed"] for run in runs):
        own = {run["loss"]: run for run in runs if run["seed"] == seed}
        cells = [f"{format_estimate(**own[x]['ratio'])} (p = {own[x]['p']:.2g})" for x in losses]
        lines.append(f"| batches of seed {seed} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bounds_table(found: dict[str, Any]) -> str:
    """What each size of the noise certifies, as Markdown."""
    runs = found["bounds"]["by_sigma"]
    rows = {
        "sigma": [f"{run['sigma']:g}" for run in runs],
        "error on the training data, with noise": [f"{run['training']:.3f}" for run in runs],
        "bound of the error on new data": [f"{run['bound']:.3f}" for run in runs],
    }
    lines = [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join([lines[0], "|---|" + "---:|" * len(runs), *lines[1:]])


def sentences(found: dict[str, Any]) -> str:
    """What the comparison and the bounds say, as quotes."""
    texts = (found["bounds"]["classical"]["sentence"], found["bounds"]["paper"]["sentence"])
    return bounds_table(found) + "\n\n" + "\n>\n".join(f"> {text}" for text in texts)


def matched_sentence(found: dict[str, Any]) -> str:
    """The comparison at matched loss, as a quote."""
    return f"> {found['saturated']['sentence']}\n\n{matched_table(found)}"


def flatness_tables(found: dict[str, Any]) -> dict[str, str]:
    """What stands between the markers of the page."""
    return {
        "flatness": numbers_table(found),
        "rescaling": rescaling_table(found),
        "matched": matched_sentence(found),
        "bounds": sentences(found),
    }


def draw() -> None:
    """Draws all pictures from the record."""
    found = json.loads(RECORD.read_text())
    PICTURES.mkdir(exist_ok=True)
    matplotlib = need("matplotlib", "lab")
    for name, function, size in (
        ("density", draw_density, (6.5, 3.2)),
        ("noise", draw_noise, (6.5, 3.2)),
        ("batches", draw_batches, (6.5, 3.0)),
        ("saturated", draw_saturated, (8.5, 3.2)),
        ("slices", draw_slices, (8.5, 3.4)),
    ):
        with matplotlib.rc_context(STYLE):
            figure = need("matplotlib.figure", "lab").Figure(figsize=size, layout="constrained")
            function(figure, found)
            figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})


def draw_density(figure: Any, found: dict[str, Any]) -> None:
    """The density of the eigenvalues, by the library."""
    revived(flatmin.DensityResult, found["model"]["density"]).plot(figure.subplots())


def draw_slices(figure: Any, found: dict[str, Any]) -> None:
    """Two planes through the same weights, by the library."""
    for axes, (name, plane) in zip(figure.subplots(1, 2), found["model"]["planes"].items(), strict=True):
        revived(flatmin.LossSlice, plane).plot(axes).set_title(f"along {name}" + " directions" * (name == "random"))
        axes.set_xlabel(f"distance along {plane['labels'][0]}")
        axes.set_ylabel(f"distance along {plane['labels'][1]}")


def draw_noise(figure: Any, found: dict[str, Any]) -> None:
    """What noise of each size implies for the trace, over the trace."""
    axes = figure.subplots()
    for colour, (name, curve) in zip(COLOURS[2:], found["noise"].items(), strict=False):
        trace = curve["trace"]["value"]
        values = [e["value"] / trace for e in curve["implied"]]
        errors = [2 * e["stderr"] / trace for e in curve["implied"]]
        axes.errorbar(curve["sigmas"], values, yerr=errors, color=colour, label=name, marker="o", ms=3, lw=1.2)
    axes.axhline(1, color="#444444", lw=0.8, ls=":")
    axes.set_xscale("log")
    axes.set_xlabel("sigma")
    axes.set_ylabel("2 rise / sigma^2, over tr H")
    axes.legend()


def draw_batches(figure: Any, found: dict[str, Any]) -> None:
    """Trace and lambda_max of batches, over those of the whole data."""
    axes, runs = figure.subplots(), found["batches"]
    for colour, name in zip(COLOURS[2:], ("lambda_max", "trace"), strict=False):
        axes.plot([r["size"] for r in runs], [r[name] / runs[-1][name] for r in runs], "o-", color=colour, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("samples in the batch")
    axes.set_ylabel("mean over batches, over the whole")
    axes.legend()


def draw_saturated(figure: Any, found: dict[str, Any]) -> None:
    """Trace over steps and over loss, for two trainings."""
    left, right = figure.subplots(1, 2)
    for colour, (name, points) in zip(COLOURS[2:], found["saturated"]["curves"].items(), strict=False):
        traces = [p["trace"]["value"] for p in points]
        left.plot([p["step"] for p in points], traces, color=colour, label=name)
        right.plot([p["loss"] for p in points], traces, "o", ms=3, color=colour, label=name)
    right.axvline(found["saturated"]["matched"]["loss"], color="#444444", lw=0.8, ls=":", label="lowest common loss")
    right.set_xscale("log")
    right.invert_xaxis()
    for axes, label in ((left, "step"), (right, "training loss")):
        axes.set_yscale("log")
        axes.set_xlabel(label)
    left.set_ylabel("Hessian trace")
    right.legend()


if __name__ == "__main__":
    draw()
