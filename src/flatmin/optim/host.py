"""The `torch.optim.Optimizer` protocol, kept on behalf of a base optimizer.

Groups, state and hyperparameters are the base's own objects, never copies: a scheduler that drives the wrapper drives
the base, a checkpoint of the wrapper is a checkpoint of the base. What a method has to remember (its radius, a step
count, a seed) lives in the groups, so that the layout is torch's and `torch.distributed.checkpoint` can shard it.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from flatmin.vectors import check_radius


class Host(Optimizer):
    """Delegates torch's optimizer protocol to `base`; the base's own hooks stay with the base."""

    radius_name: str = "radius"

    def __init__(self, base: Optimizer, radius: float):
        self.base = base
        self._default_radius = check_radius(self.radius_name, radius)
        # Optimizer.__init__ would build groups and state of its own. Unpickling is torch's protocol for an
        # optimizer that already has them: it only sets up the hooks.
        self.__setstate__({})
        for event in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
            hooks = f"_optimizer_{event}_hooks"  # shared: the base does this work, and runs the hooks
            setattr(self, hooks, getattr(base, hooks))
        self._fill_groups()

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's groups, the same objects; our options live in them."""
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's state."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base optimizer's defaults."""
        return self.base.defaults

    @property
    def num_steps(self) -> int:
        """Steps taken so far, skipped ones included."""
        return self.param_groups[0]["num_steps"]

    @property
    def num_skipped(self) -> int:
        """Steps skipped because a loss or the direction was not finite."""
        return self.param_groups[0]["num_skipped"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer; it may set its own radius."""
        check_radius(self.radius_name, param_group.get(self.radius_name, self._default_radius))
        self.base.add_param_group(param_group)
        self._fill_groups()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's `state_dict`, with radius, step count and seed in its groups. No weight copies."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, or a checkpoint of the bare base optimizer."""
        self.base.load_state_dict(state_dict)
        self._fill_groups()

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler wraps `step` per instance, and a weak reference has no copy: both belong to this instance.
        own = {name: value for name, value in self.__dict__.items() if name != "step"}
        return {**own, "_session": None}

    def _counters(self) -> dict[str, Any]:
        """What every group carries beside its radius, the same in all groups."""
        return {"num_steps": 0, "num_skipped": 0}

    def _fill_groups(self) -> None:
        first = self.param_groups[0]
        for group in self.param_groups:
            group.setdefault(self.radius_name, self._default_radius)
            check_radius(self.radius_name, group[self.radius_name])
            for name, value in self._counters().items():
                group.setdefault(name, first.get(name, value))

    def _count(self, name: str) -> None:
        for group in self.param_groups:
            group[name] += 1
