"""Noise of its own on every rank: k x world size perturbations for the price of k."""

import math

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import flatmin
from tests.distributed.setups import Run, assert_near, share

SIGMA, DRAWS = 0.1, 400
CURVATURES = torch.linspace(0.5, 2.0, 20, dtype=torch.float64)


class Quadratic(nn.Module):
    """f(w) = sum_i h_i w_i^2 / 2."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(20, dtype=torch.float64))

    def forward(self):
        return (CURVATURES * self.w.square()).sum() / 2


def deviations(rank, options):
    """|G - g|^2 for many directions of one-point NSO at the same weights; both ranks have the same loss."""
    model = DistributedDataParallel(Quadratic())
    optimizer = flatmin.NSO(SGD(model.parameters(), lr=0.0), SIGMA, antithetic=False, **options)
    w = model.module.w
    found = []
    for _ in range(DRAWS):
        for _ in optimizer.probes():
            model().backward()
        found.append(float((w.grad - CURVATURES * w.detach()).square().sum()))
        optimizer.step()
    return found


@pytest.mark.parametrize(("options", "draws"), [({}, 1), ({"noise_per_rank": True}, 2)])
def test_the_variance_is_that_of_world_size_times_as_many_draws(ranks, options, draws):
    # G - g = H U, U the mean of that many normal draws: E |H U|^2 = sigma^2 / draws |H|_F^2.
    first, second = (torch.tensor(found, dtype=torch.float64) for found in ranks(deviations, options))
    assert torch.equal(first, second)
    variances = SIGMA**2 / draws * CURVATURES**2
    stderr = math.sqrt(2 * float(variances.square().sum()) / DRAWS)
    assert abs(float(first.mean() - variances.sum())) < 4 * stderr
    assert stderr < variances.sum() / 50  # small enough to tell one draw from two


def train(rank, steps, options, state=None):
    run = Run("nso", "ddp", share(rank), noise_per_rank=True, **options)
    if state is not None:
        run.plain.load_state_dict(state[0])
        run.optimizer.load_state_dict(state[1])
    run.run(steps)
    return run.weights(), (run.plain.state_dict(), run.optimizer.state_dict())


def test_it_is_reproducible_and_resumes(ranks):
    (whole, _), (other, _) = ranks(train, 4, {})
    assert_near(whole, other, atol=0)
    assert_near(ranks(train, 4, {})[0][0], whole, atol=0)
    (_, state), _ = ranks(train, 2, {})
    assert_near(ranks(train, 2, {}, state)[0][0], whole, atol=0)
    assert_near(ranks(train, 4, {"low_memory": True})[0][0], whole, atol=0)
    shared = Run("nso").run(4).weights()
    assert (whole["3.weight"] - shared["3.weight"]).abs().max() > 1e-4


def refused(rank):
    with pytest.raises(ValueError, match="noise_per_rank=True needs a place for each process"):
        Run("nso", "fsdp", share(rank), noise_per_rank=True).run(1)


def test_shards_have_one_place(ranks):
    ranks(refused)
