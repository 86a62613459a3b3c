"""Contract 8 where the only buffer of a model appears while it is trained."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.contracts.cases import MODELS, Case, each_method, each_whole_method


class Bare(nn.Linear):
    """Counts its calls in a buffer, which is `None` until it is due."""

    def __init__(self):
        super().__init__(6, 3)
        self.register_buffer("calls", None)
        self.due = True

    def forward(self, input):
        if self.calls is not None:
            self.calls = self.calls + 1
        elif self.due:
            self.calls = torch.ones(())
        return super().forward(input)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(MODELS, "bare", Bare)


@each_whole_method
@pytest.mark.parametrize("due_at", [0, 3])
@pytest.mark.parametrize("named", [False, True])
def test_it_counts_steps_from_then_on(method, due_at, named):
    case = Case(method, model_name="bare")
    model: Any = case.model
    if named:
        case.optimizer.name_model(model)
    for step in range(6):
        model.due = step >= due_at
        case.step()
        expected = None if step < due_at else step - due_at + 1
        assert (model.calls if expected is None else int(model.calls)) == expected


@each_method
def test_it_is_gone_if_the_step_is_skipped(method):
    case = Case(method, model_name="bare")
    model: Any = case.model
    model.due = False
    case.step()
    model.due, case.x = True, case.x * math.nan
    with pytest.warns(RuntimeWarning, match="not finite"):
        case.step()
    assert model.calls is None


@pytest.mark.parametrize("method", ["sam", "nso"])
def test_it_is_gone_if_a_later_probe_made_it(method):
    case = Case(method, model_name="bare")
    model: Any = case.model
    model.due = False
    case.step()
    for number, _ in enumerate(case.optimizer.probes()):
        model.due = number == 1
        case.loss().backward()
    case.optimizer.step()
    assert model.calls is None
