"""What an Objective is made of: a model, a criterion, and the parameters to differentiate by."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

Given = ParamSpec("Given")
Result = TypeVar("Result")


def of_objective(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Makes a function whose first argument is an Objective say so to whoever passes a model."""

    @wraps(function)
    def checked(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        if args:
            check_objective(function.__name__, args[0])
        return function(*args, **kwargs)

    return checked


def check_objective(name: str, given: object) -> None:
    """Raises a `ValueError` for a model where an Objective should be."""
    if isinstance(given, nn.Module):
        raise ValueError(
            f"{name} measures an Objective, got the model {type(given).__name__}. Write objective = "
            f"flatmin.Objective(model, criterion, data), then flatmin.{name}(objective, ...); or for the most "
            "important numbers at once flatmin.measure(model, criterion, data)."
        )


def check_model(model: object, criterion: object) -> None:
    """Raises a `ValueError` if there is nothing here that could be differentiated."""
    if isinstance(criterion, type):
        raise ValueError(f"criterion is the class {criterion.__name__}, not a function: write {criterion.__name__}().")
    if not isinstance(model, nn.Module) or isinstance(model, nn.modules.loss._Loss):
        raise ValueError(f"the model comes first and is a torch.nn.Module, got {type(model).__name__}.")
    if criterion is not None and not callable(criterion):
        raise ValueError(f"criterion must be a function (outputs, targets) -> loss, got {type(criterion).__name__}.")
    if torch.is_inference_mode_enabled():
        raise ValueError("derivatives cannot be taken inside torch.inference_mode(): measure outside of it.")


def choose_parameters(model: nn.Module, params: Any) -> Mapping[str, Tensor]:
    """The parameters to differentiate by: all that are not frozen, those of these names, or those a function takes."""
    named = dict(model.named_parameters(remove_duplicate=False))  # a tied parameter is known by all its names
    if params is None:
        chosen = {name: p for name, p in named.items() if p.requires_grad}
    elif callable(params):
        chosen = {name: p for name, p in named.items() if params(name, p)}
    else:
        names = [params] if isinstance(params, str) else list(params)
        if others := [name for name in names if not isinstance(name, str)]:
            kind = type(others[0]).__name__
            raise ValueError(f"params takes names, or a function (name, parameter) -> bool, got {kind}.")
        missing = [name for name in names if name not in named]
        if missing:
            raise ValueError(f"no parameter is called {missing[0]!r}. The model has: {', '.join(named)}.")
        chosen = {name: named[name] for name in names}
    first_names = {p: name for name, p in reversed(chosen.items())}
    chosen = {name: p for name, p in chosen.items() if first_names[p] == name}
    frozen = [name for name, p in chosen.items() if not p.requires_grad]
    if frozen:
        raise ValueError(f"{frozen[0]!r} is frozen: call requires_grad_() on it, or leave it out of params.")
    if not chosen:
        raise ValueError("no parameters to differentiate by: all are frozen, or params selects none.")
    return chosen


def reduction_of(criterion: object) -> str:
    """What a criterion says of itself: a module, or a `functools.partial` of one or of a function."""
    if isinstance(criterion, functools.partial):
        return criterion.keywords.get("reduction") or reduction_of(criterion.func)
    own = getattr(criterion, "reduction", None)
    return own if isinstance(own, str) else "mean"
