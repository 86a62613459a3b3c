"""Measuring takes its devices from the model: what `torch.set_default_device` says has no part in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import flatmin

MEASURES: dict[str, Callable[[flatmin.Objective], Any]] = {
    "loss": lambda o: o.loss(),
    "trace": lambda o: flatmin.trace(o, max_products=8).value,
    **{
        f"trace, {method}": lambda o, method=method: flatmin.trace(o, method=method, max_products=16).value
        for method in ("hutchinson", "gauss-newton", "hutch++", "xtrace")
    },
    "eigenvalues": lambda o: flatmin.top_eigenvalues(o, 2).values,
    "of Gauss-Newton": lambda o: flatmin.top_eigenvalues(flatmin.GaussNewtonOperator(o)).values,
    "of Fisher": lambda o: flatmin.top_eigenvalues(flatmin.FisherOperator(o)).values,
    "density": lambda o: flatmin.spectral_density(o).negative_mass.value,
    "noise stability": lambda o: flatmin.noise_stability(o, 0.01).value,
    "ascent sharpness": lambda o: flatmin.ascent_sharpness(o, 0.05).value,
    "average sharpness": lambda o: flatmin.average_sharpness(o, 0.05).value,
    "blocks": lambda o: [block.value for block in flatmin.block_eigenvalues(o).values()],
    "published number": lambda o: flatmin.layerwise_rayleigh_sum(o).value,
    "slice": lambda o: flatmin.loss_slice(o, flatmin.random_direction(o), num_points=3).losses,
    "flat minimum": lambda o: flatmin.flat_minimum_estimate(o).trace_gradient.value,
}


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_another_default_device_changes_nothing(measure, activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), activation(), nn.Linear(8, 3))
    data = list(zip(torch.randn(60, 5).split(20), torch.randint(3, (60,)).split(20), strict=True))

    def found() -> Any:
        return measure(flatmin.Objective(model, nn.CrossEntropyLoss(), data))

    expected = found()
    with torch.device("meta"):
        assert found() == pytest.approx(expected, rel=1e-6)
