"""Leaving no trace: random state, buffers and mode are as they were.

Training. A step that evaluates the model several times would update batch-norm statistics several times and draw
several dropout masks. With `Quiet` the first probe is an ordinary forward; for each later one

    random state   is put back to where the first probe began, so that all probes share their dropout masks; after the
                   step it is where one forward would have left it (torch's CPU generator and those of the devices
                   that hold parameters; not Python's `random`, not NumPy's)
    buffers        are copied before the caller's code runs and put back afterwards, whatever the module: batch norm,
                   spectral norm, a counter of your own; also buffers that are replaced and not updated in place

If the step is skipped, because a loss is not finite, the buffers go back to where they were before it.

Modules are found without the caller's help, by a forward hook that lives only inside a probe, and that looks only at
what its own thread evaluates: another one may train another model. `torch.compile(model)` is found as a whole, and the
hook is away while it runs. Where the hook is compiled in (`model.compile()`, or a function around the model) it only
notes the module. What runs without hooks nobody can see, and the model must be named (`model=`): a compiled function
that ran before the first step, or a module whose `forward` is never called (only a `training_step` of its own, say).
Then only what is named is looked after: `model=nn.ModuleList([model, criterion])` for a loss with buffers.

Measuring. Inside `undisturbed(model)` anything may be run; afterwards random state, buffers and mode are restored.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_pre_hooks
from torch.utils.hooks import RemovableHandle

from flatmin.buffers import Buffers
from flatmin.versions import unversioned

RandomState = dict[torch.device, Tensor]
CPU = torch.device("cpu")


def random_state(devices: Iterable[torch.device]) -> RandomState:
    """The state of torch's CPU generator and of the generators of `devices`."""
    states = {CPU: torch.default_generator.get_state()}
    for device in devices:
        if device.type != "cpu":
            states[device] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_state(states: RandomState) -> None:
    """Puts back what `random_state` gave."""
    for device, state in states.items():
        if device.type == "cpu":
            torch.default_generator.set_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def undisturbed(model: nn.Module, *others: nn.Module, eval_mode: bool = True) -> Iterator[None]:
    """Restores random state, buffers and train/eval mode of `model` on leaving; switches to eval inside if asked.

    The buffers of `others`, such as a loss, are restored, too. Modes are switched by `eval()` and `train()`, which in
    some modules do work (LoRA layers merge their update).
    """
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    states = random_state({p.device for module in modules for p in module._parameters.values() if p is not None})
    buffers = Buffers(dict.fromkeys([*modules, *(part for other in others for part in other.modules())]))
    renormalised = _renormalised(modules)
    try:
        try:
            if eval_mode and any(training for _, training in modes):
                model.eval()
            yield
        finally:
            for module, training in modes:  # parents first, so that a child has the last word on itself
                if module.training != training:
                    module.train(training)
    finally:
        buffers.put_back()
        with unversioned([weight for weight, _ in renormalised]):
            for weight, value in renormalised:
                weight.detach().copy_(value)
        set_random_state(states)
        for module, training in modes:
            module.training = training


