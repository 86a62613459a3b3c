"""How DistributedDataParallel is found and made: named, met, several of them, wrapped anew, compiled, options."""

import warnings
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.modules.module import _global_forward_pre_hooks
from torch.nn.parallel import DistributedDataParallel

import flatmin
from benchmarks.collectives import Collectives
from tests.distributed.setups import Run, assert_near, share

STEPS = 3


def train(rank, method):
    return Run(method, "ddp", share(rank)).run(STEPS).weights()


def named(rank):
    run = Run("sam", "ddp", share(rank))
    run.optimizer = flatmin.SAM(run.optimizer.base, model=nn.ModuleList([run.model]))
    with Collectives() as seen:
        run.step()
    return seen.count("all_reduce")


def test_the_model_may_be_named(ranks):
    assert ranks(named) == [1, 1]


def in_two_parts(rank, method, how):
    """A model of two modules that are wrapped apart, or that is wrapped anew before each step, also if others stay."""
    run = Run(method, "alone", share(rank))
    plain: Any = run.plain
    parts: Any = [plain[:3], plain[3:]]
    counted, kept = [], []
    for number in range(STEPS):
        if how != "apart":
            parts = [DistributedDataParallel(run.plain)]
        if how == "beside others":
            kept += parts
        if how == "apart" and number == 0:
            parts = [DistributedDataParallel(part) for part in parts]
        run.model = nn.Sequential(*parts)
        with Collectives() as seen:
            run.step()
        counted.append((seen.count("all_reduce"), len(_global_forward_pre_hooks)))
    return run.weights(), counted


@pytest.mark.parametrize("method", ["sam", "nso"])
@pytest.mark.parametrize("how", ["apart", "again", "beside others"])
def test_every_wrapper_is_met(ranks, method, how):
    expected = ranks(train, method)[0]
    for weights, counted in ranks(in_two_parts, method, how):
        assert_near(weights, expected)
        assert counted == [(2 if how == "apart" else 1, 0)] * STEPS


def in_groups_that_end(rank):
    """Each step in a process group of its own, which is destroyed afterwards."""
    run, counted = Run("sam", "alone", share(rank)), []
    for _ in range(STEPS):
        group: Any = distributed.new_group()
        run.model = DistributedDataParallel(run.plain, process_group=group)
        with Collectives() as seen:
            run.step()
        counted.append(seen.count("all_reduce", single=True))  # whether all may step
        distributed.destroy_process_group(group)
    return run.weights(), counted


def test_nothing_is_sent_to_a_group_that_was_destroyed(ranks):
    expected = ranks(train, "sam")[0]
    for weights, counted in ranks(in_groups_that_end):
        assert_near(weights, expected)
        assert counted == [1] * STEPS


def static_graph(rank, method, form):
    options: dict[str, Any] = {"sync_ascent": True} if (method, form) == ("sam", "closure") else {}
    run = Run(method, "alone", share(rank), **options)
    run.model = DistributedDataParallel(run.plain, static_graph=True)
    if form == "closure":
        return run.run(STEPS, form).weights()
    with pytest.raises(ValueError, match="Use static_graph=False; or a closure for NSO, sync_ascent=True for SAM"):
        run.step()
    return run.weights()


@pytest.mark.parametrize("method", ["sam", "nso"])
def test_a_static_graph_is_averaged_in_each_pass_or_refused(ranks, method):
    averaged, untouched = Run(method).run(STEPS).weights(), Run(method).weights()
    for weights in ranks(static_graph, method, "closure"):
        assert_near(weights, averaged)
    for weights in ranks(static_graph, method, "loop"):
        assert_near(weights, untouched, atol=0)


def compiled(rank, outside):
    """Compiled around DDP, or inside it."""
    warnings.simplefilter("ignore")  # torch.compile's own
    run = Run("sam", "ddp", share(rank))
    model: Any = run.model
    if outside:
        model = torch.compile(model, backend="eager")
    else:
        model.module = torch.compile(model.module, backend="eager")
    run.model = model
    run.optimizer = flatmin.SAM(run.optimizer.base, model=model)
    run.run(2)
    with Collectives() as seen:
        run.step()
    return run.weights(), seen.count("all_reduce")


@pytest.mark.parametrize("outside", [True, False])
def test_compiled_models(ranks, outside):
    expected = ranks(train, "sam")[0]
    for weights, gradient_reduces in ranks(compiled, outside):
        assert_near(weights, expected)
        assert gradient_reduces == 1


def bucket_views(rank, method):
    run = Run(method, "ddp", share(rank))
    run.model = DistributedDataParallel(run.plain, gradient_as_bucket_view=True)
    return run.run(STEPS).weights()


@pytest.mark.parametrize("method", ["gsam", "rsp", "wsam", "eigen-sam", "friendly-sam", "nso"])
def test_gradients_that_are_views_of_buckets(ranks, method):
    one = Run(method).run(STEPS).weights()
    for weights in ranks(bucket_views, method):
        assert_near(weights, one)
