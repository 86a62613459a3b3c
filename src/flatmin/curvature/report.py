"""`measure`: how flat is this model on this data? One call, every number with its error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flatmin.curvature.eigen import top_eigenvalues
from flatmin.curvature.objective import Forward, Objective
from flatmin.curvature.results import EigenResult, Measurement, TraceResult
from flatmin.curvature.trace import trace


@dataclass(frozen=True, kw_only=True)
class FlatnessReport:
    """What `measure` found.

    Attributes:
        loss: the mean loss over the data (exact).
        trace: the Hessian trace, in all and per layer.
        top_eigenvalue: the largest eigenvalue(s) of the Hessian.
    """

    loss: Measurement
    trace: TraceResult
    top_eigenvalue: EigenResult

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return {name: getattr(self, name).to_dict() for name in ("loss", "trace", "top_eigenvalue")}

    def to_json(self) -> str:
        """`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def plot(self, ax: Any = None) -> Any:
        """The trace per layer, as bars. Returns the matplotlib Axes."""
        ax = self.trace.plot(ax)
        ax.set_title(f"loss {self.loss}, largest eigenvalue {self.top_eigenvalue}")
        return ax

    def __str__(self) -> str:
        rows = [
            ("loss", str(self.loss), "exact"),
            ("trace", str(self.trace), f"{self.trace.num_products} products"),
            *[(f"  {name}", str(part), "") for name, part in self.trace.per_layer.items()],
            ("trace / d", f"{self.trace.value / self.trace.num_params:.4g}", f"d = {self.trace.num_params} parameters"),
            ("lambda_max", str(self.top_eigenvalue), f"{self.top_eigenvalue.num_products} products"),
            *[(f"  lambda_{i}", str(part), "") for i, part in enumerate(self.top_eigenvalue.estimates[1:], 2)],
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        head = f"Flatness on {self.loss.num_samples} samples (value +- error)"
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([head, "-" * len(head), *lines])


def measure(
    model: nn.Module,
    criterion: Callable[[Any, Any], Tensor] | None,
    data: Iterable[Any],
    *,
    forward: Forward | None = None,
    params: Any = None,
    eval_mode: bool = True,
    rtol: float = 0.05,
    num_eigenvalues: int = 1,
    tol: float = 1e-3,
    seed: int = 0,
) -> FlatnessReport:
    """Measures how flat `model` is on `data`: loss, Hessian trace (per layer too), largest eigenvalue.

    Args:
        model: a module.
        criterion: `criterion(outputs, targets)`, a mean over the batch; `None` if the model returns its own loss.
        data: anything that can be iterated more than once and yields batches.
        forward: `forward(model, batch) -> (outputs, targets)`, for batches that are not a pair.
        params: which parameters, by name or predicate; `None` for all trainable ones.
        eval_mode: measure in evaluation mode.
        rtol: relative standard error of the trace.
        num_eigenvalues: how many of the largest eigenvalues.
        tol: relative residual of the eigenvalues.
        seed: of the probes. With a loader that shuffles, batches and so the probes' estimate also depend on torch's
            random state; pass a fixed order for the same digits every time.

    Returns:
        A FlatnessReport; `print` it, or use `.to_dict()`, `.to_json()`, `.plot()`.

    Cost: five forward passes over the data (the loss, and two before each of the others to see that it does not
    change), about 2 gradients per trace probe, 3 per Lanczos step; typically 50 to 200 gradients of the data in all.

    Raises:
        ValueError: for a model, criterion or data that Objective refuses, bad numbers, or a Hessian that is not finite.

    Example:
        print(flatmin.measure(model, nn.CrossEntropyLoss(), loader))
    """
    if num_eigenvalues < 1:
        raise ValueError(f"num_eigenvalues must be at least 1, got {num_eigenvalues}.")
    objective = Objective(model, criterion, data, forward=forward, params=params, eval_mode=eval_mode)
    loss = objective.loss()
    return FlatnessReport(
        loss=Measurement(value=loss, stderr=0.0, method="exact", num_samples=objective.num_samples),
        trace=trace(objective, rtol=rtol, seed=seed),
        top_eigenvalue=top_eigenvalues(objective, num_eigenvalues, tol=tol, seed=seed),
    )
