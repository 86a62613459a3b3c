"""What a run says of flatness: two numbers that hang on the scale of the weights, and one that does not."""

import pytest
import torch
from torch import nn

from flatmin.lab.flatness import flatness_of


def test_the_rise_in_the_adaptive_ball_has_no_part_in_the_scale_of_the_weights():
    torch.manual_seed(0)
    first, second = nn.Linear(10, 16), nn.Linear(16, 3)
    model = nn.Sequential(first, nn.ReLU(), second).double()
    data = torch.randn(50, 10).double(), torch.randint(3, (50,))
    before = flatness_of(model, nn.CrossEntropyLoss(), data, 0)
    with torch.no_grad():  # the same function
        first.weight.mul_(5.0)
        first.bias.mul_(5.0)
        second.weight.div_(5.0)
    after = flatness_of(model, nn.CrossEntropyLoss(), data, 0)
    assert after["adaptive_sharpness"] == pytest.approx(before["adaptive_sharpness"], rel=1e-6)
    assert before["adaptive_sharpness"] > 0
    traces = [found["flatness"]["trace"]["value"] for found in (before, after)]
    assert traces[1] > 2 * traces[0]
