"""Results kept in a file while a long measurement goes on, so that an interrupt loses only the part under way."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

from flatmin.curvature.function.arguments import reduction_of
from flatmin.curvature.function.objective import Objective
from flatmin.curvature.results import Estimate
from flatmin.files import write_json
from flatmin.notices import warn
from flatmin.shards import local

Result = TypeVar("Result")


class OtherMeasurement(ValueError):
    """A file is about another model, other weights or other data."""


class Store:
    """What has been measured of one model on one data set, by name. Without a path nothing is kept.

    Args:
        path: a JSON file; made if it is not there. Of several processes the first one reads and writes it.
        objective: what is measured; the file remembers a digest of its weights, its loss and its number of samples,
            and the name of the criterion.
        loss: at the weights.

    Raises:
        OtherMeasurement: (a ValueError) if the file is about another model, other weights or other data.
        ValueError: if it is not such a file.
    """

    def __init__(self, path: str | os.PathLike[str] | None, objective: Objective, loss: float):
        self._path = None if path is None else Path(path)
        self._about = {} if path is None else _about(objective, loss)
        self._tolerance = objective.tolerance
        self._parts: dict[str, Any] = {}
        self._writes = objective.members.first
        if self._path is not None and self._writes:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path is not None and (text := objective.members.text_of_first(self._text)):
            self._parts = self._parsed(text)

    def get(self, name: str, settings: Mapping[str, Any], kind: type[Result], measure: Callable[[], Result]) -> Result:
        """The result kept under this name, if it was made with these settings; else it is measured now, and kept."""
        settings = json.loads(json.dumps(settings))
        kept = self._parts.get(name)
        if kept is not None and kept["settings"] == settings:
            return _loud(revived(kind, kept["result"]), name)
        result = measure()
        if self._path is not None and self._writes:
            self._parts[name] = {"settings": settings, "result": _entries(result)}
            write_json(self._path, {"about": self._about, "parts": self._parts})
        return result

    def _text(self) -> str:
        assert self._path is not None
        return (self._path.read_text(encoding="utf-8") or "empty") if self._path.exists() else ""

    def _parsed(self, text: str) -> dict[str, Any]:
        path = self._path
        try:
            data = json.loads(text)
            about, parts = dict(data["about"]), dict(data["parts"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a file of results that a measurement kept.") from error
        differing = [name for name, value in self._about.items() if not self._alike(about.get(name), value)]
        if differing:
            raise OtherMeasurement(
                f"{path} is about another measurement ({', '.join(differing)} differ). Name another file."
            )
        return parts

    def _alike(self, before: Any, now: Any) -> bool:
        """Equal; a loss up to rounding, as other batches of a loader that shuffles change it."""
        if isinstance(now, float) and isinstance(before, (int, float)):
            return math.isclose(before, now, rel_tol=self._tolerance)
        return before == now


def _about(objective: Objective, loss: float) -> dict[str, Any]:
    return {
        "weights": _digest(objective),
        "criterion": _name(objective.criterion),
        "loss": loss,
        "num_samples": objective.num_samples,
    }


def _digest(objective: Objective) -> str:
    digest = hashlib.sha256()
    for name, p in zip(objective.names, objective.params, strict=True):
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        digest.update(local(p).detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    if objective.sharded:  # the shards of all processes, so that all look for the same file
        own = torch.tensor(list(digest.digest()), dtype=torch.uint8, device=objective.params[0].device)
        found = [torch.empty_like(own) for _ in range(distributed.get_world_size(objective.group))]
        distributed.all_gather(found, own, group=objective.group)
        digest = hashlib.sha256(torch.cat(found).cpu().numpy().tobytes())
    return digest.hexdigest()


def _name(criterion: Any) -> str:
    """What can be said of a criterion without calling it."""
    if criterion is None:
        return "the model's own"
    shown = getattr(criterion, "func", criterion)
    kind = shown if hasattr(shown, "__qualname__") else type(shown)
    return f"{kind.__module__}.{kind.__qualname__}, {reduction_of(criterion)}"


def _loud(result: Result, name: str) -> Result:
    """A result that is not converged says so again: who goes on may not have seen it the first time."""
    if getattr(result, "converged", True) is False:
        warn(f"{name}, as it was kept, has not converged: {result}.", RuntimeWarning)
    return result


def _entries(result: Any) -> dict[str, Any]:
    """The fields of a result, without vectors."""
    if hasattr(result, "vectors"):
        result = dataclasses.replace(result, vectors=())
    return {name: value for name, value in dataclasses.asdict(result).items() if name != "vectors"}


def revived(kind: type[Result], entries: Mapping[str, Any]) -> Result:
    """The result again: JSON has lists for tuples, dicts for estimates, and null for a number that is not finite."""
    return kind(**{name: value if name == "seed" else _revived_value(value) for name, value in entries.items()})


def _revived_value(value: Any) -> Any:
    if value is None:
        return math.nan
    if isinstance(value, list):
        return tuple(_revived_value(part) for part in value)
    if isinstance(value, dict):
        if set(value) == {"value", "stderr"}:
            return Estimate(**{name: _revived_value(part) for name, part in value.items()})
        return {name: _revived_value(part) for name, part in value.items()}
    return value
