"""The loss along one or two directions from the weights: a picture, with the directions said.

A random direction looks flat or sharp with the size of the weights alone, which a ReLU network can change without
changing the function; so random directions are scaled filter by filter to the weights' own size (Li et al. 2018). Two
random directions in a million dimensions show little of the worst ones: look along eigenvectors as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flatmin.checks import check_number, check_whole
from flatmin.curvature.function.arguments import check_vector, of_objective
from flatmin.curvature.function.objective import Objective
from flatmin.curvature.sharpness.far import displaced_by
from flatmin.extras import need
from flatmin.files import plain
from flatmin.noise import Noise, filter_norms, times_norms
from flatmin.radii import Radii
from flatmin.shards import is_sharded, part_of
from flatmin.vectors import Vector


@dataclass(frozen=True, kw_only=True)
class LossSlice:
    """The loss on a line or a plane through the weights.

    Attributes:
        coordinates: of the points, (num_points,) for every direction; in units of the directions.
        losses: at the points: one list for a line, a list of rows (first direction) for a plane.
        labels: what the directions are.
        num_samples: samples in the data.
    """

    coordinates: tuple[tuple[float, ...], ...] = field(repr=False)
    losses: tuple[Any, ...] = field(repr=False)
    labels: tuple[str, ...]
    num_samples: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return plain({name: getattr(self, name) for name in ("coordinates", "losses", "labels", "num_samples")})

    def __str__(self) -> str:
        values = np.array(self.losses)
        along = [f"{label} ({x[0]:g} .. {x[-1]:g})" for label, x in zip(self.labels, self.coordinates, strict=True)]
        found = [self._at("lowest", values, values.argmin()), self._at("highest", values, values.argmax())]
        if all(0.0 in axis for axis in self.coordinates):
            here = tuple(axis.index(0.0) for axis in self.coordinates)
            found.insert(0, f"{values[here]:.4g} at the weights")
        points = " x ".join(map(str, values.shape))
        return f"Loss along {' and '.join(along)}, {points} points, {self.num_samples} samples: {', '.join(found)}."

    def _at(self, which: str, values: np.ndarray, index: Any) -> str:
        where = np.unravel_index(index, values.shape)
        coordinates = ", ".join(f"{axis[i]:.3g}" for axis, i in zip(self.coordinates, where, strict=True))
        return f"{which} {values[where]:.4g} at {coordinates}"

    def plot(self, ax: Any = None) -> Any:
        """A curve, or contours of the loss. Returns the matplotlib Axes."""
        ax = need("matplotlib.pyplot", "lab").subplots()[1] if ax is None else ax
        ax.set_xlabel(self.labels[0])
        if len(self.coordinates) == 1:
            ax.plot(self.coordinates[0], self.losses, color="#0072B2")
            ax.axvline(0, color="#999999", lw=0.8, ls=":")
            ax.set_ylabel("loss")
            return ax
        values = np.array(self.losses).T  # the first direction is drawn to the right
        low, high = values.min(), values.max()
        if low > 0 and high > 10 * low:
            drawn, label = np.log10(values), "log10 of the loss"
        else:
            drawn, label = values, "loss"
        filled = ax.contourf(*self.coordinates, drawn, levels=20, cmap="viridis")
        ax.figure.colorbar(filled, ax=ax, label=label)
        ax.plot(0, 0, "+", color="white", ms=10)
        ax.set_ylabel(self.labels[1])
        return ax


@of_objective
def loss_slice(
    objective: Objective,
    *directions: Vector,
    span: float | Sequence[float] = 1.0,
    num_points: int = 21,
    labels: Iterable[str] | None = None,
) -> LossSlice:
    """The loss L(w + a d) on a line, or L(w + a d1 + b d2) on a plane, through the weights.

    Args:
        objective: what to measure.
        directions: one or two: `random_direction(objective)`, eigenvectors (`top_eigenvalues(..., vectors=True)`), or
            `direction_to(objective, other.state_dict())`.
        span: coordinates from -span to span, or from the first to the second number, in units of the directions.
        num_points: on each axis. An odd number of a symmetric span has the weights themselves among the points.
        labels: of the axes.

    Cost: num_points losses of the data for a line, num_points^2 for a plane. Memory: two copies of the parameters
    beside the directions.

    Raises:
        ValueError: not one or two directions, one of another objective, num_points < 2, an empty span, or a loss that
            is not finite at a point.

    Example:
        flatmin.loss_slice(objective, flatmin.random_direction(objective)).plot()

    Source: Goodfellow, Vinyals, Saxe 2015 (lines); Li et al. 2018 (planes, filter-normalised).
    """
    low, high = (-span, span) if isinstance(span, (int, float)) else span
    names = [f"direction {i}" for i in range(1, 1 + len(directions))] if labels is None else list(labels)
    if len(directions) not in (1, 2):
        raise ValueError(
            f"a slice has one or two directions, got {len(directions)}. Eigenvectors are kept by top_eigenvalues(..., "
            "vectors=True) only."
        )
    for direction in directions:
        if isinstance(direction, tuple | list):
            raise ValueError("give eigenvectors one by one: loss_slice(objective, *result.vectors).")
        check_vector("a direction", direction, objective.params)
    if len(names) != len(directions):
        raise ValueError(f"{len(directions)} directions have {len(names)} labels.")
    check_whole("num_points", num_points, 2)
    if not check_number("span", low) < check_number("span", high):
        raise ValueError(f"the span must not be empty, got {low} .. {high}.")
    # From the ends inwards, so that the middle of a symmetric span is 0 exactly.
    axis = [((num_points - 1 - i) * low + i * high) / (num_points - 1) for i in range(num_points)]
    losses = _losses(objective, directions, np.array(axis))
    return LossSlice(
        coordinates=(tuple(axis),) * len(directions),
        losses=tuple(losses.tolist() if len(directions) == 1 else map(tuple, losses.tolist())),
        labels=tuple(names),
        num_samples=objective.num_samples,
    )


@of_objective
def random_direction(objective: Objective, *, seed: int | None = 0) -> Vector:
    """A random direction in which every filter is as long as that of the weights; a vector (a bias) counts as one.

    Args:
        objective: whose parameters.
        seed: of the direction; `None` is really random.

    Source: Li et al. 2018 (filter normalisation).
    """
    seed = objective.members.seed(seed)
    params = objective.params
    noise = Noise(params, Radii([1.0] * len(params)), "normal", seed).vector()
    lengths = zip(filter_norms(params), filter_norms(noise.present), strict=True)
    return times_norms(noise, [wanted / own for wanted, own in lengths])


@of_objective
def direction_to(objective: Objective, state: Mapping[str, Tensor]) -> Vector:
    """From the weights to those of a checkpoint of the same model: 0 is here, 1 is there.

    Buffers, such as the statistics of batch norm, stay as they are here.

    Args:
        objective: whose parameters.
        state: a `state_dict`; of a sharded model either whole or sharded in the same way.

    Raises:
        ValueError: for a parameter that the checkpoint lacks, or has in another shape.
    """
    if isinstance(state, nn.Module):
        raise ValueError("a checkpoint is a mapping from names to tensors: pass model.state_dict().")
    parts = []
    for name, p in zip(objective.names, objective.params, strict=True):
        if name not in state or state[name].shape != p.shape:
            what = tuple(state[name].shape) if name in state else "nothing"
            raise ValueError(f"the checkpoint has {what} for {name!r}, the model {tuple(p.shape)}.")
        there = state[name].detach()
        there = part_of(there, p) if is_sharded(p) and not is_sharded(there) else there
        parts.append(there.to(p.device, p.dtype) - p.detach())
    return Vector(parts)


@torch.no_grad()
def _losses(objective: Objective, directions: tuple[Vector, ...], axis: np.ndarray) -> np.ndarray:
    totals, count = np.zeros((len(axis),) * len(directions)), 0
    with objective.displaced() as place:
        for batch in objective.batches():
            for index in np.ndindex(totals.shape):
                place.move(_displacement(directions, [float(axis[i]) for i in index]))
                with displaced_by("span"):
                    totals[index] += float(batch.evaluate().loss.double()) * batch.size
            place.move(None)
            count += batch.size
    return objective.mean(torch.from_numpy(totals), count).cpu().numpy()


def _displacement(directions: tuple[Vector, ...], coordinates: list[float]) -> Vector | None:
    """The sum of the directions times their coordinates, in memory of its own; `None` is at the weights."""
    total = None
    for direction, a in zip(directions, coordinates, strict=True):
        if a:
            total = direction * a if total is None else total.add_(direction, a)
    return total
