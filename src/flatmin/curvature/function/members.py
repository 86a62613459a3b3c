"""The processes that measure together, each with some of the batches."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from flatmin.checks import check_whole
from flatmin.curvature.function.batches import NO_BATCHES, is_empty
from flatmin.distributed import summed_over

NO_SHARE = "a process has no batch at all: each needs at least one, and after that their numbers may differ."


class Members:
    """The members of a process group; without one, this process alone.

    Args:
        group: a `torch.distributed` process group, or `None`.
        device: that the group can send from.
        joint: whether they evaluate each batch together (sharded parameters), so that sums are over all of them.

    Attributes:
        group: the process group.
    """

    def __init__(self, group: Any, device: torch.device, *, joint: bool):
        self.group = group
        self._device = device
        self._apart = group is not None and not joint

    @property
    def first(self) -> bool:
        """Whether this process is the first of the group, or the only one."""
        return self.group is None or distributed.get_rank(self.group) == 0

    def number(self, batch: int) -> int:
        """The number of this process's `batch` among those of all, if they were dealt out in turn."""
        if not self._apart:
            return batch
        return batch * distributed.get_world_size(self.group) + distributed.get_rank(self.group)

    def sums(self, parts: Sequence[Tensor], count: int) -> tuple[Sequence[Tensor], int]:
        """`parts` and `count`, added up over the processes: one all-reduce, none without a group."""
        return summed_over(self.group, [t.to(self._device) for t in parts], count) if self._apart else (parts, count)

    def check_share(self, data: Iterable[Any]) -> None:
        """Raises a `ValueError` if there is no batch; on every process, lest some wait for the one without.

        One all-reduce of one number.
        """
        [empty], _ = self.sums([torch.tensor(float(is_empty(data)), device="cpu")], 0)
        if empty:
            raise ValueError(NO_SHARE if self._apart else NO_BATCHES)

    def together(self, decision: int) -> int:
        """A decision that clocks may have a part in, as the first process of the group takes it."""
        if self.group is None:
            return decision
        box = torch.tensor(decision, device=self._device)
        distributed.broadcast(box, group=self.group, group_src=0)
        return int(box)

    def seed(self, seed: int | None) -> int:
        """`seed`, if it is a whole number, or for `None` a really random one, the same for the group.

        Not from the seeds that all processes share: one that measures alone would shift those of its next optimizer.

        Raises:
            ValueError: for anything else.
        """
        return self.together(secrets.randbits(63)) if seed is None else check_whole("seed", seed)

    def text_of_first(self, read: Callable[[], str]) -> str:
        """What `read()` gives on the first process of the group, for all of them."""
        if self.group is None:
            return read()
        text = read().encode() if self.first else b""
        length = self.together(len(text))
        content = torch.tensor(list(text.ljust(length)), dtype=torch.uint8, device=self._device)
        distributed.broadcast(content, group=self.group, group_src=0)
        return bytes(content.tolist()).decode()
