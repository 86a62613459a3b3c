"""What a rule remembers from step to step: vectors that live in the base optimizer's state and its checkpoints.

A rule reads `memory.get(name)` and writes `memory[name] = vector`. What it writes counts only once the base optimizer
has stepped: a skipped step leaves no trace. If a step is made of several micro-batches that are perturbed one by one,
each reads what stood there when the step began, and what they write is averaged by their shares (which need not sum to
1: a window may be short); but what a rule finds once a step (`found_once`) stands at once. In the state the vectors are
per parameter, under `flatmin_<name>`, so that the layout is torch's. `dict` has the same face, which is what tests
drive a rule with.

`torch.distributed.checkpoint` loads only what the state of a fresh optimizer has already. So where it sets that up,
`make_room` puts zeros for what a rule will remember; whether anything has been remembered yet is a count in the groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flatmin.shards import local
from flatmin.vectors import Vector

PREFIX = "flatmin_"


class Memory:
    """Named vectors in an optimizer's state; `names` are those that the method says it remembers."""

    def __init__(
        self,
        params: Sequence[Tensor],
        state: Any,
        names: Sequence[str],
        *,
        found_once: Sequence[str] = (),
        empty: bool = False,
    ):
        self._params = params
        self._names = names
        self._found_once = found_once
        self._state = state
        self._empty = empty
        self._written: dict[str, Vector] = {}  # by this micro-batch
        self._kept: dict[str, Vector] = {}  # by those before it, and their weighted sum
        self._shares: dict[str, float] = {}  # that this sum is of

    def get(self, name: str) -> Vector | None:
        """The vector of that name, or `None` if none of its entries has been kept."""
        if self.is_found(name):
            return self._kept[name]
        if self._empty:
            return None
        key = PREFIX + name
        vector = Vector(self._state[p].get(key) if p in self._state else None for p in self._params)
        return vector if vector.support else None

    def is_found(self, name: str) -> bool:
        """Whether an earlier micro-batch of this step has found what is found once a step."""
        return name in self._found_once and name in self._kept

    def __setitem__(self, name: str, vector: Vector) -> None:
        if name not in self._names:
            raise ValueError(f"the rule remembers {name!r}: let its class say so, remembers = ({name!r},).")
        self._written[name] = vector

    def begin(self) -> None:
        """Forgets what a micro-batch wrote that did not come to its end."""
        self._written = {}

    def keep(self, share: float | None, *gradients: Vector | None) -> None:
        """Keeps what was written, by its `share` of the step, until the base optimizer has stepped.

        What lies in the memory of `gradients` is copied: the caller may clip them, or write the next ones over.
        """
        for name, vector in self._written.items():
            if share is not None and name not in self._found_once:
                if share > 0:
                    part, earlier = vector * share, self._kept.get(name)
                    self._kept[name] = part if earlier is None else earlier.add_(part)
                    self._shares[name] = self._shares.get(name, 0.0) + share
                continue
            shared = any(g is not None and any(map(_in_one_memory, vector.tensors, g.tensors)) for g in gradients)
            self._kept[name] = vector.copy() if shared else vector
        self._written = {}

    def commit(self) -> bool:
        """Writes what was kept to the state, if anything. Called after the base's step, which may set it up itself."""
        any_kept = bool(self._kept)
        for name, total in self._shares.items():
            self._kept[name].scale_(1.0 / total)
        for name, vector in self._kept.items():
            for p, entry in zip(self._params, vector.tensors, strict=True):
                # A parameter that the base has not stepped may have no state yet, and an entry would stop the base
                # from setting it up later.
                if entry is not None and p.grad is not None:
                    self._state[p][PREFIX + name] = entry.detach()
                elif entry is None and PREFIX + name in self._state.get(p, ()):
                    self._state[p][PREFIX + name] = torch.zeros_like(self._state[p][PREFIX + name])
        self._kept, self._shares = {}, {}
        return any_kept


def _in_one_memory(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.layout is not torch.strided or b.layout is not torch.strided:
        return a is not None and a is b
    return local(a).data_ptr() == local(b).data_ptr()


def make_room(names: Sequence[str], params: Sequence[Tensor], state: Any) -> None:
    """Zeros in the state, to be overwritten by what a checkpoint has."""
    for p in params:
        for name in names:
            if p.grad is not None:
                state[p].setdefault(PREFIX + name, torch.zeros_like(p, requires_grad=False))
