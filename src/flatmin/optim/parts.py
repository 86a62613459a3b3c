"""Parts of a batch, for rules that evaluate a probe on some of the samples only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Part = Callable[[int], Any]  # number of samples -> an index into the leading dimension


def half(which: int) -> Part:
    """The first (0) or the second (1) half of the batch; of an odd batch the second is the larger."""

    def rows(n: int) -> slice:
        if n < 2:
            raise ValueError(f"a batch of {n} cannot be split in two: split_batch=True needs at least 2 samples.")
        return slice(0, n // 2) if which == 0 else slice(n // 2, n)

    return rows


def some(count: int, seed: int) -> Part:
    """`count` samples drawn without replacement; the same ones for the same seed and batch size."""

    def rows(n: int) -> list[int]:
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.randperm(n, generator=generator, device="cpu")[:count].tolist()

    return rows


def num_rows(batch: Any) -> int:
    """The leading dimension of all tensors in a batch of any nesting.

    Raises:
        ValueError: if there is none, if they do not agree, or for packed sequences, whose rows are no samples.
    """
    sizes = {len(tensor) for tensor in _tensors(batch)}
    if len(sizes) > 1:
        raise ValueError(
            "take() takes samples along the leading dimension, which is not the same for all tensors that it was "
            f"given: {', '.join(map(str, sorted(sizes)))}. Give it inputs and targets only, batch first."
        )
    if not sizes:
        raise ValueError("take() found no tensor to count samples by.")
    return sizes.pop()


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, PackedSequence):
        raise ValueError(
            "take() cannot take samples out of a PackedSequence. Give it padded ones, and pack them after."
        )
    elif isinstance(batch, (Mapping, tuple, list)):
        for item in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(item)


def take_rows(batch: Any, rows: Any) -> Any:
    """The same structure with `rows` of every tensor; what is not a tensor stays as it is."""
    if isinstance(batch, Tensor):
        return batch[rows]
    if isinstance(batch, Mapping):
        return {key: take_rows(value, rows) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        taken = [take_rows(value, rows) for value in batch]
        return type(batch)(*taken) if hasattr(batch, "_fields") else type(batch)(taken)  # a namedtuple takes fields
    return batch
