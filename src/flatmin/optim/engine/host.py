"""The `torch.optim.Optimizer` protocol, kept on behalf of a base optimizer.

Groups, state and hyperparameters are the base's own objects, never copies: a scheduler that drives the wrapper drives
the base, a checkpoint of the wrapper is a checkpoint of the base. What a method has to remember (its radius, a step
count, a seed) lives in the groups, so that the layout is torch's and `torch.distributed.checkpoint` can shard it.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from flatmin.distributed import seed_of
from flatmin.optim.engine.migration import Migration
from flatmin.optim.engine.misuse import (
    check_minimises,
    check_names,
    check_radius_name,
    warn_leftover,
    warn_other_method,
)
from flatmin.radii import check_radius


class OfTheBase:
    """An attribute that exists exactly if the base optimizer has it."""

    def __init__(self, name: str):
        self._name = name

    def __get__(self, instance: Host | None, owner: type[Host]) -> Any:
        return self if instance is None else getattr(instance.base, self._name)


class Host(Migration, Optimizer):
    """Delegates torch's optimizer protocol to `base`; the base's own hooks stay with the base."""

    radius_name: str = "radius"
    base: Optimizer
    train, eval = OfTheBase("train"), OfTheBase("eval")  # trainers ask for them: schedule-free optimizers have modes
    remembers: tuple[str, ...] = ()  # the vectors that the method keeps between steps (flatmin.optim.engine.memory)
    finds_once: tuple[str, ...] = ()  # those of them that the first micro-batch of a step finds for all
    replaces_momentum: bool = False  # and weight decay: the base should be plain SGD
    takes_sparse: bool = True  # whether its formula can be evaluated on sparse gradients
    is_random: bool = False  # whether the method draws random numbers
    reads_weights: bool = True  # whether its rule reads the weights after its first request, or draws in their scale
    sync_ascent: bool = True  # whether processes average gradients that only say where to look

    def __init__(self, base: Optimizer, radius: float, seed: int | None):
        self._default_radius = check_radius(self.radius_name, radius)
        self._seed = seed_of(seed)
        # Optimizer.__init__ would build groups and state of its own. Unpickling is torch's protocol for an
        # optimizer that already has them: it only sets up the hooks.
        self.__setstate__({"base": base})
        check_names(base, type(self).__name__, (self.radius_name, *self._common()))
        self._warn_of_leftovers()
        self._fill_groups(new_only=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for what in ("step", "state_dict", "load_state_dict"):
            for when in ("pre", "post"):
                self._share(f"_optimizer_{what}_{when}_hooks")

    def _share(self, hooks: str) -> None:
        """The base does the work that these hooks are about, and runs them: once, with itself as the optimizer."""
        setattr(self, hooks, getattr(self.base, hooks))

    def __repr__(self) -> str:
        return f"{type(self).__name__} around {self.base!r}"

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
        return self.base.param_groups[0].get("num_steps", 0)

    @property
    def num_skipped(self) -> int:
        """Steps skipped because a loss or the direction was not finite."""
        return self.param_groups[0].get("num_skipped", 0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer; it may set its own radius."""
        self._check_group(param_group)
        self.base.add_param_group(param_group)
        self._fill_groups()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's `state_dict`: our options and counts are in its groups, what we remember in its state.

        See `FlatOptimizer.state_dict`.
        """
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, or a checkpoint of the bare base optimizer (our options then stay)."""
        names = (self.radius_name, *self._common())
        if any("num_skipped" in group and self.radius_name not in group for group in state_dict["param_groups"]):
            warn_other_method(type(self).__name__, self.radius_name, self.param_groups[0].get(self.radius_name))
        before = [{name: group[name] for name in names if name in group} for group in self.param_groups]
        self.base.load_state_dict(state_dict)
        for group, options in zip(self.param_groups, before, strict=True):
            for name, value in options.items():
                group.setdefault(name, value)
        self._fill_groups(new_only=False)

    def __getstate__(self) -> dict[str, Any]:
        # Hooks, a step that a scheduler has wrapped, and what a step under way holds belong to this instance.
        own = ("step", "_session", "_quiet", "_ranks", "_place", "_scaling", "_memory", "_probe", "_direction")
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_optimizer_") and k not in own}

    def _common(self) -> dict[str, Any]:
        """What every group carries beside its radius, the same in all groups."""
        counters = {"num_steps": 0, "num_skipped": 0}
        if self.remembers:
            counters["num_remembered"] = 0
        return {**counters, "seed": self._seed} if self.is_random else counters

    def _fill_groups(self, *, new_only: bool = True) -> None:
        """Gives groups what they lack; `new_only`, those that have nothing of ours yet (at every step)."""
        groups, name = self.base.param_groups, self.radius_name
        for group in groups:
            if not new_only or "num_skipped" not in group or name not in group:
                self._check_group(group)
                group.setdefault(name, self._default_radius)
                for common, value in self._common().items():
                    group.setdefault(common, groups[0].get(common, value))
            check_radius(name, group[name])

    def _check_group(self, group: dict[str, Any]) -> None:
        check_minimises(type(self).__name__, group)
        if "num_skipped" not in group:  # nobody's yet: a checkpoint, or an earlier wrapper, may have left others
            check_radius_name(type(self).__name__, self.radius_name, group.keys() - self.defaults.keys())
        check_radius(self.radius_name, group.get(self.radius_name, self._default_radius))

    def _warn_of_leftovers(self) -> None:
        """What an earlier wrapper left in the groups stays in charge, as a checkpoint's options do: not silently."""
        ours = {self.radius_name: self._default_radius, "seed": self._seed if self.is_random else None}
        for group in self.base.param_groups:
            for name, value in ours.items():
                if "num_skipped" in group and value is not None and group.get(name, value) != value:
                    warn_leftover(type(self).__name__, name, group[name], value)
                    return

    def _count(self, name: str) -> None:
        for group in self.base.param_groups:
            group[name] = group.get(name, 0) + 1  # a group may have been added to the base during the step
