"""Extra probes leave no trace: buffers move once per step, and every probe sees the same random numbers.

A step that evaluates the model several times would update batch-norm statistics several times and draw several
dropout masks. Here the first probe is an ordinary forward; for each later one

    random state   is put back to where the first probe began, so that all probes share their dropout masks; after the
                   step it is where one forward would have left it (torch's CPU generator and those of the devices
                   that hold parameters; not Python's `random`, not NumPy's)
    buffers        are copied before the module runs and put back afterwards, whatever the module: batch norm,
                   spectral norm, a counter of your own; also buffers that are replaced and not updated in place

Modules are found without the caller's help, by a forward hook that lives only inside a probe. A compiled model does
not run such hooks for its parts, so there the model must be named (`model=`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

_RandomState = dict[torch.device, Tensor]


class Quiet:
    """Keeps the probes of one step quiet; `probe()` wraps each evaluation, `end()` closes the step."""

    def __init__(self, devices: Iterable[torch.device], model: nn.Module | None = None):
        self._devices = [d for d in devices if d.type != "cpu"]
        self._model = model
        self._before: _RandomState | None = None
        self._after: _RandomState | None = None

    @contextmanager
    def probe(self) -> Iterator[None]:
        """Wraps one evaluation. The first passes through; later ones are undone on leaving, raised or not."""
        if self._before is None:
            self._before = self._random_state()
            yield
            self._after = self._random_state()
            return
        self._set_random_state(self._before)
        with _buffers_kept(self._model):
            yield

    def end(self) -> None:
        """Leaves the random state where the first probe left it."""
        if self._after is not None:
            self._set_random_state(self._after)

    def _random_state(self) -> _RandomState:
        states = {d: torch.get_device_module(d).get_rng_state(d) for d in self._devices}
        return {torch.device("cpu"): torch.get_rng_state(), **states}

    def _set_random_state(self, states: _RandomState) -> None:
        for device, state in states.items():
            if device.type == "cpu":
                torch.set_rng_state(state)
            else:
                torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def _buffers_kept(model: nn.Module | None) -> Iterator[None]:
    """Puts back, on leaving, every buffer of every module that runs inside (or of `model`, if given)."""
    seen: set[nn.Module] = set()
    kept: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    def keep(module: nn.Module, _args: object = None) -> None:
        if module in seen:
            return
        for part in module.modules():
            if part not in seen:
                seen.add(part)
                for name, buffer in part._buffers.items():
                    if buffer is not None:
                        kept.append((part, name, buffer, buffer.detach().clone()))

    handle = None
    if model is not None:
        keep(model)
    else:
        handle = register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
        with torch.no_grad():
            for module, name, buffer, value in kept:
                buffer.copy_(value)
                module._buffers[name] = buffer
