"""The functions that benchmarks/step.py compares the engine with take the same steps, bit for bit."""

import pytest
import torch
import torch.nn.functional as F

import flatmin
from benchmarks.models import WORKLOADS
from benchmarks.special import RHO, SIGMA, Special

MAKE = {
    "sam": lambda base: flatmin.SAM(base, rho=RHO),
    "nso": lambda base: flatmin.NSO(base, sigma=SIGMA),
}


def train(method, own):
    workload = WORKLOADS[0]
    torch.manual_seed(0)
    model, x, y = workload.build(), workload.inputs(), torch.randint(10, (64,))
    base = workload.base(model)
    special, optimizer = Special(model, base), MAKE[method](base)
    clear = special.clear if own else optimizer.zero_grad
    step = getattr(special, method) if own else optimizer.step

    def closure():
        clear()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        step(closure)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("method", MAKE)
def test_a_function_of_its_own_takes_the_steps_of_the_engine(method):
    pairs = zip(train(method, own=True), train(method, own=False), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
