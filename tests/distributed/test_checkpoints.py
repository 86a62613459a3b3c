"""Sharded checkpoints through torch.distributed.checkpoint: resume, also on another number of processes."""

import pytest
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tests.distributed.setups import Run, assert_near, share

# Of one process that loads alone.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
REMEMBERING = [("friendly-sam", "adamw"), ("bsam", "sgd"), ("looksam", "sgd"), ("eigen-sam", "sgd")]
CASES = [("sam", "adamw"), ("nso", "sgd"), *REMEMBERING]


def save(run, path):
    model, optimizer = get_state_dict(run.model, run.optimizer)
    checkpoint.save({"model": model, "optimizer": optimizer}, checkpoint_id=path)


def load(run, path):
    model, optimizer = get_state_dict(run.model, run.optimizer)
    checkpoint.load({"model": model, "optimizer": optimizer}, checkpoint_id=path)
    set_state_dict(run.model, run.optimizer, model_state_dict=model, optim_state_dict=optimizer)


def begin(rank, method, base, how, path):
    run = Run(method, how, share(rank), base)
    run.optimizer.param_groups[0][run.optimizer.radius_name] = 0.07  # scheduled: not what the constructor says
    save(run.run(3), path)


def go_on(rank, method, base, how, path):
    run = Run(method, how, share(rank), base)
    load(run, path)
    return run.run(3).weights()


def uninterrupted(method, base):
    run = Run(method, "alone", slice(None), base)
    run.optimizer.param_groups[0][run.optimizer.radius_name] = 0.07
    return run.run(6).weights()


@pytest.mark.parametrize(("method", "base"), CASES)
def test_resume_equals_uninterrupted(ranks, tmp_path, method, base):
    ranks(begin, method, base, "fsdp", tmp_path)
    expected = uninterrupted(method, base)
    for weights in ranks(go_on, method, base, "fsdp", tmp_path):
        assert_near(weights, expected)


@pytest.mark.parametrize(("method", "base"), CASES)
def test_saved_by_two_loaded_by_one(ranks, tmp_path, method, base):
    ranks(begin, method, base, "fsdp", tmp_path)
    run = Run(method, "alone", slice(None), base)
    load(run, tmp_path)
    assert_near(run.run(3).weights(), uninterrupted(method, base))


@pytest.mark.parametrize("how", ["fsdp", "ddp"])
def test_saved_by_one_loaded_by_two(ranks, tmp_path, how):
    run = Run("friendly-sam")
    run.optimizer.param_groups[0]["rho"] = 0.07
    save(run.run(3), tmp_path)
    for weights in ranks(go_on, "friendly-sam", "sgd", how, tmp_path):
        assert_near(weights, uninterrupted("friendly-sam", "sgd"))


@pytest.mark.parametrize("method", [method for method, _ in REMEMBERING])
def test_what_is_set_up_for_a_checkpoint_is_not_taken_for_memory(method):
    # A plain base: torch sets up a momentum with a step that takes weight decay along.
    looked_at, other = Run(method, base="plain"), Run(method, base="plain")
    get_state_dict(looked_at.model, looked_at.optimizer)
    assert_near(looked_at.run(3).weights(), other.run(3).weights(), atol=0)
