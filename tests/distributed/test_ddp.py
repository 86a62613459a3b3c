"""Contract 11, DDP: two processes, each with half of the batch, equal one process with all of it."""

import contextlib
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _global_forward_pre_hooks
from torch.optim import SGD

import flatmin
from benchmarks.collectives import Collectives
from flatmin.optim.parts import some
from tests.distributed.setups import METHODS, Run, assert_near, make_batch, share

STEPS = 3
# They choose among the samples of one process; what they equal is tested below.
BY_SAMPLE = ("sap", "esam", "nso-split", "rwp")
# Their first gradient only says where to look.
ASCENDING = ("sam", "usam", "asam", "monge-sam", "fisher-sam", "random-sam", "esam")


def train(rank, method, how, form, base, options):
    run = Run(method, how, share(rank), base, **options).run(STEPS, form)
    return run.weights()


def synced(method):
    return {"sync_ascent": True} if method in ASCENDING else {}


@pytest.mark.parametrize("method", [m for m in METHODS if m not in BY_SAMPLE])
@pytest.mark.parametrize(("base", "form"), [("sgd", "loop"), ("adamw", "closure")])
def test_ranks_equal_one_process(ranks, method, base, form):
    first, second = ranks(train, method, "ddp", form, base, synced(method))
    assert_near(first, second, atol=0)
    one = Run(method, "alone", slice(None), base, **synced(method)).run(STEPS, form)
    assert_near(first, one.weights())
    assert (first["3.weight"] - Run(method).weights()["3.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["nso-split", "rwp"])
def test_half_batches_are_halves_of_each_share(ranks, method):
    first, second = ranks(train, method, "ddp", "loop", "sgd", {})
    assert_near(first, second, atol=0)
    eighths = torch.arange(32).view(4, 8)  # rank 0 has the first two; its halves are one each
    rows = torch.cat([eighths[0], eighths[2], eighths[1], eighths[3]])
    assert_near(first, Run(method, rows=rows).run(STEPS).weights())


def own_direction(method, rank, weights):
    """What one process with this share of the batch would do at these weights."""
    run = Run(method, rows=share(rank))
    run.plain.load_state_dict(weights)
    for _ in run.optimizer.probes():
        run.evaluate()
    return [p.grad for p in run.optimizer.params]


@pytest.mark.parametrize("method", ASCENDING)
def test_without_synchronisation_each_rank_looks_for_itself(ranks, method):
    first, second = ranks(train_once, method, {"sync_ascent": False})
    assert_near(first, second, atol=0)
    one = Run(method)
    both = [own_direction(method, rank, one.plain.state_dict()) for rank in (0, 1)]
    for p, a, b in zip(one.optimizer.params, *both, strict=True):
        p.grad = (a + b) / 2
    one.optimizer.base.step()
    assert_near(first, one.weights())
    same = Run(method, sync_ascent=True).run(1).weights()
    assert (first["3.weight"] - same["3.weight"]).abs().max() > 1e-6


def train_once(rank, method, options):
    return Run(method, "ddp", share(rank), **options).run(1).weights()


def gradients(run, rows, choose=lambda losses: losses):
    x, y = make_batch()
    losses = choose(F.cross_entropy(run.model(x[rows]), y[rows], reduction="none"))
    return torch.autograd.grad(losses.mean(), run.optimizer.params), losses.detach()


def mean(first, second):
    return [(a + b) / 2 for a, b in zip(first, second, strict=True)]


def dot(a, b):
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


def at(run, displacement, scale, function):
    """`function()` with the weights at W + scale * displacement."""
    with torch.no_grad():
        before = [p.clone() for p in run.optimizer.params]
        for p, d in zip(run.optimizer.params, displacement, strict=True):
            p.add_(d, alpha=scale)
    found = function()
    with torch.no_grad():
        for p, b in zip(run.optimizer.params, before, strict=True):
            p.copy_(b)
    return found


def test_esam_looks_together_and_each_rank_chooses_its_samples(ranks):
    first, second = ranks(train_once, "esam", {"sync_ascent": True})
    assert_near(first, second, atol=0)
    one = Run("esam")
    (g0, l0), (g1, l1) = gradients(one, share(0)), gradients(one, share(1))
    g = mean(g0, g1)

    def hardest(before):
        return lambda losses: losses[(losses.detach() - before).topk(8).indices]

    def second_pass():
        return [gradients(one, share(r), hardest(before))[0] for r, before in ((0, l0), (1, l1))]

    found = at(one, g, 0.05 / float(dot(g, g)) ** 0.5, second_pass)
    for p, d in zip(one.optimizer.params, mean(*found), strict=True):
        p.grad = d
    one.optimizer.base.step()
    assert_near(first, one.weights())


def test_sap_averages_what_each_rank_finds_with_its_own_samples(ranks):
    first, second = ranks(train_once, "sap", {})
    assert_near(first, second, atol=0)
    one = Run("sap")
    one.optimizer.noise()
    seed = one.optimizer.new_seed()
    chosen = torch.tensor(some(4, seed)(16))
    sign = 1.0 if seed % 2 else -1.0
    g = mean(gradients(one, share(0))[0], gradients(one, share(1))[0])
    found = []
    for rank in (0, 1):
        rows = chosen + 16 * rank
        own = gradients(one, rows)[0]
        found.append(at(one, own, sign * 0.05 / float(dot(own, own)) ** 0.5, lambda r=rows: gradients(one, r)[0]))
    v = mean(*found)
    for p, a, b in zip(one.optimizer.params, g, v, strict=True):
        p.grad = a + b - a * (dot(v, g) / dot(g, g))
    one.optimizer.base.step()
    assert_near(first, one.weights())


def count(rank, method, how, form, options):
    """Gradient all-reduces, all-reduces of a few numbers, and probes, of one step."""
    run = Run(method, how, share(rank), **options)
    run.run(2, form)  # DDP rebuilds its buckets in the second forward
    run.probes = 0
    with Collectives() as seen:
        run.step(form)
    return seen.count("all_reduce"), seen.count("all_reduce", single=True), run.probes


@pytest.mark.parametrize(
    ("method", "form", "options", "expected"),
    [
        ("nso", "loop", {"num_perturbations": 3}, 1),
        ("nso", "loop", {"num_perturbations": 2, "clean_weight": 0.5}, 1),
        ("nso", "closure", {}, 2),  # the closure clears gradients, so each probe's has to be averaged
        ("nso-split", "loop", {}, 1),
        ("rwp", "loop", {}, 1),
        ("sam", "loop", {}, 1),
        ("sam", "closure", {}, 1),
        ("sam", "loop", {"sync_ascent": True}, 2),
        ("monge-sam", "loop", {}, 1),
        ("random-sam", "loop", {}, 1),
        ("momentum-sam", "loop", {}, 1),
        ("gsam", "loop", {}, 2),
        ("rsp", "loop", {}, 2),
        ("sap", "loop", {}, 2),
    ],
)
def test_collectives_of_a_step(ranks, method, form, options, expected):
    for gradient_reduces, numbers, _ in ranks(count, method, "ddp", form, options):
        assert gradient_reduces == expected
        assert numbers == 1  # whether all may step
    assert all(n == 0 for _, n, _ in ranks(count, method, "ddp", form, {**options, "guard": False}))


def micro_batches(rank):
    """Accumulation as its authors write it: the caller's own no_sync on all but the last micro-batch."""
    run = Run("nso", "ddp", share(rank), num_perturbations=2)
    model: Any = run.model
    x, y = (t[run.rows] for t in make_batch())
    with Collectives() as seen:
        for _ in run.optimizer.probes():
            with model.no_sync():
                (F.cross_entropy(run.model(x[:8]), y[:8]) / 2).backward()
            (F.cross_entropy(run.model(x[8:]), y[8:]) / 2).backward()
        run.optimizer.step()
    return run.weights(), seen.count("all_reduce"), run.model.require_backward_grad_sync


def test_the_callers_own_no_sync_stays_in_charge(ranks):
    for weights, gradient_reduces, restored in ranks(micro_batches):
        assert_near(weights, Run("nso", num_perturbations=2).run(1).weights())
        assert gradient_reduces == 1
        assert restored


def broken_loop(rank):
    run = Run("nso", "ddp", share(rank))
    seen = []
    for _ in run.optimizer.probes():
        seen.append(run.model.require_backward_grad_sync)
        run.evaluate()
        seen.append(run.model.require_backward_grad_sync)
        break
    return seen, run.model.require_backward_grad_sync, len(_global_forward_pre_hooks)


def test_leaving_a_loop_leaves_nothing_switched_off(ranks):
    for seen, restored, hooks in ranks(broken_loop):
        assert seen == [True, False]  # met in the forward; the second probe would have been the one to reduce
        assert restored
        assert hooks == 0


def poisoned(rank, method, form, how, who):
    """One rank's loss is not finite at the second of three steps."""
    run = Run(method, how, share(rank))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        for step in range(3):

            def closure(bad=rank == who and step == 1):
                run.optimizer.zero_grad()
                loss = run.evaluate()
                return loss * math.inf if bad else loss

            if form == "closure":
                run.optimizer.step(closure)
                continue
            for number, _ in enumerate(run.optimizer.probes()):
                run.evaluate()
                if rank == who and step == 1 and number == 1:  # after the all-reduce, which would have spread it
                    run.optimizer.params[0].grad.fill_(math.nan)
            run.optimizer.step()
    texts = [str(w.message) for w in caught if "skipped step" in str(w.message)]
    return run.weights(), run.optimizer.num_skipped, texts


@pytest.mark.parametrize("method", ["sam", "nso"])
@pytest.mark.parametrize("form", ["closure", "loop"])
def test_ranks_skip_together(ranks, method, form):
    (first, skipped, text), (second, also, other) = ranks(poisoned, method, form, "ddp", 1)
    assert_near(first, second, atol=0)
    assert skipped == also == 1
    assert ("loss" if form == "closure" else "direction") in other[0]
    assert "of another process" in text[0]


def overflowing(rank):
    """fp16's scaler: an overflow on one rank, in the pass that only looks."""
    run = Run("sam", "ddp", share(rank))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = (t[run.rows] for t in make_batch())
    for number, _ in enumerate(run.optimizer.probes(scaler)):
        scaler.scale(F.cross_entropy(run.model(x), y)).backward()
        if rank == 1 and number == 0:
            run.optimizer.params[0].grad.fill_(math.inf)
    run.optimizer.step()
    return run.weights(), run.optimizer.num_skipped, scaler.get_scale()


def test_an_overflow_on_one_rank_skips_on_all_and_lowers_all_scales(ranks):
    start = Run("sam").weights()
    for weights, skipped, scale in ranks(overflowing):
        assert_near(weights, start, atol=0)
        assert skipped == 1
        assert scale == 512.0


def sometimes_used(rank, how):
    """A parameter that takes part in the first of two points only."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"always": nn.Linear(2, 1), "first": nn.Linear(2, 1)})
    optimizer = flatmin.NSO(SGD(model.parameters(), lr=0.1), 0.1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts, self.calls = model, 0

        def forward(self, x):
            self.calls += 1
            return self.parts["always"](x) + (self.parts["first"](x) if self.calls % 2 else 0.0)

    net: Any = Net()
    if how == "ddp":
        net = torch.nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    x = torch.arange(8.0).view(4, 2)
    for _ in optimizer.probes():
        net(x if how == "alone" else x[2 * rank : 2 * rank + 2]).square().mean().backward()
    optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def test_a_parameter_that_only_the_first_point_uses_is_averaged(ranks):
    first, second = ranks(sometimes_used, "ddp")
    assert_near(first, second, atol=0)
    assert_near(first, sometimes_used(0, "alone"), atol=1e-6)


def test_only_rules_that_look_take_the_argument():
    gsam: Any = flatmin.GSAM
    with pytest.raises(ValueError, match="part of its direction"):
        gsam(torch.optim.SGD(Run("base").model.parameters(), lr=0.1), sync_ascent=True)


def shares_without_averaging(rank, outside):
    run = Run("sam", "ddp", share(rank))
    model: Any = run.model
    message = ""
    try:
        for number in range(2):
            with model.no_sync() if number == 0 and outside else contextlib.nullcontext():
                for _ in run.optimizer.probes(share=0.5):
                    run.evaluate()
        run.optimizer.step()
    except ValueError as error:
        message = str(error)
    return message, run.weights()


def test_shares_inside_no_sync_are_refused(ranks):
    (first, a), (second, b) = ranks(shares_without_averaging, True)
    assert first == second
    assert "inside no_sync" in first
    assert_near(a, Run("sam").weights(), atol=0)
    assert_near(b, Run("sam").weights(), atol=0)
    (message, a), (_, b) = ranks(shares_without_averaging, False)
    assert message == ""
    assert_near(a, b, atol=0)
