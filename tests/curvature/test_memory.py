"""The copies of the parameters that a measure holds at once are those its documentation says."""

import pytest
import torch
from torch import nn

import flatmin
from tests.contracts.live_bytes import LiveBytes
from tests.curvature.nets import criterion


class Setting:
    """A model much larger than its batches, and directions that are there before."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        self.batches = [(torch.randn(2, 64), torch.randint(64, (2,))) for _ in range(2)]
        self.objective = flatmin.Objective(self.model, criterion, self.batches)
        self.directions = [flatmin.random_direction(self.objective, seed=seed) for seed in range(2)]
        self.tracker = flatmin.Tracker(self.objective, max_overhead=1.0, num_steps=16, sigma=0.1)

    def slice(self, number):
        flatmin.loss_slice(self.objective, *self.directions[:number], num_points=3)

    def average(self, metric):
        flatmin.average_sharpness(self.objective, 0.1, metric, num_draws=3)

    def ascent(self, metric):
        flatmin.ascent_sharpness(self.objective, 0.1, metric, num_steps=4)


@pytest.mark.parametrize(
    ("measure", "copies"),
    [
        (lambda s: flatmin.noise_stability(s.objective, 0.1, num_draws=3), 2),
        (lambda s: flatmin.noise_stability(s.objective, 0.1, num_draws=3, per_layer=True, scale="filter"), 2),
        (lambda s: s.average("euclidean"), 3),
        (lambda s: s.average("adaptive"), 4),
        (lambda s: s.average("filter"), 3),
        (lambda s: s.average("monge"), 5),
        (lambda s: s.ascent("euclidean"), 8),
        (lambda s: s.ascent("adaptive"), 10),
        (lambda s: s.ascent("filter"), 9),
        (lambda s: s.ascent("monge"), 10),
        (lambda s: s.slice(1), 2),
        (lambda s: s.slice(2), 2),
        (lambda s: flatmin.spectral_density(s.objective, num_probes=2, num_steps=16), 2 * 16 + 4),
        # In double precision, which counts twice, and what the eigenvector takes.
        (lambda s: flatmin.flat_minimum_estimate(s.objective, num_probes=30, num_eigenvectors=1), 2 * 30 + 45),
        (lambda s: (s.tracker.update(), s.tracker.update()), 16 + 9),
    ],
)
def test_the_copies_of_the_parameters(measure, copies):
    setting = Setting()
    size = sum(p.numel() * p.element_size() for p in setting.model.parameters())
    with LiveBytes() as memory:
        memory.ignore(*setting.model.parameters(), *[t for batch in setting.batches for t in batch])
        memory.ignore(*[t for direction in setting.directions for t in direction.present])
        measure(setting)
    assert memory.peak < (copies + 0.1) * size
