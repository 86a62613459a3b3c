"""`flatmin measure`: how flat the weights of one or more files are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rich.console import Console
from rich.text import Text

from flatmin.curvature import FlatnessReport, Objective, measure
from flatmin.curvature.products.graph import first_line
from flatmin.curvature.store import OtherMeasurement
from flatmin.extras import need
from flatmin.files import write_json
from flatmin.lab.checkpoints.subject import Subject
from flatmin.lab.display import print_columns
from flatmin.lab.records import environment, make_writable

FORMAT = "flatmin-measure/1"
CLOSE = 0.1  # relative difference of losses up to which traces may be compared as they are


@dataclass(kw_only=True)
class Measure(Subject):
    """Measure how flat the loss is: trace and largest eigenvalues of the Hessian, each with its error; more on request.

    Writes <out>/measure.json, and for each file of weights a picture. What is measured is kept, so that an interrupted
    command continues, and one with more options measures what is new.
    """

    rtol: float = 0.05
    """Relative standard error of the trace and of the rise under noise (exact traces have none)."""
    num_eigenvalues: int = 1
    """How many of the largest eigenvalues."""
    sigma: float | None = None
    """Standard deviation of noise, for the mean rise of the loss under it."""
    rho: float | None = None
    """Radius of a ball, for the largest rise of the loss in it."""
    density: bool = False
    """Estimate the distribution of the eigenvalues too (about 1,000 gradients of the data)."""
    out: Path | None = None
    """Where results are kept. Default: runs/measure-<task>."""
    json: bool = False
    """Print what measure.json holds, in place of a table."""
    if_stopped: ClassVar[str] = "What is measured is kept; the same command goes on."

    def run(self) -> None:
        """Measures, prints, and writes measure.json and pictures.

        Raises:
            ValueError: for weights, a task or an objective that is not right, and numbers that cannot be measured.
        """
        self.begin()
        folder = Path("runs") / f"measure-{self.name}" if self.out is None else self.out
        make_writable(folder)
        reports: dict[str, FlatnessReport] = {}
        seeds: dict[str, int] = {}
        with Console(stderr=True).status("") as status:
            for i, (label, objective, seed) in enumerate(self.objectives(), 1):
                status.update(Text(f"measuring {label} ({i} of {len(self.labels())})"))
                seeds[label] = seed
                reports[label] = self._measure(label, objective, seed, folder / f"{label}.kept.json")
                draw(reports[label], f"{label}, {self.what}", folder / f"{label}.png")
        plain = {label: report.to_dict() for label, report in reports.items()}
        content = {"format": FORMAT, **environment(), **self.about(), "seeds": seeds, "reports": plain}
        write_json(folder / "measure.json", content)
        if self.json:
            print((folder / "measure.json").read_text(encoding="utf-8"), end="")
            return
        console = Console()
        own = list(dict.fromkeys(seeds.values()))
        chosen = "" if self.objective else f", seed{'s' if len(own) > 1 else ''} {', '.join(map(str, own))}"
        console.print(f"{' '.join(reports) if len(reports) == 1 else 'Each'} on {self.what}{chosen}:", highlight=False)
        show(reports, console)
        print(f"results and pictures: {folder}")

    def _measure(self, label: str, objective: Objective, seed: int, kept: Path) -> FlatnessReport:
        try:
            return self._kept_or_new(objective, seed, kept)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
        except (RuntimeError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{label} cannot be measured: {type(error).__name__}: {first_line(error)}") from error

    def _kept_or_new(self, objective: Objective, seed: int, kept: Path) -> FlatnessReport:
        """What is kept of the same weights and data is used; of others it makes room."""
        try:
            return self._with(objective, seed, kept)
        except OtherMeasurement:
            kept.unlink()
            return self._with(objective, seed, kept)

    def _with(self, objective: Objective, seed: int, kept: Path) -> FlatnessReport:
        return measure(
            objective,
            rtol=self.rtol,
            num_eigenvalues=self.num_eigenvalues,
            sigma=self.sigma,
            rho=self.rho,
            density=self.density,
            store=kept,
            seed=seed,
        )


def show(reports: Mapping[str, FlatnessReport], console: Console) -> None:
    """One report with its layers; of several a row each."""
    if len(reports) == 1:
        console.print(*reports.values())
        return
    print_columns(list(reports), columns(reports), console)
    losses = [report.loss.value for report in reports.values()]
    if max(losses) - min(losses) > CLOSE * abs(max(losses)):
        console.print(
            "Their losses differ, and the curvature of cross-entropy vanishes with the loss: compare trace / loss, or "
            "measure them where the losses are equal.",
            highlight=False,
        )


def columns(reports: Mapping[str, FlatnessReport]) -> list[tuple[str, list[Text]]]:
    """Title and cells, one for each report."""
    found = [dict(_numbers(report)) for report in reports.values()]
    names = dict.fromkeys(name for numbers in found for name in numbers)
    return [(name, [Text(numbers.get(name, "-")) for numbers in found]) for name in names]


def _numbers(report: FlatnessReport) -> list[tuple[str, str]]:
    """What a table has of a report, without the layers."""
    loss, trace = report.loss.value, report.trace
    largest = [(f"lambda_{i}", str(part)) for i, part in enumerate(report.top_eigenvalue.estimates, 1)]
    rises = [
        ("noise rise", report.noise_stability),
        ("worst rise", report.ascent_sharpness),
    ]
    density = report.density
    negative = [] if density is None else [("negative", f"{density.negative_mass} below -{density.resolved:.2g}")]
    return [
        ("loss", str(report.loss)),
        ("trace", str(trace)),
        *([("trace / loss", f"{trace.value / loss:.4g}")] if loss > 0 else []),
        ("trace / d", f"{trace.value / trace.num_params:.4g}"),
        *largest,
        *((name, str(part)) for name, part in rises if part is not None),
        *negative,
    ]


def draw(report: FlatnessReport, label: str, path: Path) -> None:
    """The trace per layer, and the eigenvalues if their distribution was measured."""
    plt = need("matplotlib.pyplot", "lab")
    parts = [report, *([report.density] if report.density else [])]
    figure, axes = plt.subplots(1, len(parts), figsize=(6 * len(parts), 4), squeeze=False, layout="constrained")
    for part, ax in zip(parts, axes[0], strict=True):
        part.plot(ax)
    figure.suptitle(label)
    figure.savefig(path, dpi=150)
    plt.close(figure)
