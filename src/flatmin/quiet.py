"""Leaving no trace: random state, buffers and mode are as they were.

Training. A step that evaluates the model several times would update batch-norm statistics several times and draw
several dropout masks. With `Quiet` the first probe is an ordinary forward; for each later one

    random state   is put back to where the first probe began, so that all probes share their dropout masks; after the
                   step it is where one forward would have left it (torch's CPU generator and those of the devices
                   that hold parameters; not Python's `random`, not NumPy's)
    buffers        are copied before the module runs and put back afterwards, whatever the module: batch norm,
                   spectral norm, a counter of your own; also buffers that are replaced and not updated in place

Modules are found without the caller's help, by a forward hook that lives only inside a probe. A compiled model does
not run such hooks for its parts, so there the model must be named (`model=`).

Measuring. Inside `undisturbed(model)` anything may be run; afterwards random state, buffers and mode are restored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

RandomState = dict[torch.device, Tensor]


def random_state(devices: Iterable[torch.device]) -> RandomState:
    """The state of torch's CPU generator and of the generators of `devices`."""
    others = {d: torch.get_device_module(d).get_rng_state(d) for d in devices if d.type != "cpu"}
    return {torch.device("cpu"): torch.get_rng_state(), **others}


def set_random_state(states: RandomState) -> None:
    """Puts back what `random_state` gave."""
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def undisturbed(model: nn.Module, *, eval_mode: bool = True) -> Iterator[None]:
    """Restores random state, buffers and train/eval mode of `model` on leaving; switches to eval inside if asked.

    Modes are switched by `eval()` and `train()`, which in some modules do work (LoRA layers merge their update).
    """
    modes = [(module, module.training) for module in model.modules()]
    states = random_state({p.device for p in model.parameters()})
    buffers = KeptBuffers(model)
    buffers.keep()
    try:
        if eval_mode:
            model.eval()
        yield
    finally:
        try:
            for module, training in modes:  # parents first, so that a child has the last word on itself
                if module.training != training:
                    module.train(training)
        finally:
            buffers.put_back(only_changed=True)
            set_random_state(states)
            for module, training in modes:
                module.training = training


class Quiet:
    """Keeps the probes of one step quiet; `probe()` wraps each evaluation, `end()` closes the step."""

    def __init__(self, devices: Iterable[torch.device], model: nn.Module | None = None):
        self._devices = list(devices)
        self._buffers = KeptBuffers(model)
        self._before: RandomState | None = None
        self._after: RandomState | None = None

    @contextmanager
    def probe(self) -> Iterator[None]:
        """Wraps one evaluation. The first passes through; later ones are undone on leaving, raised or not."""
        if self._before is None:
            self._before = random_state(self._devices)
            yield
            self._after = random_state(self._devices)
            return
        set_random_state(self._before)
        try:
            self._buffers.keep()
            yield
        finally:
            self._buffers.put_back()

    def end(self) -> None:
        """Leaves the random state where the first probe left it, and no hook behind."""
        self._buffers.put_back()  # again, if an interrupt cut the first time short
        if self._after is not None:
            set_random_state(self._after)


class KeptBuffers:
    """Copies of the buffers of every module that has run since `keep()` (or of `model`, if given)."""

    def __init__(self, model: nn.Module | None):
        self._model = model
        self._hook: RemovableHandle | None = None
        self._seen: set[nn.Module] = set()
        self._kept: list[tuple[nn.Module, str, Any, Any]] = []  # module, name, buffer, value; None if it has none

    def keep(self) -> None:
        """Begins to watch."""
        if self._model is not None:
            self._copy(self._model)
        else:
            self._hook = register_module_forward_pre_hook(self._copy)

    @torch.no_grad()
    def put_back(self, *, only_changed: bool = False) -> None:
        """Restores every copied buffer; may be called again.

        With `only_changed` a buffer that still has its value is not written to, so that graphs which saved it stay
        valid; that comparison costs a host synchronisation per buffer.
        """
        if self._hook is not None:
            self._hook.remove()
        for module, name, buffer, value in self._kept:
            if buffer is not None and not (only_changed and torch.equal(buffer, value)):
                buffer.copy_(value)
            module._buffers[name] = buffer
        self._seen, self._kept = set(), []

    def _copy(self, module: nn.Module, _args: object = None) -> None:
        if module in self._seen:
            return
        for part in module.modules():
            if part not in self._seen:
                self._seen.add(part)
                for name, buffer in part._buffers.items():
                    value = None if buffer is None else buffer.detach().clone()
                    self._kept.append((part, name, buffer, value))
