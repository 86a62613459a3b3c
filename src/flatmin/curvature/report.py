"""`measure`: how flat is this model on this data? One call, every number with its error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from flatmin.checks import check_whole
from flatmin.curvature.function.objective import Forward, Objective
from flatmin.curvature.results import EigenResult, Measurement, TraceResult, aligned
from flatmin.curvature.sharpness.ascent import AscentResult, ascent_sharpness
from flatmin.curvature.sharpness.average import SharpnessResult, noise_stability
from flatmin.curvature.spectra.density import DensityResult, spectral_density
from flatmin.curvature.spectra.eigen import top_eigenvalues
from flatmin.curvature.store import Store, revived
from flatmin.curvature.traces.trace import trace
from flatmin.extras import need

KINDS: dict[str, Any] = {
    "loss": Measurement,
    "trace": TraceResult,
    "top_eigenvalue": EigenResult,
    "noise_stability": SharpnessResult,
    "ascent_sharpness": AscentResult,
    "density": DensityResult,
}


@dataclass(frozen=True, kw_only=True)
class FlatnessReport:
    """What `measure` found; `None` where it was not asked for.

    Attributes:
        loss: the mean loss over the data (exact).
        trace: the Hessian trace, in all and per layer.
        top_eigenvalue: the largest eigenvalue(s) of the Hessian.
        noise_stability: the mean rise of the loss under noise.
        ascent_sharpness: the largest rise of the loss that was found in a ball.
        density: the distribution of the eigenvalues.
    """

    loss: Measurement
    trace: TraceResult
    top_eigenvalue: EigenResult
    noise_stability: SharpnessResult | None = None
    ascent_sharpness: AscentResult | None = None
    density: DensityResult | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts; only what was measured."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part.to_dict() for name, part in parts.items() if part is not None}

    def to_json(self) -> str:
        """`to_dict` as indented JSON; `from_json` reads it."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> FlatnessReport:
        """The report that `to_json` wrote, without eigenvectors; a number that was not finite is nan.

        Raises:
            ValueError: for any other text.
        """
        try:
            return cls(**{name: revived(KINDS[name], entries) for name, entries in json.loads(text).items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError("this is not a report that FlatnessReport.to_json wrote.") from error

    def plot(self, ax: Any = None) -> Any:
        """The trace per layer, as bars. Returns the matplotlib Axes. `density.plot()` draws the eigenvalues."""
        ax = self.trace.plot(ax)
        ax.set_title(f"loss {self.loss}, largest eigenvalue {self.top_eigenvalue.estimates[0]}")
        return ax

    def rows(self) -> list[tuple[str, str, str]]:
        """Name, value with error, and a note, for each number."""
        largest, *others = self.top_eigenvalue.estimates
        found = [
            ("loss", str(self.loss), "exact"),
            ("trace", str(self.trace), _products(self.trace) if self.trace.stderr else "exact"),
            *[(f"  {name}", str(part), "") for name, part in self.trace.per_layer.items()],
            ("trace / d", f"{self.trace.value / self.trace.num_params:.4g}", f"d = {self.trace.num_params} parameters"),
            ("lambda_max", str(largest), _products(self.top_eigenvalue)),
            *[(f"  lambda_{i}", str(part), "") for i, part in enumerate(others, 2)],
        ]
        if noise := self.noise_stability:
            note = f"sigma = {noise.radius:g}, {len(noise.samples)} draws{_missed(noise)}"
            found.append(("noise rise", str(noise), note))
        if ascent := self.ascent_sharpness:
            found.append(("worst rise", str(ascent), f"rho = {ascent.rho:g}, {ascent.metric}; a lower bound"))
        if density := self.density:
            found.append(("negative", str(density.negative_mass), f"share of eigenvalues < -{density.resolved:.2g}"))
        return found

    @property
    def title(self) -> str:
        """What the table is about."""
        return f"Flatness on {self.loss.num_samples} samples (value +- error)"

    def __str__(self) -> str:
        return "\n".join([self.title, "-" * len(self.title), *aligned(self.rows())])

    def __rich__(self) -> Any:
        """The table that `rich.print(report)` shows."""
        table = need("rich.table", "lab").Table(title=self.title, title_justify="left", show_header=False)
        for name, value, note in self.rows():
            style = "dim" if name.startswith(" ") else None
            table.add_row(need("rich.text", "lab").Text(name), value, need("rich.text", "lab").Text(note), style=style)
        return table


def _products(found: TraceResult | EigenResult) -> str:
    return f"{found.num_products} products{_missed(found)}"


def _missed(found: TraceResult | EigenResult | SharpnessResult) -> str:
    return "" if found.converged else ", not to the error asked for"


def measure(
    model: nn.Module | Objective,
    criterion: Callable[[Any, Any], Tensor] | None = None,
    data: Iterable[Any] | None = None,
    *,
    forward: Forward | None = None,
    params: Any = None,
    eval_mode: bool = True,
    group: Any = None,
    rtol: float = 0.05,
    method: str = "auto",
    num_eigenvalues: int = 1,
    tol: float = 1e-3,
    sigma: float | None = None,
    rho: float | None = None,
    density: bool = False,
    store: str | os.PathLike[str] | None = None,
    seed: int | None = 0,
) -> FlatnessReport:
    """Measures how flat `model` is on `data`: loss, Hessian trace (per layer too), largest eigenvalue; more on request.

    Args:
        model: a module; or an Objective, which has its own of all from `criterion` to `data` and `forward` to `group`.
        criterion: `criterion(outputs, targets)`, a mean over the batch; `None` if the model returns its own loss.
        data: anything that can be iterated more than once and yields batches.
        forward: `forward(model, batch) -> (outputs, targets)`, for batches that are not a pair.
        params: which parameters, by name or predicate; `None` for all trainable ones.
        eval_mode: measure in evaluation mode.
        group: processes that have a part of the data each (see `Objective`); all of them get the same report. Of a
            model that FSDP2 shards, the processes that hold the shards, given or not.
        rtol: relative standard error of the trace, and of the rise under noise.
        method: how the trace is estimated (see `trace`).
        num_eigenvalues: how many of the largest eigenvalues.
        tol: relative residual of the eigenvalues.
        sigma: standard deviation of the noise, for the mean rise of the loss under it; `None` leaves it out.
        rho: radius of the ball, for the largest rise of the loss in it; `None` leaves it out.
        density: whether to estimate the distribution of the eigenvalues too.
        store: a file for the results as they come: after an interrupt, the same call goes on where it stopped. With a
            group its first process reads and writes it, for all.
        seed: of the probes; `None` is really random. With a loader that shuffles, batches and so the probes' estimate
            also depend on torch's random state; pass a fixed order for the same digits every time.

    Returns:
        A FlatnessReport; `print` it, or use `.to_dict()`, `.to_json()`, `.plot()`.

    Cost: five forward passes over the data (the loss, and two before each of the others to see that it does not
    change), about 2 gradients per trace probe, 2 to 3 per Lanczos step; typically 20 to 200 gradients of the data. On
    request: `sigma`, 1 + 2 losses per draw, until `rtol` or 1,000 draws; `rho`, some tens of gradients; `density`, 440
    products, about 1,000 gradients.

    Raises:
        ValueError: for a model, criterion or data that Objective refuses, bad numbers, a Hessian that is not finite, a
            `store` that is about something else, or an Objective and arguments of one beside it.

    Example:
        print(flatmin.measure(model, nn.CrossEntropyLoss(), loader))
    """
    check_whole("num_eigenvalues", num_eigenvalues, 1)
    objective = _objective(model, criterion, data, forward=forward, params=params, eval_mode=eval_mode, group=group)
    seed = objective.members.seed(seed)
    loss = objective.loss()
    kept = Store(store, objective, loss)

    def get(name: str, kind: Any, function: Callable[..., Any], **settings: Any) -> Any:
        return kept.get(name, settings, kind, lambda: function(objective, **settings))

    return FlatnessReport(
        loss=Measurement(value=loss, stderr=0.0, method="exact", num_samples=objective.num_samples),
        trace=get("trace", TraceResult, trace, rtol=rtol, method=method, seed=seed),
        top_eigenvalue=get("top_eigenvalue", EigenResult, top_eigenvalues, k=num_eigenvalues, tol=tol, seed=seed),
        noise_stability=None
        if sigma is None
        else get("noise_stability", SharpnessResult, noise_stability, sigma=sigma, rtol=rtol, seed=seed),
        ascent_sharpness=None
        if rho is None
        else get("ascent_sharpness", AscentResult, ascent_sharpness, rho=rho, seed=seed),
        density=get("density", DensityResult, spectral_density, seed=seed) if density else None,
    )


def _objective(
    model: nn.Module | Objective,
    criterion: Callable[[Any, Any], Tensor] | None,
    data: Iterable[Any] | None,
    *,
    eval_mode: bool,
    **options: Any,
) -> Objective:
    """The one that was given, or one of these."""
    if not isinstance(model, Objective):
        if data is None:
            raise ValueError("measure(model, criterion, data) was called without data. An Objective needs none beside.")
        return Objective(model, criterion, data, eval_mode=eval_mode, **options)
    options |= {"criterion": criterion, "data": data, "eval_mode": None if eval_mode else False}
    if given := [name for name, value in options.items() if value is not None]:
        raise ValueError(f"the Objective has its own {given[0]}: leave {given[0]}= out, or give it to Objective.")
    return model
