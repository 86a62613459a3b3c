"""Batches of any kind: how one is evaluated if nothing else is said, and how many samples it holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from flatmin.curvature.function.objective import Objective

Shape = tuple[int, ...]

NO_COUNT = (
    "the number of samples of a batch cannot be told: no tensor with a batch dimension was found in {what}. Let "
    "forward=lambda model, batch: (outputs, targets) return targets with a batch dimension."
)
SINGLE = (
    "the targets of a batch have no batch dimension. If data is a Dataset, its items are single samples: pass "
    "DataLoader(dataset, batch_size=...)."
)
NO_BATCHES = "the data has no batches: an empty loader has no loss to measure."
ARRAYS = (
    "The inputs are a numpy array. Pass tensors: data=[(torch.from_numpy(x), torch.from_numpy(y))], or a DataLoader, "
    "which makes them."
)
DEPTH = 6  # how deep samples are looked for; objects may refer to each other in circles


@dataclass(frozen=True)
class Evaluated:
    """A batch after a forward pass: its mean loss, and the outputs and targets that it came from."""

    loss: Tensor
    outputs: Any
    targets: Any


class Batch:
    """A batch that can be evaluated, at the weights as they are, as often as needed."""

    def __init__(self, objective: Objective, content: Any, samples: SampleCount):
        self._objective, self._content, self._samples = objective, content, samples
        self._size: int | None = None

    @property
    def size(self) -> int:
        """The number of samples; known after the first evaluation."""
        assert self._size is not None
        return self._size

    def evaluate(self) -> Evaluated:
        """A forward pass, with its graph if gradients are enabled."""
        outputs, targets = self._objective.forward(self._content)
        if self._size is None:
            self._size = self._samples.add(self._content, targets)
        return Evaluated(self._objective.batch_loss(outputs, targets, self._size), outputs, targets)


def pair(found: Any) -> tuple[Any, Any]:
    """(outputs, targets), if that is what `forward` returned: a tensor of two rows could be unpacked too."""
    if not (isinstance(found, tuple | list) and len(found) == 2):
        raise ValueError(
            f"forward must return (outputs, targets), got {type(found).__name__}. For a model that returns its own "
            "loss: criterion=None, forward=lambda model, batch: (model(**batch), None)."
        )
    return found[0], found[1]


def check_data(data: Iterable[Any]) -> Iterable[Any]:
    """`data`, if it can be iterated more than once and is not a single batch."""
    if isinstance(data, Iterator):
        raise ValueError(
            f"data is a one-shot iterator ({type(data).__name__}), but measuring takes several passes. Pass a "
            "DataLoader or a list of batches."
        )
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        raise ValueError("data is an (inputs, targets) pair, not a list of batches: write [(inputs, targets)].")
    return data


def is_empty(data: Any) -> bool:
    """Whether there are no batches, as far as a length says."""
    try:
        return len(data) == 0
    except TypeError:  # a loader of an IterableDataset has a __len__ that raises
        return False


def forward_pair(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """Evaluates the model on an (inputs, targets) pair, on the device of its parameters."""
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise ValueError(
            f"a batch is a {type(batch).__name__}, not an (inputs, targets) pair. Say how to evaluate it with "
            "forward=lambda model, batch: (outputs, targets)."
        )
    device = next(model.parameters()).device
    inputs, targets = (x.to(device) if isinstance(x, Tensor) else x for x in batch)
    try:
        return model(inputs), targets
    except Exception as error:
        if isinstance(inputs, np.ndarray):
            error.add_note(ARRAYS)
        raise


def count_samples(batch: Any, targets: Any) -> int | None:
    """The leading dimension of the first tensor that has one: in the targets, else in the batch.

    Mappings, sequences and the attributes of objects are looked into. Targets that are a list of mappings are one
    mapping per sample (detection). `None` if there are only numbers: a function without samples.

    Raises:
        ValueError: if the targets are scalars beside a batch that has samples, or if nothing was found although there
            are things in the batch that may hold samples.
    """
    if isinstance(targets, list) and targets and all(isinstance(t, Mapping) for t in targets):
        return len(targets)
    size, of_targets = _first(targets)
    if size is not None:
        return size
    size, of_batch = _first(batch)
    if size is not None and () in of_targets:
        raise ValueError(SINGLE)
    if size is None and None in of_targets | of_batch:
        raise ValueError(NO_COUNT.format(what=f"a {type(batch).__name__}"))
    return size


class SampleCount:
    """Counts the samples of batches; those without samples count as 1 if all of a pass are without."""

    def __init__(self) -> None:
        self._counted: bool | None = None

    def add(self, batch: Any, targets: Any) -> int:
        """The number of samples of this batch."""
        size = count_samples(batch, targets)
        if self._counted not in (None, size is not None):
            raise ValueError(NO_COUNT.format(what="one batch, but in another"))
        self._counted = size is not None
        return 1 if size is None else size


def generators(data: object) -> list[torch.Generator]:
    """The random generators that a loader or its samplers own."""
    sampler, batches = getattr(data, "sampler", None), getattr(data, "batch_sampler", None)
    owners = (data, sampler, batches, getattr(batches, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _first(value: Any) -> tuple[int | None, set[Shape | None]]:
    """The leading dimension of the first tensor that has one, and what was met before it."""
    met: set[Shape | None] = set()
    for shape in _shapes(value, DEPTH):
        if shape:
            return shape[0], met
        met.add(shape)
    return None, met


def _shapes(value: Any, depth: int) -> Iterator[Shape | None]:
    """The shapes of all tensors and arrays within; `None` for what cannot be looked into. Numbers have none."""
    if isinstance(shape := getattr(value, "shape", None), tuple):
        yield tuple(shape)
    elif value is None or isinstance(value, (int, float, complex)):
        return
    elif depth > 0 and isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _shapes(part, depth - 1)
    elif depth > 0 and getattr(value, "__dict__", None):
        yield from _shapes(vars(value), depth - 1)
    else:
        yield None
