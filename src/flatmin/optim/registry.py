"""The methods by name: how to build each around a base optimizer, what it costs, where it comes from."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import Any

from torch.optim import Optimizer


@dataclass(frozen=True)
class Method:
    """A named way to train.

    Attributes:
        name: as the command line and the reports spell it.
        factory: `factory(base, **options)` wraps a base optimizer; `None` for the base itself.
        gradients: gradients that one step costs, with these options (a mean, where steps differ).
        paper: where it comes from.
        options: what the name fixes, e.g. `antithetic=False`.
        needs: options without a default, e.g. `num_data`.
    """

    name: str
    factory: Callable[..., Optimizer] | None
    gradients: float
    paper: str
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    @property
    def radius_name(self) -> str | None:
        """The group option that holds the size of the perturbation (`None` for the base)."""
        return getattr(self.factory, "radius_name", None)

    @property
    def replaces_momentum(self) -> bool:
        """Whether it has a momentum and a prior of its own, in place of the base's momentum and weight decay."""
        return getattr(self.factory, "replaces_momentum", False)

    def num_steps(self, num_gradients: int) -> int:
        """Steps that so many gradients pay for.

        Raises:
            ValueError: if that is less than one.
        """
        cost = Fraction(self.gradients).limit_denominator()  # of 2.1 or 4/3, which a float only comes near
        if num_gradients < cost:
            raise ValueError(
                f"a budget of {num_gradients} gradients does not pay for one step of {self.name}, which costs "
                f"{self.gradients:g}."
            )
        return int(num_gradients // cost)

    def build(self, base: Optimizer, **options: Any) -> Optimizer:
        """The method around `base`; for the plain base, `base` itself."""
        if self.factory is None:
            if options:
                raise ValueError(f"the base optimizer takes no options, got {sorted(options)}.")
            return base
        return self.factory(base, **{**self.options, **options})


_METHODS: dict[str, Method] = {
    "base": Method("base", None, 1, "the base optimizer alone: the control"),
}


def register(name: str, *, gradients: float, paper: str, needs: tuple[str, ...] = (), **options: Any):
    """Class decorator: makes a method known to `methods()`, and so to the contract suite and the lab."""
    assert name not in _METHODS, f"method {name!r} is registered twice"

    def add(factory):
        _METHODS[name] = Method(name, factory, gradients, paper, MappingProxyType(options), needs)
        return factory

    return add


def methods() -> Mapping[str, Method]:
    """All registered methods by name; "base" is the control.

    Example:
        >>> import flatmin
        >>> flatmin.methods()["nso"].gradients
        2
    """
    return MappingProxyType(_METHODS)


def get_method(name: str) -> Method:
    """The method of that name; an unknown one raises a `ValueError` with the known names and the nearest."""
    if name in _METHODS:
        return _METHODS[name]
    raise ValueError(unknown("method", name, _METHODS))


def unknown(kind: str, name: str, known: Mapping[str, Any]) -> str:
    """The message for an unknown name: the nearest known one, and all of them."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    if "," in name:
        guess = f" Several are separated by spaces: {' '.join(part.strip() for part in name.split(','))}."
    return f"unknown {kind} {name!r}.{guess} Known: {', '.join(known)}."
