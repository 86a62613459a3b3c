"""`undisturbed`: modules whose train() does work, buffers that are made on the way."""

import pytest
import torch
from torch import nn

from flatmin.quiet import undisturbed


class Merging(nn.Linear):
    """As LoRA layers do: the update is merged into the weight in evaluation mode, and taken out again for training."""

    def __init__(self):
        super().__init__(3, 3)
        self.merged = False
        self.register_buffer("cache", None)
        self.register_buffer("total", torch.zeros(()))

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            with torch.no_grad():
                self.weight.add_(-1.0 if mode else 1.0)
            self.total += -1.0 if mode else 1.0
            self.merged = not mode
        return self

    def forward(self, input):
        self.cache = input.sum()
        return super().forward(input)


@pytest.mark.parametrize("where", ["the root", "in an eval root", "in a part"])
def test_a_module_whose_train_does_work_is_as_before(where):
    layer = Merging()
    model: nn.Module = layer
    for _ in range({"the root": 0, "in an eval root": 1, "in a part": 2}[where]):
        model = nn.Sequential(model)
    model.train()
    if where == "in an eval root":
        model.training = False
    modes, weight = [m.training for m in model.modules()], layer.weight.clone()
    with undisturbed(model):
        assert layer.merged
        model(torch.ones(2, 3))
    assert [m.training for m in model.modules()] == modes
    assert not layer.merged
    assert torch.allclose(layer.weight, weight)
    assert layer.total == 0


def test_a_frozen_part_stays_frozen():
    first, second = Merging(), Merging()
    model = nn.Sequential(first, nn.Sequential(second)).train()
    model[1].eval()
    weights = [p.clone() for p in model.parameters()]
    with undisturbed(model):
        pass
    assert [m.training for m in model.modules()] == [True, True, False, False]
    assert [first.merged, second.merged] == [False, True]
    assert all(torch.allclose(p, w) for p, w in zip(model.parameters(), weights, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_a_buffer_that_was_none_is_none_again(training):
    model = Merging().train(training)
    with undisturbed(model):
        model(torch.ones(2, 3))
        assert model.cache is not None
    assert model.cache is None
