"""`flatmin landscape`: a picture of the loss around weights, or between the weights of several files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from rich.console import Console
from torch import Tensor

from flatmin.curvature import LossSlice, Objective, direction_to, loss_slice, random_direction, top_eigenvalues
from flatmin.extras import need
from flatmin.files import write_json
from flatmin.lab.checkpoints.subject import Subject
from flatmin.lab.display import note
from flatmin.lab.records import environment, make_writable
from flatmin.lab.weights import weights_for
from flatmin.vectors import Vector

FORMAT = "flatmin-landscape/1"
AROUND, BETWEEN = (-1.0, 1.0), (-0.5, 1.5)
NUM_POINTS = {1: 41, 2: 21}


@dataclass(kw_only=True)
class Landscape(Subject):
    """Draw the loss around weights, on the line from one file of weights to another, or on the plane of three.

    Writes a picture into <out>, and its numbers beside it. Between files 0 is the first, 1 the other. Around one, along
    random directions, each filter as long as the weights' own (1 is once the weights); or along the eigenvectors of the
    largest eigenvalues, of length 1.
    """

    along: Literal["random", "eigenvectors"] | None = None
    """Directions from a single file of weights. Default: random."""
    num_dims: Literal[1, 2] | None = None
    """Around a single file: a line or a plane. Default: 2."""
    span: tuple[float, float] | None = None
    """From where to where, in units of the directions. Default: -1 1 around weights, -0.5 1.5 between them."""
    num_points: int | None = None
    """On each axis. Default: 41 on a line, 21 on a plane."""
    out: Path | None = None
    """Where pictures are kept. Default: runs/landscape-<task>."""
    if_stopped: ClassVar[str] = "Nothing is kept of a picture that is not finished."

    def run(self) -> None:
        """Evaluates, draws, and says where.

        Raises:
            ValueError: for weights, a task or an objective that is not right, or a loss that is not finite on the way.
        """
        if len(self.weights) > 3:
            raise ValueError(f"a picture has room for three files of weights, got {len(self.weights)}.")
        self.begin()
        if len(self.weights) > 1 and (self.along, self.num_dims) != (None, None):
            raise ValueError(
                "--along and --num-dims are for one file of weights; with several, the files are the directions."
            )
        folder = Path("runs") / f"landscape-{self.name}" if self.out is None else self.out
        make_writable(folder)
        labels, (_, objective, seed) = self.labels(), next(self.objectives())
        with Console(stderr=True).status("the loss at each point"):
            directions, names = self._directions(objective, labels, seed)
            found = self._slice(objective, directions, names)
        path = folder / f"{self._stem(labels)}.png"
        about = {**self.about(), "seed": seed}
        write_json(path.with_suffix(".json"), {"format": FORMAT, **environment(), **about, **found.to_dict()})
        draw(found, labels, self.what, path)
        print(f"From {labels[0]}, on {self.what}{'' if self.objective else f', seed {seed}'}. {found}\npicture: {path}")

    def _stem(self, labels: Sequence[str]) -> str:
        """Of the files: what the picture shows."""
        around = f"-{self.along or 'random'}-{self.num_dims or 2}d" if len(labels) == 1 else ""
        return "-to-".join(labels) + around

    def _slice(self, objective: Objective, directions: list[Vector], names: list[str]) -> LossSlice:
        span = self.span or (AROUND if len(self.weights) < 2 else BETWEEN)
        points = NUM_POINTS[len(directions)] if self.num_points is None else self.num_points
        return loss_slice(objective, *directions, span=span, num_points=points, labels=names)

    def _directions(self, objective: Objective, labels: list[str], seed: int) -> tuple[list[Vector], list[str]]:
        """From the first weights, and what each is."""
        if len(labels) > 1:
            states = [weights_for(objective.model, path) for path in self.weights[1:]]
            for label, state in zip(labels[1:], states, strict=True):
                _compare_buffers(objective, labels[0], label, state)
            return [direction_to(objective, state) for state in states], [f"to {label}" for label in labels[1:]]
        num_dims = self.num_dims or 2
        if self.along != "eigenvectors":
            names = ["random direction, scaled to the filters", "another random direction"]
            seeds = range(seed, seed + num_dims)
            return [random_direction(objective, seed=s) for s in seeds], names[:num_dims]
        top = top_eigenvalues(objective, num_dims, vectors=True, seed=seed)
        return list(top.vectors), [f"eigenvector of {value:.3g}" for value in top.values]


def _compare_buffers(objective: Objective, here: str, there: str, state: Mapping[str, Tensor]) -> None:
    """Says so where the loss at the other weights is another one with their own buffers."""
    model = objective.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = {name for name, _ in model.named_buffers()}
    try:
        model.load_state_dict({name: before[name] if name in buffers else state[name] for name in before})
        drawn = objective.loss()
        model.load_state_dict(dict(state))
        own = objective.loss()
    finally:
        model.load_state_dict(before)
    if abs(drawn - own) > 0.01 * abs(own):
        everywhere = f"the picture has the buffers of {here} (statistics of batch norm) everywhere"
        note(f"{everywhere}. With them the loss at {there} is {drawn:.4g}; with its own it is {own:.4g}.")


def draw(found: LossSlice, labels: Sequence[str], what: str, path: Path) -> None:
    """The slice, with the other weights marked; logarithmic where the loss spans more than a factor of ten."""
    plt = need("matplotlib.pyplot", "lab")
    figure, ax = plt.subplots(figsize=(7, 5), layout="constrained")
    found.plot(ax)
    where = f"around {labels[0]}" if len(labels) == 1 else f"between {' and '.join(labels)}"
    ax.set_title(f"loss {where}, {what}", fontsize=10)
    is_line, others = len(found.coordinates) == 1, labels[1:]
    for point, label in zip(((1, 0), (0, 1)), others, strict=False):
        if is_line:
            ax.axvline(1, color="#999999", lw=0.8, ls=":")
        else:
            ax.plot(*point, "x", color="white", ms=8)
            ax.annotate(label, point, textcoords="offset points", xytext=(6, 6), color="white")
    if is_line:
        ax.set_yscale("log" if 0 < 10 * min(found.losses) < max(found.losses) else "linear")
    else:
        ax.annotate(labels[0], (0, 0), textcoords="offset points", xytext=(6, 6), color="white")
    figure.savefig(path, dpi=150)
    plt.close(figure)
