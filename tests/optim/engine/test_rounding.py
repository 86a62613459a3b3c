"""Displacements that do not arrive at weights of 16 bits: said once, at the first step that displaces."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD

import flatmin
from flatmin.optim.engine.rounding import rounding_error
from flatmin.vectors import Vector

NARROW = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def trained(optimizer, model, steps=1, dtype=torch.bfloat16):
    """The largest distance from the weights at which a loss was computed."""
    weight, start, furthest = model.weight, model.weight.detach().clone(), 0.0
    inputs, targets = torch.randn(8, 30, dtype=dtype), torch.randint(5, (8,))

    def closure():
        nonlocal furthest
        furthest = max(furthest, float((weight.detach() - start).abs().max()))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return furthest


def linear(dtype):
    torch.manual_seed(0)
    model = nn.Linear(30, 5).to(dtype)
    nn.init.constant_(model.weight, 1.0)
    nn.init.constant_(model.bias, 1.0)
    return model


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("method", ["SAM", "NSO", "RSP", "LookSAM", "FriendlySAM", "MomentumSAM"])
def test_a_displacement_that_does_not_arrive_is_said_once(method, dtype):
    model = linear(dtype)
    optimizer = getattr(flatmin, method)(SGD(model.parameters(), lr=0.0, momentum=0.9), 1e-5)
    kind = str(dtype).removeprefix("torch.")
    with pytest.warns(RuntimeWarning, match=f"^{method}: weights are stored in {kind}, .* by 100% .*larger") as found:
        assert trained(optimizer, model, steps=3, dtype=dtype) == 0.0
    assert len(found) == 1


@pytest.mark.parametrize("dtype", NARROW)
def test_one_that_arrives_is_not(dtype):
    model = linear(dtype)
    assert trained(flatmin.NSO(SGD(model.parameters(), lr=0.0), 0.1), model, dtype=dtype) > 0.1


def test_neither_in_32_bits_nor_without_the_guard():
    wide = linear(torch.float32)
    trained(flatmin.NSO(SGD(wide.parameters(), lr=0.0), 1e-5), wide, dtype=torch.float32)
    model = linear(torch.bfloat16)
    trained(flatmin.NSO(SGD(model.parameters(), lr=0.0), 1e-5, guard=False), model)


@pytest.mark.parametrize("low_memory", [False, True])
def test_beside_weights_of_32_bits_and_weights_that_stay(low_memory):
    model = nn.Sequential(linear(torch.float32), linear(torch.bfloat16), linear(torch.bfloat16))
    groups = [{"params": model[:2].parameters()}, {"params": model[2].parameters(), "sigma": 0.0}]
    optimizer = flatmin.NSO(SGD(groups, lr=0.0), 1e-5, low_memory=low_memory)
    before = [p.detach().clone() for p in model.parameters()]

    def closure():
        optimizer.zero_grad()
        loss = torch.stack([p.float().square().sum() for p in model.parameters()]).sum()
        loss.backward()
        return loss

    with pytest.warns(RuntimeWarning, match="NSO: weights are stored in bfloat16, .* by 100% of its length"):
        optimizer.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", NARROW)
def test_the_error_is_that_of_rounding(dtype):
    # Beside 1 lie 1 + 2 u and 1 - u with the unit roundoff u: 0.8 u up goes nowhere, 0.8 u down goes u.
    u = NARROW[dtype]
    params = [torch.ones(2, dtype=dtype), torch.ones(1)]
    moves = torch.tensor([0.8 * u, -0.8 * u], dtype=dtype)
    found = rounding_error(Vector([moves, torch.full((1,), 0.8 * u)]), params, [0])
    assert found == pytest.approx(math.hypot(0.8, 0.2) / math.hypot(0.8, 0.8), rel=0.02)
    assert rounding_error(Vector([0 * moves, None]), params, [0]) == 0.0
    assert torch.equal(params[0], torch.ones(2, dtype=dtype))
