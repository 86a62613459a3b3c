"""Flatness during training, within a share of its time.

Tracker      trace (a few probes), lambda_max (a few Lanczos steps from the last vector) and noise stability on some
fixed data, as often as `max_overhead` of the run's time allows
FreeTrace    the trace from losses that two-point noise stability optimization computes anyway
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from flatmin.checks import check_positive, check_share, check_whole
from flatmin.curvature.function.arguments import of_objective
from flatmin.curvature.function.objective import Objective
from flatmin.curvature.products.operators import HessianOperator
from flatmin.curvature.products.probes import VectorProbes, stderr
from flatmin.curvature.products.space import NUDGE, Space
from flatmin.curvature.results import Estimate, Measurement, aligned
from flatmin.curvature.sharpness.average import noise_stability
from flatmin.curvature.spectra.lanczos import Lanczos
from flatmin.extras import need
from flatmin.files import plain
from flatmin.noise import mix_seeds


@dataclass(frozen=True, kw_only=True)
class TrackPoint:
    """One measurement during training.

    Attributes:
        step: at which.
        loss: on the tracked data.
        trace: of the Hessian, with the standard error of its probes.
        num_probes: how many; the standard error has one degree of freedom less.
        lambda_max: the largest Ritz value, with its residual; from below. nan where there are no Hessian products.
        noise_stability: E L(w + u) - L(w), with its standard error; nan if no sigma was given.
        seconds: that it took.
        overhead: share of the time so far that went into measuring, this point included.
    """

    step: int
    loss: float
    trace: Estimate
    lambda_max: Estimate
    noise_stability: Estimate
    seconds: float
    overhead: float
    num_probes: int

    def __str__(self) -> str:
        return ", ".join(f"{name} {text}" for name, text in self.texts().items())

    def __repr__(self) -> str:
        return f"TrackPoint({self})"

    def texts(self) -> dict[str, str]:
        """What was measured, with its errors, by name."""
        found = {"step": str(self.step), "loss": f"{self.loss:.4g}"}
        measured = {name: getattr(self, name) for name in ("trace", "lambda_max", "noise_stability")}
        return found | {name: str(part) for name, part in measured.items() if not math.isnan(part.value)}


class Tracker:
    """Follows trace, lambda_max and noise stability of a model in training.

    A measurement is made when, going by what the last one took, all of them together stay below `max_overhead` of the
    time since the tracker was made. The first is made at the first update whatever it costs, so a short run may end
    above the bound; its share is in `overhead`.

    Args:
        objective: the model on fixed data; some hundred samples of the training set are enough to see a trend.
        max_overhead: share of the run's time that measuring may take.
        num_probes: random vectors for each trace.
        num_steps: Lanczos steps for each lambda_max, from the last one's vector.
        sigma: of the noise; `None` for no noise stability.
        seed: of everything random; `None` is really random.
        clock: seconds, as `time.perf_counter` gives them; of several processes that of the first decides.

    Cost: for each point a loss and a gradient of the data, and two gradients for each probe and Lanczos step (three for
    a step where the graphs do not fit into memory); with `sigma` three losses, and two for each probe. Memory:
    `num_steps`, rounded up to eights, and about nine copies of the parameters while it measures; one in between.

    Raises:
        ValueError: max_overhead outside (0, 1], num_probes < 2, num_steps < 1, or data that changes between passes.

    Example:
        tracker = flatmin.Tracker(flatmin.Objective(model, loss_fn, some_batches), sigma=0.01)
        for step, (x, y) in enumerate(loader):
            ...  # train
            tracker.update(step)
        tracker.plot()
    """

    @of_objective
    def __init__(
        self,
        objective: Objective,
        *,
        max_overhead: float = 0.05,
        num_probes: int = 4,
        num_steps: int = 4,
        sigma: float | None = None,
        seed: int | None = 0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        seed = objective.members.seed(seed)
        check_share("max_overhead", max_overhead, "(]")
        check_whole("num_probes", num_probes, 2)
        check_whole("num_steps", num_steps, 1)
        if sigma is not None:
            check_positive("sigma", sigma)
        objective.check()
        self._objective, self._operator = objective, HessianOperator(objective, seed=seed)
        self._max_overhead, self._sigma, self._seed, self._clock = max_overhead, sigma, seed, clock
        self._num_probes, self._num_steps = num_probes, num_steps
        self._start, self._spent, self._last = clock(), 0.0, 0.0
        self._updates = 0
        self._vector: Tensor | None = None
        self.points: list[TrackPoint] = []

    def __repr__(self) -> str:
        return f"Tracker({len(self.points)} points, {self.overhead:.2g} of the time)"

    def __str__(self) -> str:
        """A table of the points."""
        texts = [point.texts() for point in self.points]
        names = list(dict.fromkeys(name for of_point in texts for name in of_point))
        rows = [[of_point.get(name, "") for name in names] for of_point in texts]
        return "\n".join([repr(self), *(aligned([names, *rows]) if rows else [])])

    @property
    def overhead(self) -> float:
        """The share of the time since the tracker was made that went into measuring."""
        elapsed = self._clock() - self._start
        return self._spent / elapsed if elapsed > 0 else 0.0

    def update(self, step: int | None = None, *, force: bool = False) -> TrackPoint | None:
        """Measures if there is time for it.

        Args:
            step: of the training; the number of updates before this one if not given.
            force: measures in any case: at the end of a training, say. The time counts. The same on all processes.

        Returns:
            The new point, also kept in `points`; `None` if nothing was measured.
        """
        step = self._updates if step is None else step
        self._updates += 1
        begin = self._clock()
        if self.points and not force and not self._objective.members.together(self._affordable(begin - self._start)):
            return None
        try:
            found = self._measure(mix_seeds(self._seed, len(self.points)))
        finally:  # an interrupted measurement costs as well
            self._operator.release()  # training goes on, with other weights
            self._last = self._clock() - begin
            self._spent += self._last
        point = TrackPoint(step=step, seconds=self._last, overhead=self.overhead, num_probes=self._num_probes, **found)
        self.points.append(point)
        return point

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return plain({"max_overhead": self._max_overhead, "points": [asdict(point) for point in self.points]})

    def plot(self, axes: Any = None) -> Any:
        """Loss, trace, lambda_max and noise stability over the steps, with error bars. Returns an array of Axes."""
        names = ["loss", "trace", "lambda_max", *(["noise_stability"] if self._sigma is not None else [])]
        if axes is None:
            size = {"figsize": (3.2 * len(names), 3), "layout": "constrained"}
            axes = need("matplotlib.pyplot", "lab").subplots(1, len(names), **size)[1]
        steps = [point.step for point in self.points]
        for ax, name in zip(axes, names, strict=True):
            values = [getattr(point, name) for point in self.points]
            if name == "loss":
                ax.plot(steps, values, ".-", color="#0072B2")
            else:
                errors = [v.stderr for v in values]
                middle, style = [v.value for v in values], {"fmt": ".-", "lw": 1.2, "elinewidth": 0.6}
                ax.errorbar(steps, middle, yerr=errors, color="#0072B2", **style)
            ax.set_xlabel("step")
            ax.set_title(name)
        return axes

    def _affordable(self, elapsed: float) -> bool:
        """Whether another measurement like the last keeps the bound; with a bound of 1 always."""
        return self._max_overhead == 1 or self._spent + self._last <= self._max_overhead * elapsed

    def _measure(self, seed: int) -> dict[str, Any]:
        nothing = Estimate(value=math.nan, stderr=math.nan)
        trace = self._trace(seed)
        top = nothing if self._operator.way.name == "loss" else self._top(seed)
        noise = nothing
        if self._sigma is not None:
            found = noise_stability(self._objective, self._sigma, num_draws=self._num_probes, seed=seed)
            noise = Estimate(value=found.value, stderr=found.stderr)
        return {"loss": self._objective.loss(), "trace": trace, "lambda_max": top, "noise_stability": noise}

    def _trace(self, seed: int) -> Estimate:
        samples = VectorProbes(self._operator, seed).draw(0, self._num_probes).sum(1).cpu().numpy()
        return Estimate(value=float(samples.mean()), stderr=stderr(samples))

    def _top(self, seed: int) -> Estimate:
        start = self._vector
        if start is not None:
            start = Space(self._objective.params).nudged(start, NUDGE, seed)
        lanczos = Lanczos(self._operator.product, self._objective.params, seed=seed, start=start)
        while lanczos.size < self._num_steps and not lanczos.complete:
            lanczos.extend()
        theta, residuals, coordinates = lanczos.ritz()
        self._vector = lanczos.vector(coordinates[:, -1])
        return Estimate(value=float(theta[-1]), stderr=float(residuals[-1]) + lanczos.rounding)


class FreeTrace:
    """The trace of the Hessian from losses that training with two-point noise computes anyway.

    For the noise u = sigma z of a step, with f the loss of its batch,

        [f(w + u) + f(w - u) - 2 f(w)] / sigma^2 = z^T H z + O(sigma^2),      whose mean over z is tr H

    NSO computes the first two. f(w) costs nothing if its `clean_weight` is not 0, else one forward pass on the steps
    where you want a sample. It must be on the *same* batch: a running mean over other batches, or over the steps
    before, is off by its error times 2 / sigma^2, which is 20,000 at sigma = 0.01.

    Its bias: O(sigma^2) for a loss that is smooth at that scale; with ReLU, kinks within reach add a term of the order
    of the trace itself, of either sign (docs/concepts/flatness.md, "Kinks"); the weights move while it averages; and in
    training mode it is about the noisy loss of dropout and batch statistics, not the function that you deploy.

    Args:
        sigma: of the noise.
        window: samples that are averaged, the latest ones.

    Cost: no gradient; one forward pass for a sample whose `clean` loss the step does not have, and the synchronisation
    that reading a loss off a device takes. Memory: `window` numbers.

    Raises:
        ValueError: sigma that is not positive, or window < 2.

    Example:
        free = flatmin.FreeTrace(sigma=0.01)
        losses = []
        for probe in opt.probes():
            losses.append(loss_fn(model(x), y)); losses[-1].backward()
        if step % 10 == 0:
            with torch.no_grad():
                free.update(losses, clean=loss_fn(model(x), y))
        opt.step()
    """

    def __init__(self, sigma: float, window: int = 100):
        check_positive("sigma", sigma)
        check_whole("window", window, 2)
        self._sigma, self._samples = sigma, deque[float](maxlen=window)
        self._count = 0

    def update(self, losses: Iterable[float | Tensor], clean: float | Tensor) -> None:
        """Adds a sample.

        Args:
            losses: at w + u and w - u (of every pair, if there are several), on one batch.
            clean: at w, on the same batch.

        Raises:
            ValueError: if the number of losses is odd: half of a pair does not cancel the gradient.
        """
        values = [float(loss) for loss in losses]
        if not values or len(values) % 2:
            raise ValueError(f"losses must be pairs, at w + u and w - u; got {len(values)}.")
        self._samples.append(2 * (math.fsum(values) / len(values) - float(clean)) / self._sigma**2)
        self._count += 1

    def estimate(self) -> Measurement:
        """The mean of the window, with its standard error."""
        samples = np.array(self._samples)
        return Measurement(
            value=float(samples.mean()) if len(samples) else math.nan,
            stderr=stderr(samples),
            method=f"second differences of losses at sigma = {self._sigma:g}, {len(samples)} of {self._count} samples; "
            "bias O(sigma^2) where the loss is smooth",
            num_samples=len(samples),
        )
