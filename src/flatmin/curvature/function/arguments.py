"""What an Objective is made of: a model, a criterion, and the parameters to differentiate by."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from numbers import Number
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from flatmin.vectors import Vector

Given = ParamSpec("Given")
Result = TypeVar("Result")

CALLED = (
    "It was called as criterion(outputs, targets), with {outputs} and {targets}, in this order. Class labels are int64 "
    "(targets.long()) and less than the number of classes, which is the size of dimension 1 of the outputs; numpy "
    "arrays become tensors by torch.from_numpy, in the data or in forward=."
)

MODULE = (
    "params takes names, or a function (name, parameter) -> bool, got the module {kind}. For the parameters of a part "
    "write params=lambda name, p: name.startswith('head.'), with the name of the part in the model."
)

OPERATOR = (
    "{name} measures an Objective, got the operator {kind}. What takes an operator: top_eigenvalues, "
    "layerwise_rayleigh_sum and spectral_density, whose value times num_params is the trace. Of the objective itself: "
    "pass operator.objective."
)


def of_objective(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Lets a function, or an `__init__`, whose first argument is an Objective say so to who passes another thing."""
    return _checked(function, takes_operators=False)


def of_operator(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """The same, where the first argument is an Objective or an operator."""
    return _checked(function, takes_operators=True)


def _checked(function: Callable[Given, Result], *, takes_operators: bool) -> Callable[Given, Result]:
    @wraps(function)
    def checked(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        name, given = function.__name__, args
        if name == "__init__":
            name, given = type(args[0]).__name__, args[1:]
        found = given[0] if given else kwargs.get("objective")
        check_objective(name, found)
        if not takes_operators and hasattr(found, "product"):
            raise ValueError(OPERATOR.format(name=name, kind=type(found).__name__))
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


def check_vector(name: str, given: object, params: Sequence[Tensor]) -> None:
    """Raises a `ValueError` unless `given` is a Vector of the shapes of `params`; a missing entry fits any."""
    if not isinstance(given, Vector):
        raise ValueError(
            f"{name} must be a Vector, such as result.vectors[0], random_direction(objective) or "
            f"flatmin.Vector(tensors) with a tensor for each parameter, got {type(given).__name__}."
        )
    pairs = zip(given.tensors, params, strict=False)
    if len(given) != len(params) or any(t is not None and t.shape != p.shape for t, p in pairs):
        raise ValueError(
            f"{name} has another shape than the parameters of this objective: make it from the same one "
            "(objective.only(...) has fewer parameters)."
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
    if isinstance(params, nn.Module):  # callable, but not such a function
        raise ValueError(MODULE.format(kind=type(params).__name__))
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


def loss_of(criterion: Callable[[Any, Any], Any] | None, outputs: Any, targets: Any) -> Tensor:
    """`criterion(outputs, targets)`, or the loss that the model gave, if that is a tensor with one entry."""
    if criterion is None:
        loss = getattr(outputs, "loss", outputs)
    else:
        try:
            loss = criterion(outputs, targets)
        except Exception as error:
            error.add_note(CALLED.format(outputs=_described(outputs), targets=_described(targets)))
            raise
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    given = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
    if criterion is None:
        raise ValueError(f"without a criterion the model must return its loss, a scalar tensor; it gave {given}.")
    mend = "Let it return the loss alone."
    if isinstance(loss, Tensor):
        mend = "Use reduction='mean'."
    elif isinstance(loss, Number):
        mend = "Leave out .item() or float(): a number cannot be differentiated."
    raise ValueError(f"the criterion must return a scalar tensor, got {given}. {mend}")


def _described(value: Any) -> str:
    """What a criterion was given, without a look into the memory of a device, whose errors come later."""
    if not isinstance(value, Tensor):
        return f"a value of type {type(value).__name__}"
    text = f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if value.is_cpu and value.numel() and not value.is_floating_point() and not value.is_complex():
        with suppress(RuntimeError):  # sparse tensors, and those of uint16 to uint64, have no smallest entry
            text += f" from {int(value.min())} to {int(value.max())}"
    return text


def reduction_of(criterion: object) -> str:
    """What a criterion says of itself: a module, or a `functools.partial` of one or of a function."""
    if isinstance(criterion, functools.partial):
        return criterion.keywords.get("reduction") or reduction_of(criterion.func)
    own = getattr(criterion, "reduction", None)
    return own if isinstance(own, str) else "mean"
