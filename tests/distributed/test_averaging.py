"""Averages of shards: each process keeps its part, and together they are the average of one process."""

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import flatmin
from benchmarks.collectives import Collectives
from flatmin.distributed import reshard
from flatmin.shards import local
from tests.distributed.setups import Run, assert_near, make_batch, share

OPTIONS = [{"kind": "mean"}, {"kind": "ema", "decay": 0.7}, {"kind": "tail", "start": 3}]


def train(run, averager, steps=4):
    for _ in range(steps):
        run.step()
        averager.update()


def worn(run, averager):
    """The average as the model wears it: its weights, and the loss of the joint batch on a share."""
    before = {name: local(p).clone() for name, p in run.plain.named_parameters()}
    with torch.no_grad():
        run.model(make_batch()[0])
    with averager.applied(), torch.no_grad():
        outputs = run.model(make_batch()[0])
        reshard(run.model)
        weights = run.weights()
    with torch.no_grad():
        after = run.model(make_batch()[0])
    assert (after - outputs).abs().max() > 1e-3
    reshard(run.model)
    assert all(torch.equal(local(p), before[name]) for name, p in run.plain.named_parameters())
    return {**weights, "outputs": outputs, "after": after}


def average(rank, options, how):
    run = Run("sam", how, share(rank) if how != "alone" else slice(None))
    averager = flatmin.Averager(run.model, **options)
    train(run, averager)
    with torch.no_grad():
        run.model(make_batch()[0])  # the root keeps its weights gathered
    averager.update()
    return worn(run, averager)


@pytest.mark.parametrize("options", OPTIONS)
def test_shards_average_as_one_process_does(ranks, options):
    expected = average(0, options, "alone")
    for found in ranks(average, options, "root"):
        assert_near(found, expected)


def counted(rank):
    run = Run("sam", "fsdp", share(rank)).run(1)
    averager = flatmin.Averager(run.model, kind="mean")
    with Collectives() as seen:
        averager.update()
        with averager.applied():
            pass
    return {name: dict(sizes) for name, sizes in seen.sizes.items()}


def test_nothing_is_sent(ranks):
    nothing = {"all_reduce": {}, "reduce_scatter": {}, "all_gather": {}}
    assert ranks(counted) == [nothing, nothing]


def begin(rank, path):
    run = Run("sam", "fsdp", share(rank))
    averager = flatmin.Averager(run.model, kind="mean")
    train(run, averager, 3)
    state = averager.state_dict()
    assert all(isinstance(average, DTensor) for average in state["averages"].values())
    checkpoint.save({"averager": state}, checkpoint_id=path)
    return worn(run, averager)


def resumed(rank, path, how):
    run = Run("sam", how, share(rank))
    averager = flatmin.Averager(run.model, kind="mean")
    if how == "alone":
        averager.update()  # torch loads into what is there
    state = {"averager": averager.state_dict()}
    checkpoint.load(state, checkpoint_id=path)
    averager.load_state_dict(state["averager"])
    assert averager.num_averaged == 3
    with averager.applied():
        return run.weights(), averager.state_dict()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_averages_are_saved_in_shards(ranks, tmp_path):
    expected, _ = ranks(begin, tmp_path)
    expected = {name: expected[name] for name in Run("sam").weights()}
    alone, state = resumed(0, tmp_path, "alone")
    assert_near(alone, expected, atol=0)
    for found in ranks(resumed_weights, tmp_path):
        assert_near(found, expected, atol=0)
    for found in ranks(from_whole, state):
        assert_near(found, expected, atol=0)


def resumed_weights(rank, path):
    return resumed(rank, path, "fsdp")[0]


def from_whole(rank, state):
    """The state of one process, loaded by two."""
    run = Run("sam", "fsdp", share(rank))
    averager = flatmin.Averager(run.model, kind="mean")
    averager.load_state_dict(state)
    with averager.applied():
        return run.weights()


def low_precision(rank):
    model = nn.Linear(3, 5).bfloat16()
    fully_shard(model)
    averager = flatmin.Averager(model, kind="mean")
    averager.update()
    return {average.dtype for average in averager.state_dict()["averages"].values()}


def test_low_precision_is_accumulated_in_fp32(ranks):
    assert ranks(low_precision) == [{torch.float32}] * 2


def refreshed(rank):
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    fully_shard(model)
    averager = flatmin.Averager(model, kind="mean")
    with pytest.raises(ValueError, match="update_bn"):
        averager.refresh([torch.randn(5, 6)])


def test_batch_norm_is_refreshed_in_a_whole_model(ranks):
    ranks(refreshed)


def distance(rank):
    model = nn.Linear(3, 5)
    fully_shard(model)
    penalty = flatmin.DistancePenalty(model.parameters(), 1.0)
    with torch.no_grad():
        model.weight += 2.0
    return penalty.distance().item()


def test_the_distance_to_the_start_is_that_of_all_shards(ranks):
    assert ranks(distance) == [pytest.approx(2 * 15**0.5)] * 2
