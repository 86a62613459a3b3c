"""Weights from a file, into a model: safetensors, or what `torch.save` wrote of tensors alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatmin.extras import need

INSIDE = ("state_dict", "model_state_dict", "model")  # where checkpoints of a whole training have the weights
EXPECTED = f"It is to be a state_dict, or a dict with one as {' or '.join(INSIDE)}."
WRAPPERS = ("module.", "_orig_mod.", "model.")  # what DDP, torch.compile and Lightning put before each name


def load_weights(model: nn.Module, path: Path) -> None:
    """Gives the model the weights of the file, all of them or none (see `weights_for`)."""
    model.load_state_dict(weights_for(model, path))


def weights_for(model: nn.Module, path: Path) -> Mapping[str, Tensor]:
    """The file's tensors, by the model's names: all that its state_dict has, in its shapes.

    Args:
        model: whose parameters and buffers they are.
        path: .safetensors, or a file of `torch.save`: a state_dict, or a dict that has one as "state_dict",
            "model_state_dict" or "model". Names may begin as wrappers let them. Nothing is unpickled but tensors.

    Raises:
        ValueError: for a file that is not there or is none of these, and for weights of another model.
    """
    own = model.state_dict()
    state = _with_twins(_unwrapped(read_weights(path), own), model, path)
    lacking, beyond = [n for n in own if n not in state], [n for n in state if n not in own]
    other = [n for n in own if n in state and state[n].shape != own[n].shape]
    faults = [f"it has no {lacking[0]!r}"] if lacking else []
    faults += [f"it has {beyond[0]!r}, which the model has not"] if beyond else []
    faults += [f"{n!r} is {tuple(state[n].shape)}, in the model {tuple(own[n].shape)}" for n in other[:1]]
    if faults:
        count = len(lacking) + len(beyond) + len(other)
        more = f" ({count} such differences)" if count > 1 else ""
        raise ValueError(f"{path} has the weights of another model: {'; '.join(faults)}{more}.")
    return state


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file, by name, on the CPU.

    Raises:
        ValueError: for a file that is not there, or holds something else.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}.")
    if path.suffix == ".safetensors":
        safetensors = need("safetensors.torch", "lab")
        try:
            return safetensors.load_file(path)
        except need("safetensors", "lab").SafetensorError as error:
            raise ValueError(f"{path} is damaged, or no file of safetensors: {error}.") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file it raises whatever it comes upon
        stranger = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        holds = f"beside tensors it holds {stranger[1]}" if stranger else "it is damaged, or something else"
        raise ValueError(
            f"{path} is not a file of tensors alone: {holds}. Save model.state_dict() with torch.save or safetensors. "
            "(A whole model is code, and is not run.)"
        ) from error
    return _tensors(content, path)


def _tensors(content: Any, path: Path) -> Mapping[str, Tensor]:
    """The state_dict in the content."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds no dict of tensors. {EXPECTED}")
    there = [key for key in INSIDE if isinstance(content.get(key), Mapping)]
    if len(there) > 1:
        raise ValueError(f"{path} has weights as {' and as '.join(there)}. {EXPECTED}")
    inner = content[there[0]] if there else content
    if not inner or not all(isinstance(name, str) and isinstance(t, Tensor) for name, t in inner.items()):
        raise ValueError(
            f"{path} holds {', '.join(map(str, list(content)[:5])) or 'nothing'}, and no weights. {EXPECTED}"
        )
    return inner


def _unwrapped(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Without beginnings that all names have, as long as they are not the model's names."""
    while state.keys() != own.keys():
        start = next((start for start in WRAPPERS if all(name.startswith(start) for name in state)), None)
        if start is None:
            break
        state = {name.removeprefix(start): tensor for name, tensor in state.items()}
    return state


def _with_twins(state: Mapping[str, Tensor], model: nn.Module, path: Path) -> Mapping[str, Tensor]:
    """With all names of a tensor that has several (tied weights), of which a file may have one."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    full = dict(state)
    for twins in names.values():
        there = [state[name] for name in twins if name in state]
        if there and any(not torch.equal(there[0], tensor) for tensor in there[1:]):
            raise ValueError(f"{path} has different weights for {' and '.join(twins)}, which are one in the model.")
        full |= dict.fromkeys(twins, there[0]) if there else {}
    return full
