"""What a method is: a generator that asks for gradients near the weights and returns a direction.

    g = yield HERE                       the gradient at the weights
    g = yield displacement               the gradient at W + displacement
    yield Probe(displacement, weight=c)  add c times that gradient to a running sum; nothing is handed back
    return direction                     what the base optimizer gets; None means the running sum

With g the gradient at the weights, and r = rho g / |g|:

    base         g = yield HERE; return g
    SAM          g = yield HERE; return (yield r)
    NSO          yield Probe(u, weight=1/2); yield Probe(-u, weight=1/2)

A rule never touches a parameter, never calls a loss, and does not know the base optimizer. So it can be run on a
paper function (`drive`) as well as inside a training step (`flatmin.optim.engine.optimizer`).

A gradient that is handed out may be kept: it is copied before the next one could be written over it. What shares its
memory (`radii.select(g)`) is not; so keep g.

The weighted form exists because it needs no memory: the gradients of several probes add up where backward leaves
them, so that a step has one unscaling, one clipping and one all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flatmin.optim.engine.misuse import NOT_CHOSEN, NOT_PER_SAMPLE, NOT_TAKEN
from flatmin.optim.parts import Part, num_rows, take_rows
from flatmin.vectors import Displacement, Vector


class Probe:
    """A request for one gradient: at this displacement, on this part of the batch.

    Attributes:
        displacement: where, relative to the weights; `None` is at the weights.
        weight: `None` hands the gradient to the rule; a number adds `weight` times the gradient to the sum
            that becomes the direction.
        part: which samples are evaluated; `None` is all of the batch.
        choose: maps the per-sample losses (n,) to those that count; `None` is all of them.
        ascent: the gradient only says where the next probe is, so that with several processes each may take its own.
        at_weights: whether this probe evaluates at the unperturbed weights.
    """

    __slots__ = ("_used", "ascent", "at_weights", "choose", "displacement", "part", "weight")

    def __init__(
        self,
        displacement: Displacement | None = None,
        weight: float | None = None,
        part: Part | None = None,
        choose: Callable[[Tensor], Tensor] | None = None,
        ascent: bool = False,
    ):
        self.displacement = displacement
        self.weight = weight
        self.part = part
        self.choose = choose
        self.ascent = ascent
        self.at_weights = displacement is None
        self._used = False

    def release(self) -> Displacement | None:
        """Gives the displacement away: while the caller evaluates, nobody should hold its memory."""
        displacement, self.displacement = self.displacement, None
        return displacement

    def take(self, *batch: Any) -> Any:
        """The part of the batch that this probe is evaluated on: all of it for most rules.

        Args:
            batch: tensors with the samples in their leading dimension, or dicts, lists and tuples of them.

        Returns:
            The same, with the samples of this probe only. One argument comes back as it is, several as a tuple.

        Raises:
            ValueError: where a part is asked for, if there is no tensor to count samples by, or the batch is too small
                to be split.
        """
        if self.part is not None:
            self._used = True
            batch = take_rows(batch, self.part(num_rows(batch)))
        return batch[0] if len(batch) == 1 else batch

    def mean(self, losses: Tensor) -> Tensor:
        """The mean of per-sample losses (n,) over the samples that this probe is about: all of them for most rules.

        Raises:
            ValueError: for losses that are not one for each sample, of a rule that chooses samples by them.
        """
        if self.choose is not None:
            self._used = True
            if losses.ndim != 1:
                raise ValueError(NOT_PER_SAMPLE.format(shape=tuple(losses.shape)))
            losses = self.choose(losses)
        return losses.mean()

    def check_used(self) -> None:
        """Raises a `ValueError` if the caller evaluated everything where only a part was asked for."""
        if not self._used and (self.part is not None or self.choose is not None):
            raise ValueError(NOT_TAKEN if self.part is not None else NOT_CHOSEN)


@dataclass(slots=True, eq=False)
class Update:
    """A direction for the base optimizer, and a vector that is subtracted from the weights after its step.

    Attributes:
        direction: what the base optimizer gets.
        drift: each parameter loses `lr * drift` after the base step, lr that of its group.
    """

    direction: Vector
    drift: Vector


HERE = Probe()
ASCENT = Probe(ascent=True)  # at the weights, only to find the way up
NOTHING = Vector(())  # what a rule receives for a weighted probe

Rule = Generator[Probe | Displacement, Vector, Vector | Update | None]


def plain() -> Rule:
    """The base optimizer: direction `g(W)`. One gradient."""
    return (yield HERE)


class Requests:
    """The probes that a rule asks for, and in the end its direction.

    A weighted probe hands nothing back. So the rule is asked for the next one before it is evaluated, and it is known
    whether the sum goes on.

    Attributes:
        direction: what the rule returned, once `next` has given `None`.
        ahead: the probe after a weighted one, if there is one.
    """

    def __init__(self, rule: Rule):
        self.direction: Vector | Update | None = None
        self.ahead: Probe | None = None
        self._rule = rule
        self._is_ahead = False

    def next(self, found: Vector | None) -> Probe | None:
        """The next probe; `found` is the gradient of the last one (`None` before the first)."""
        probe = self.ahead if self._is_ahead else self._ask(found)
        self._is_ahead = probe is not None and probe.weight is not None
        self.ahead = self._ask(NOTHING) if self._is_ahead else None
        return probe

    def _ask(self, found: Vector | None) -> Probe | None:
        try:
            request = self._rule.send(found)  # type: ignore[arg-type]
            # A bare displacement is a probe that hands its gradient to the rule.
            return request if isinstance(request, Probe) else Probe(request)
        except StopIteration as stop:
            self.direction = stop.value
            return None


def drive(rule: Rule, point: Sequence[Tensor], gradient: Callable[[list[Tensor]], Vector]) -> Vector:
    """Runs a rule on a function instead of a network and returns its direction (with its drift, if any, added).

    Args:
        rule: the generator, e.g. `sam(Radii([0.05]))`.
        point: the tensors of the point W; they are not changed.
        gradient: maps a list of tensors (a point) to the gradient there.

    Example:
        >>> import torch
        >>> from flatmin.optim.sam import sam
        >>> from flatmin.radii import Radii
        >>> from flatmin.vectors import Vector
        >>> direction = drive(sam(Radii([1.0])), [torch.tensor([3.0, 4.0])], Vector)  # f = |W|^2 / 2
        >>> direction.tensors[0]  # W + W / |W|
        tensor([3.6000, 4.8000])
    """
    requests, found = Requests(rule), None
    total: Vector | None = None
    while (probe := requests.next(found)) is not None:
        there = [t.clone() for t in point]
        if (displacement := probe.release()) is not None:
            displacement.add_to(there)
        found = gradient(there)
        if probe.weight is not None:
            part = found * probe.weight
            total = part if total is None else total + part
    direction = total if requests.direction is None else requests.direction
    assert direction is not None, "the rule returned no direction and collected none"
    return direction.direction + direction.drift if isinstance(direction, Update) else direction
