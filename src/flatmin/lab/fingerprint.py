"""What a task was when a run was made, so that runs of an edited task are never taken for runs of the new one.

The name of a task, its method, seed and settings do not say that the model has another width now. So the header of a
run also holds a digest of the model (modules, their options, shapes of parameters), of the data of its seed, and of the
loss, and the name of the base optimizer. What only the code of a `forward` says is not seen.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flatmin.lab.tasks import Settings, Splits, Task

FIRST_BASE = "SGD, momentum 0.9"  # of all tasks, when records did not say it yet
SIMPLE = (bool, int, float, str, type(None))


def fingerprint(task: Task, splits: Splits) -> dict[str, Any]:
    """Digests of the task's model, loss and data, its batch size and base. The random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        model = task.build_model()
        base = task.build_base(model, Settings(lr=1.0))
    return {
        "model": _digest(_about(model, values=False)),
        "loss": _digest(_about(task.criterion, values=True)),
        "data": _digest(part for pair in splits for tensor in pair for part in _bytes(tensor)),
        "batch size": task.batch_size,
        "base": describe(base),
    }


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The parts of a task that are not what they were."""
    return [part for part in now if {"base": FIRST_BASE, **before}.get(part) != now[part]]


def describe(base: Optimizer) -> str:
    """`SGD, momentum 0.9`: its class, and options that are not the usual ones; without what the settings say."""
    usual = inspect.signature(type(base)).parameters
    named = [name for name in base.defaults if name in usual and name not in ("lr", "weight_decay")]
    options = {name: base.defaults[name] for name in named if base.defaults[name] != usual[name].default}
    return ", ".join([type(base).__name__, *(f"{name} {value}" for name, value in options.items())])


def _about(module: nn.Module, *, values: bool) -> Iterator[bytes]:
    """Modules with their options; the shapes of what they hold, or the values."""
    for name, part in module.named_modules():
        # Torch's modules say their options in extra_repr; another version of torch may have more attributes.
        own = values or not type(part).__module__.startswith("torch.")
        options = sorted((k, repr(v)) for k, v in vars(part).items() if own and isinstance(v, SIMPLE) and k[0] != "_")
        yield f"{name} {type(part).__qualname__} {part.extra_repr()} {options}".encode()
    for name, tensor in module.state_dict(keep_vars=True).items():
        trained = getattr(tensor, "requires_grad", None)
        yield f"{name} {trained}".encode()
        if isinstance(tensor, Tensor):
            yield from _bytes(tensor) if values else [_shape(tensor)]


def _bytes(tensor: Tensor) -> Iterator[bytes]:
    yield _shape(tensor)
    yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _shape(tensor: Tensor) -> bytes:
    return f"{tuple(tensor.shape)} {tensor.dtype}".encode()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()[:16]