def _renormalised(modules: Iterable[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """The weights that a forward shortens in place (`nn.Embedding(max_norm=...)`), and copies of them."""
    tables = [m.weight for m in modules if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm is not None]
    return [(weight, weight.detach().clone()) for weight in tables]


class Quiet:
    """Keeps the probes of an optimizer's steps quiet: `begin()` a step, `probe()` ... `settle()` each, then `end()`.

    The modules are found by a forward hook and remembered (weakly) from step to step. Known ones are copied before
    the caller's code runs; one that turns up inside is copied on its first forward.
    """

    def __init__(self, params: Sequence[Tensor], model: nn.Module | None = None):
        self.devices = [d for d in {p.device for p in params} if d.type != "cpu"]
        self._known = _Modules()
        self._new: list[nn.Module] = []  # met in the present step
        self._owners = _Modules()  # those of them that have buffers
        self._bare = _Modules()  # those that may get some: all that they have registered is None
        self._appeared: list[nn.Module] = []  # those that got some in the first probe of the present step
        self._model = model
        if model is not None:
            self._learn(model)
        self._first = True
        self._open = False  # an evaluation is under way, or was cut off
        self._compiled: dict[int, RemovableHandle] = {}  # hooks of compiled models met in the present evaluation
        self._ends: list[RemovableHandle] = []  # hooks at the end of modules that were copied inside a forward
        self._inside: list[nn.Module] = []  # met by compiled code
        self._copying = False
        self._start: Buffers | None = None  # before the first probe: for a step that is skipped
        self._later: Buffers | None = None  # before a later probe
        self._before: RandomState | None = None
        self._after: RandomState | None = None

    def begin(self, *, undoable: bool, goes_on: bool = False) -> None:
        """A new step. If it is `undoable`, what the first probe does to buffers can be taken back.

        If it `goes_on` it is the next micro-batch of the same step, and everything since its start can be.
        """
        if self._before is not None:
            self.end()
        self._first, self._copying = True, undoable
        if not goes_on:
            self._start = Buffers(self._owners) if undoable and self._owners else None
            self._appeared = []

    def probe(self) -> None:
        """Before an evaluation. The first one passes through; later ones are undone by `settle`."""
        self._open = True
        if self._before is None:
            self._before = random_state(self.devices)
        else:
            if self._first:
                self._after_first()
            set_random_state(self._before)
            self._later = Buffers(self._owners) if self._owners else None
        if self._model is None and (self._first or self._owners):
            # In torch's table under a key of our own: an interrupt between its function and the assignment of the
            # handle would leave the hook there for good.
            _global_forward_pre_hooks[id(self)] = self._watcher()

    def settle(self) -> None:
        """After an evaluation, raised or not; may be called again."""
        if not self._open:
            return
        _global_forward_pre_hooks.pop(id(self), None)
        if self._compiled or self._ends:
            for handle in [*self._compiled.values(), *self._ends]:
                handle.remove()
            self._compiled, self._ends = {}, []
        if self._inside:
            for module in self._inside:
                self._learn(module)
            self._inside = []
        if self._later is not None:
            self._later.put_back()
            self._later = None
        if not self._first:
            _strip(self._filled())
        self._open = False  # last: what an interrupt cuts off is done by the next call

    def _after_first(self) -> None:
        self._after = random_state(self.devices)
        self._first, self._copying = False, True
        self._appeared += self._filled()
        for module in [*self._new, *self._appeared]:
            self._learn(module)  # it may have got a buffer in its first forward

    def _filled(self) -> list[nn.Module]:
        """Those that had no buffer and have one now."""
        bare = self._bare.seen
        return [m for seen in [*bare.values()] if (m := seen()) is not None and _has_buffer(m)] if bare else []

    def end(self) -> None:
        """Leaves the random state where the first probe left it, and no hook behind."""
        self.settle()
        if self._after is not None:
            set_random_state(self._after)
        elif self._new:
            self._after_first()
        self._before = self._after = None
        self._later, self._new = None, []

    def undo(self) -> None:
        """Puts the buffers back to where they were before the step."""
        if self._start is not None:
            self._start.put_back()
        _strip([*self._appeared, *self._filled()])

    def forget(self) -> None:
        """Drops what `undo` would need."""
        self._start, self._appeared = None, []

    def _watcher(self) -> Callable[[nn.Module, object], None]:
        """The hook. It runs at every call of a module, so it looks up little."""
        known, is_compiling = self._known.seen.get, torch.compiler.is_dynamo_compiling
        thread_now, thread = threading.get_ident, threading.get_ident()

        def meet(module: nn.Module, _args: object) -> None:
            if is_compiling():
                self._inside.append(module)  # a compiler can follow this, and little else
                return
            if thread_now() != thread:
                return
            seen = known(id(module))
            if (
                seen is None
                or seen() is not module
                or seen.compiled
                or (module._buffers and not seen.owner and _has_buffer(module))
            ):
                self._meet(module)

        return meet

    def _meet(self, module: nn.Module) -> None:
        if "_orig_mod" in module._modules:
            self._hide_from(module)
        owners = self._learn(module)
        if self._copying and owners:
            note = self._copies().copy(owners, inside=True)
            if not isinstance(module, torch.jit.ScriptModule):
                self._ends.append(module.register_forward_hook(note, always_call=True))

    def _hide_from(self, compiled: nn.Module) -> None:
        """Takes the hook away while `compiled` runs, which would compile it in."""
        hook = _global_forward_pre_hooks.pop(id(self), None)

        def show(*_: object) -> None:
            if self._open and hook is not None:
                _global_forward_pre_hooks[id(self)] = hook

        if id(compiled) not in self._compiled:
            self._compiled[id(compiled)] = compiled.register_forward_hook(show, always_call=True)

    def _copies(self) -> Buffers:
        """Of the present evaluation."""
        if self._first:
            self._start = self._start or Buffers()
            return self._start
        self._later = self._later or Buffers()
        return self._later

    def _learn(self, module: nn.Module) -> list[nn.Module]:
        new = [part for part in module.modules() if part not in self._known]
        self._known.update(new)
        self._new += new
        parts = dict.fromkeys([*new, module])  # a known one may have got its first buffer since
        owners = [part for part in parts if _has_buffer(part)]
        self._owners.update(owners)
        for part in owners:
            self._known.seen[id(part)].owner = True
            self._bare.seen.pop(id(part), None)
        self._bare.update(part for part in new if part._buffers and part not in self._owners)
        return owners


class _Seen(weakref.ref[nn.Module]):
    """A module that was met, and what has to be known of it at each of its calls."""

    __slots__ = ("compiled", "owner")
    compiled: bool
    owner: bool

    def __new__(cls, module: nn.Module, forget: Callable[[Any], object]) -> _Seen:
        seen = super().__new__(cls, module, forget)
        seen.compiled = "_orig_mod" in module._modules
        seen.owner = False
        return seen


class _Modules:
    """A set of modules that holds none of them. Quicker than a WeakSet: it is asked at every call of a module.

    Attributes:
        seen: by the id of the module.
    """

    def __init__(self) -> None:
        self.seen: dict[int, _Seen] = {}

    def __contains__(self, module: nn.Module) -> bool:
        seen = self.seen.get(id(module))
        return seen is not None and seen() is module

    def __len__(self) -> int:
        return len(self.seen)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([module for seen in [*self.seen.values()] if (module := seen()) is not None])

    def update(self, modules: Iterable[nn.Module]) -> None:
        """Adds them."""
        seen = self.seen
        for module in modules:
            key = id(module)
            seen[key] = _Seen(module, lambda _, key=key: seen.pop(key, None))


def _has_buffer(module: nn.Module) -> bool:
    return any(buffer is not None for buffer in module._buffers.values())


def _strip(modules: Iterable[nn.Module]) -> None:
    """Takes away the buffers that appeared in them."""
    for module in modules:
        module._buffers.update(dict.fromkeys(module._buffers))
