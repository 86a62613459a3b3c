"""Arguments out of range are refused where they come in, all in the same words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real


def check_whole(name: str, value: object, least: int | None = None) -> int:
    """Returns `value` if it is a whole number (and at least `least`), else raises a `ValueError`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {value!r}.")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")
    return int(value)


def check_number(name: str, value: object, least: float | None = None) -> float:
    """Returns `value` if it is a finite number (and at least `least`), else raises a `ValueError`."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}.")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least:g}, got {value}.")
    return float(value)


def check_positive(name: str, value: object) -> float:
    """Returns `value` if it is a finite number above 0, else raises a `ValueError`."""
    number = check_number(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be positive, got {value}.")
    return number


def check_share(name: str, value: object, ends: str = "[]") -> float:
    """Returns `value` if it is in [0, 1], or without the ends that are round in `ends`, else raises a `ValueError`."""
    number = check_number(name, value)
    if not 0 <= number <= 1 or (number == 0 and ends[0] == "(") or (number == 1 and ends[1] == ")"):
        raise ValueError(f"{name} must be in {ends[0]}0, 1{ends[1]}, got {value}.")
    return number


def check_flag(name: str, value: object) -> bool:
    """Returns `value` if it is True or False, else raises a `ValueError`: a string would count as True."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}.")
    return value


def check_choice(name: str, value: object, known: Sequence[str]) -> str:
    """Returns `value` if it is one of `known`, else raises a `ValueError` that lists them."""
    if value not in known:
        *others, last = map(repr, known)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}.")
    return str(value)
