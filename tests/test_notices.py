"""A warning points at the line that the user wrote, however deep inside it was found."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

import flatmin
from tests.curvature.nets import criterion, make


def skipping(scheduled):
    model = nn.Linear(2, 1)
    optimizer = flatmin.SAM(SGD(model.parameters(), lr=0.1))
    if scheduled:
        StepLR(optimizer, 1)  # wraps `step`

    def closure():
        optimizer.zero_grad()
        loss = model(torch.full((3, 2), math.nan)).sum()
        loss.backward()
        return loss

    return optimizer, closure


def by_closure(scheduled):
    optimizer, closure = skipping(scheduled)
    optimizer.step(closure)


def by_loop(scheduled):
    optimizer, _ = skipping(scheduled)
    for _probe in optimizer.probes():
        for p in optimizer.param_groups[0]["params"]:
            (p * math.nan).sum().backward()
    optimizer.step()


def objective():
    model, x, y = make("tanh")
    return flatmin.Objective(model, criterion, [(x, y)])


def inside_a_loop():
    model, x, y = make("tanh")
    optimizer = flatmin.NSO(SGD(model.parameters(), lr=0.1))
    for _probe in optimizer.probes():
        criterion(model(x), y).backward()
        flatmin.measure(model, criterion, [(x, y)], rtol=0.5)


def longer():
    averager = flatmin.Averager(nn.Linear(2, 1), num_steps=1)
    averager.update()
    averager.update()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: by_closure(scheduled=False), "skipped step 0"),
        (lambda: by_closure(scheduled=True), "skipped step 0"),
        (lambda: by_loop(scheduled=False), "skipped step 0"),
        (lambda: by_loop(scheduled=True), "skipped step 0"),
        (lambda: flatmin.top_eigenvalues(objective(), 3, max_products=4), "not converged after 4"),
        (lambda: flatmin.block_eigenvalues(objective(), max_products=2), "not converged after 2"),
        (inside_a_loop, "inside the body of a probes"),
        (longer, "more often than num_steps"),
        (lambda: flatmin.BSAM(SGD(nn.Linear(2, 1).parameters(), lr=0.1, momentum=0.9), num_data=5), "its base should"),
    ],
)
def test_warnings_point_here(act, message):
    with pytest.warns((UserWarning, RuntimeWarning), match=message) as caught:
        act()
    assert {w.filename for w in caught} == {__file__}
