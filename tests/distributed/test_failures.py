"""A rank that dies, or stays away, does not leave the others hanging, and the run goes on from the last checkpoint."""

import os
import time

import pytest
import torch

from flatmin.distributed import LOST
from tests.distributed.pool import Pool
from tests.distributed.setups import Run, assert_near, share
from tests.distributed.test_checkpoints import load, save

SECONDS = 2.0  # the time-out of the process group


def fail(rank, how, what, path):
    """Four steps with a checkpoint after the second; in the fifth rank 1 is missing."""
    run = Run("sam", how, share(rank))
    save(run.run(2), path)
    run.run(2)
    parts = [getattr(p, "_local_tensor", p).detach() for p in run.optimizer.params]
    before = [t.clone() for t in parts]
    if rank == 1:
        if what == "dies":
            os._exit(1)
        time.sleep(3 * SECONDS)
        return None
    start = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        run.step("closure")
    restored = all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))
    return error.value.__notes__, time.monotonic() - start, restored


def start_again(rank, how, path):
    run = Run("sam", how, share(rank))
    load(run, path)
    return run.run(4).weights()


@pytest.mark.slow
@pytest.mark.parametrize(("how", "what"), [("ddp", "dies"), ("fsdp", "stays away")])
def test_the_others_stop_with_a_clear_error_and_all_go_on_from_the_checkpoint(ranks, tmp_path, how, what):
    pool = Pool(timeout=SECONDS)
    try:
        (notes, seconds, restored), other = pool(fail, how, what, tmp_path)
    finally:
        pool.stop()
    assert other == ("dead" if what == "dies" else None)
    assert notes == [LOST]
    assert seconds < 3 * SECONDS
    assert restored
    again = ranks(start_again, how, tmp_path)[0]
    uninterrupted = ranks(unbroken, how)[0]
    assert_near(again, uninterrupted, atol=0)


def unbroken(rank, how):
    return Run("sam", how, share(rank)).run(6).weights()
