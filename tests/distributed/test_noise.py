"""The noise of a global element is the same whatever the sharding: one process, replicas, shards of any kind."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.optim import SGD

import flatmin
from flatmin import noise
from flatmin.noise import Noise
from flatmin.radii import Radii
from tests.distributed.setups import whole

SHAPES = [(7, 5), (1,), (), (3, 4, 2), (11,), (64, 33)]
PLACEMENTS = {"rows": Shard(0), "columns": Shard(1), "copies": Replicate()}


def weights(dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


def draw(like, law, scale, **options):
    radii = Radii([0.1 * (i + 1) for i in range(len(like))])
    return Noise(like, radii, law, 9, scale=scale, **options)


def drawn_in_shards(rank, placement, law, scale, block, world_size):
    usual = noise.BLOCK, noise.SMALL
    noise.BLOCK, noise.SMALL = block, min(block, 2**12)
    try:
        mesh = init_device_mesh("cpu", (world_size,))
        like = []
        for t in weights():
            on = PLACEMENTS[placement] if t.ndim > (placement == "columns") else Replicate()
            like.append(distribute_tensor(t, mesh, [on]))
        vector = draw(like, law, scale).vector()
        moved = [torch.zeros_like(t) for t in like]
        draw(like, law, scale, keep=False).add_to(moved)
        return [whole(t) for t in vector.present], [whole(t) for t in moved]
    finally:
        noise.BLOCK, noise.SMALL = usual


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("law", ["normal", "laplace", "binomial"])
@pytest.mark.parametrize("block", [2**20, 50])
def test_shards_draw_what_one_process_draws(ranks, monkeypatch, placement, law, block):
    monkeypatch.setattr(noise, "BLOCK", block)
    monkeypatch.setattr(noise, "SMALL", min(block, 2**12))
    expected = draw(weights(), law, "absolute").vector().present
    for kept, redrawn in ranks(drawn_in_shards, placement, law, "absolute", block, 2):
        assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(redrawn, expected, strict=True))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_filter_noise_in_shards(ranks, placement):
    expected = draw(weights(), "normal", "filter").vector().present
    for kept, _ in ranks(drawn_in_shards, placement, "normal", "filter", 2**20, 2):
        for a, b in zip(kept, expected, strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=1e-14)


def test_blocks_have_streams_of_their_own(monkeypatch):
    monkeypatch.setattr(noise, "BLOCK", 1000)
    z = draw([torch.zeros(10_000)], "normal", "absolute").vector().present[0].view(10, 1000)
    correlation = torch.corrcoef(z) - torch.eye(10)
    assert correlation.abs().max() < 5 / 1000**0.5
    assert len(z.unique()) > 9990


def test_the_layout_in_memory_does_not_matter():
    like = torch.zeros(4, 3, 5, 5)
    last = like.contiguous(memory_format=torch.channels_last)
    a, b = (draw([t], "normal", "absolute").vector().present[0] for t in (like, last))
    assert torch.equal(a, b)
    assert b.stride() == last.stride()


def really_random_seeds(rank):
    """Of three optimizers, of which the first process makes the last one alone."""
    made = [flatmin.NSO(SGD([torch.zeros(2)], lr=0.1), seed=None) for _ in range(3 - rank)]
    return [optimizer.param_groups[0]["seed"] for optimizer in made]


def seeds_after_one_has_measured_alone(rank):
    """Of an optimizer, and of a trace that all measure, after the first process has measured something alone."""
    data = [(torch.ones(2, 2), torch.ones(2, 1))]
    alone, together = (
        flatmin.Objective(torch.nn.Linear(2, 1), torch.nn.MSELoss(), data, group=group)
        for group in (None, torch.distributed.group.WORLD)
    )
    if rank == 0:
        flatmin.trace(alone, max_products=2, seed=None)
    optimizer = flatmin.NSO(SGD([torch.zeros(2)], lr=0.1), seed=None)
    return optimizer.param_groups[0]["seed"], flatmin.trace(together, max_products=2, seed=None).seed


def test_measuring_alone_leaves_the_others_their_seeds(ranks):
    first, second = ranks(seeds_after_one_has_measured_alone)
    assert first == second


def test_processes_share_a_seed_that_is_really_random(ranks):
    first, second = ranks(really_random_seeds)
    assert first[:2] == second
    assert len(set(first)) == 3
