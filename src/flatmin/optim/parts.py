"""Parts of a batch, for rules that evaluate a probe on some of the samples only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

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
    """The leading dimension of the first tensor in a batch of any nesting."""
    if isinstance(batch, Tensor):
        return len(batch)
    items = batch.values() if isinstance(batch, Mapping) else batch
    for item in items:
        if isinstance(item, (Tensor, Mapping, tuple, list)):
            return num_rows(item)
    raise ValueError("take() found no tensor to count samples by.")


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
