"""The base's step is taken without torch's wrapper only where nobody could tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import flatmin


def _stepping() -> tuple[flatmin.SAM, Callable[[], torch.Tensor]]:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1), torch.randn(4, 3)
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    return optimizer, closure


def test_a_profiler_sees_the_step_of_the_base_once() -> None:
    optimizer, closure = _stepping()
    optimizer.step(closure)
    with torch.profiler.profile() as profile:
        optimizer.step(closure)
    names = [event.name for event in profile.events() or ()]
    assert names.count("Optimizer.step#SGD.step") == 1


@pytest.mark.parametrize("register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook])
def test_global_hooks_run_once_with_the_base(register: Any) -> None:
    optimizer, closure = _stepping()
    seen: list[Any] = []
    handle = register(lambda base, *_: seen.append(base))
    try:
        optimizer.step(closure)
    finally:
        handle.remove()
    assert seen == [optimizer.base]


@pytest.mark.parametrize("event", ["pre", "post"])
def test_own_hooks_run_once(event: str) -> None:
    optimizer, closure = _stepping()
    seen: list[Any] = []
    getattr(optimizer.base, f"register_step_{event}_hook")(lambda base, *_: seen.append(base))
    optimizer.step(closure)
    assert seen == [optimizer.base]


def test_a_step_that_somebody_put_on_the_instance_is_the_one_that_runs() -> None:
    optimizer, closure = _stepping()
    seen: list[str] = []
    original = optimizer.base.step
    optimizer.base.step = lambda *_: seen.append("mine") or original()  # type: ignore[method-assign]
    optimizer.step(closure)
    assert seen == ["mine"]


def test_a_step_that_somebody_put_on_the_class_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, closure = _stepping()
    seen: list[str] = []
    original = torch.optim.SGD.step

    def mine(self: Any, *args: Any) -> Any:
        seen.append("mine")
        return original(self, *args)

    mine.__wrapped__ = original  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.optim.SGD, "step", mine)
    optimizer.step(closure)
    assert seen == ["mine"]


def test_what_torch_has_wrapped_is_called_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, closure = _stepping()
    monkeypatch.setattr(torch.autograd.profiler, "record_function", None)  # calling it would raise
    optimizer.step(closure)
    with pytest.raises(TypeError):
        optimizer.base.step()
