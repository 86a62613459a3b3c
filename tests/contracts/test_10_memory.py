"""Contract 10: memory beyond parameters, gradients and base state, counted in live tensor bytes at every operation."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

import flatmin
from tests.contracts.cases import each_method
from tests.contracts.live_bytes import LiveBytes

# Copies of the parameters allowed inside a step (form -> with default options), from design contract 10.
ALLOWED = {
    "sam": {"closure": 1, "loop": 1},
    "nso": {"closure": 3, "loop": 2},
    "nso-one-point": {"closure": 2, "loop": 2},
}


def peak_copies(method: str, form: str, **options) -> tuple[float, float]:
    """Peak during and rest after a step, in copies of the parameters, beyond one set of gradients."""
    layers = 16  # many small layers: what backward holds for one layer is a sixteenth of a copy
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(layers)])
    optimizer = flatmin.methods()[method].build(SGD(model.parameters(), lr=1e-3), **options)
    x = torch.randn(1, 64)
    copy = sum(p.numel() * p.element_size() for p in model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    def step():
        if form == "closure":
            optimizer.step(closure)
        else:
            for _ in optimizer.probes():  # type: ignore[attr-defined]
                model(x).square().mean().backward()
            optimizer.step()

    step()
    optimizer.zero_grad()
    with LiveBytes() as memory:
        memory.ignore(*model.parameters(), x)
        step()
        during = memory.peak / copy
        optimizer.zero_grad()
        after = memory.live / copy
    return during - 1.0, after


@each_method
@pytest.mark.parametrize("form", ["closure", "loop"])
def test_peak_inside_a_step_and_nothing_between(method, form):
    during, after = peak_copies(method, form)
    assert during < ALLOWED[method][form] + 0.25
    assert after < 0.01


@pytest.mark.parametrize("form", ["closure", "loop"])
def test_low_memory_saves_the_copy_of_the_noise(form):
    during, _ = peak_copies("nso", form)
    assert peak_copies("nso", form, low_memory=True)[0] < during - 0.75


@pytest.mark.parametrize("form", ["closure", "loop"])
def test_recompute_saves_the_copy_of_the_weights_too(form):
    during, _ = peak_copies("nso", form, low_memory=True)
    least = peak_copies("nso", form, low_memory=True, restore="recompute")[0]
    assert least < during - 0.75
    assert least < (1.25 if form == "closure" else 0.25)


def test_the_counter_counts():
    with LiveBytes() as memory:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b.view(10, 100)
        assert memory.live == 4000
        del b, c
        assert memory.live == 0
        assert memory.peak == 8000
