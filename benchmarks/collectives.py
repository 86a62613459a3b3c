"""What the processes of a training step send each other: how many collectives, of how many numbers."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from torch.profiler import ProfilerActivity, profile

# torch's name of a collective -> ours, and which of its arguments says how many numbers it is about.
_WITH_SHAPE = {
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::_allgather_base_": ("all_gather", 0),
}


class Collectives:
    """Counts, by torch's profiler, the collectives that this process takes part in, over gloo.

    Attributes:
        sizes: for "all_reduce", "reduce_scatter" and "all_gather" how often each number of elements occurred.
    """

    def __init__(self) -> None:
        self._profile: Any = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self.sizes: dict[str, Counter[int]] = {}

    def __enter__(self) -> Collectives:
        self._profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._profile.__exit__(*error)
        sizes: dict[str, Counter[int]] = {"all_reduce": Counter(), "reduce_scatter": Counter(), "all_gather": Counter()}
        for event in self._profile.events():
            if event.name in _WITH_SHAPE:
                name, argument = _WITH_SHAPE[event.name]
                sizes[name][math.prod(event.input_shapes[argument])] += 1
            elif event.name == "gloo:all_reduce":
                sizes["all_reduce"][math.prod(event.input_shapes[0])] += 1
        sizes["all_reduce"] -= sizes["reduce_scatter"]  # gloo scatters what it has reduced everywhere
        self.sizes = sizes

    def count(self, name: str, *, single: bool = False) -> int:
        """Collectives of this name about more than one number; with `single`, about one."""
        return sum(count for size, count in self.sizes[name].items() if (size == 1) == single)

    def elements(self, name: str) -> int:
        """Numbers that these collectives were about, together."""
        return sum(size * count for size, count in self.sizes[name].items())
