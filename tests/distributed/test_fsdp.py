"""Contract 11, FSDP2: weights in shards on two processes equal one process with all of them."""

import math
import warnings

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import flatmin
from benchmarks.collectives import Collectives
from flatmin.distributed import reshard
from flatmin.radii import Radii
from flatmin.shards import local
from flatmin.vectors import Vector
from tests.contracts.cases import build
from tests.distributed.setups import METHODS, Run, assert_near, make_batch, share, whole, wrap

STEPS = 3
BY_SAMPLE = ("sap", "esam", "nso-split", "rwp")


def train(rank, method, form, base, options):
    return Run(method, "fsdp", share(rank), base, **options).run(STEPS, form).weights()


@pytest.mark.parametrize("method", [m for m in METHODS if m not in BY_SAMPLE])
@pytest.mark.parametrize(("base", "form"), [("sgd", "loop"), ("adamw", "closure")])
def test_shards_equal_one_process(ranks, method, base, form):
    first, second = ranks(train, method, form, base, {})
    assert_near(first, second, atol=0)
    one = Run(method, base=base).run(STEPS, form)
    assert_near(first, one.weights())
    assert (first["3.weight"] - Run(method).weights()["3.weight"]).abs().max() > 1e-3


def train_replicas(rank, method):
    return Run(method, "hsdp", share(rank)).run(STEPS).weights()


@pytest.mark.parametrize("method", ["sam", "nso", "gsam"])
def test_replicas_of_shards_count_once(ranks, method):
    first, second = ranks(train_replicas, method)
    assert_near(first, second, atol=0)
    assert_near(first, Run(method).run(STEPS).weights())


def train_with_looks(rank, method, form, how):
    """Between steps and inside probes the model is evaluated, after which its root keeps the weights gathered."""
    run = Run(method, how, share(rank) if how != "alone" else slice(None))
    outputs = []

    def look():
        with torch.no_grad():
            outputs.append(run.model(make_batch()[0]))

    evaluate = run.evaluate
    run.evaluate = lambda: [evaluate(), look()][0]
    for _ in range(STEPS):
        look()
        run.step(form)
    look()
    reshard(run.model)
    return {**run.weights(), **dict(zip("abcdefghijkl", outputs, strict=False))}


@pytest.mark.parametrize(("method", "form"), [("nso", "loop"), ("momentum-sam", "closure")])
def test_gathered_weights_are_never_of_another_place(ranks, method, form):
    expected = train_with_looks(0, method, form, "alone")
    for found in ranks(train_with_looks, method, form, "root"):
        assert_near(found, expected)


def train_in_columns(rank, method, form, alone):
    """Tensor parallelism of every parameter: each rank has some of the hidden units, and all of the batch."""
    torch.manual_seed(0)
    run = Run(method)
    run.plain = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3, bias=False)
    ).double()
    if not alone:
        mesh = init_device_mesh("cpu", (2,))
        parallelize_module(run.plain, mesh, {"1": ColwiseParallel(), "3": RowwiseParallel()})
    run.model = run.plain
    run.optimizer = build(method, torch.optim.SGD(run.plain.parameters(), lr=0.1))
    return run.run(STEPS, form).weights()


@pytest.mark.parametrize("method", ["nso", "sam", "gsam"])
@pytest.mark.parametrize("form", ["loop", "closure"])
def test_tensor_parallelism(ranks, method, form):
    expected = train_in_columns(0, method, form, True)
    for found in ranks(train_in_columns, method, form, False):
        assert_near(found, expected)


def train_two_roots(rank, how, later):
    """Two roots in one optimizer, of which one joins after the first step, and keeps its weights from then on."""
    torch.manual_seed(0)
    parts = [torch.nn.Linear(6, 6).double(), torch.nn.Linear(6, 6).double()]
    for part in parts:
        wrap(torch.nn.Sequential(part), how)
    optimizer = flatmin.NSO(torch.optim.SGD([p for part in parts for p in part.parameters()], lr=0.1), sigma=0.1)
    x = make_batch()[0].flatten(1)[share(rank) if how != "alone" else slice(None)]
    for step in range(STEPS):
        joined = step > 0 or not later
        if joined:
            with torch.no_grad():
                parts[1](x)
        for _ in optimizer.probes():
            hidden = parts[0](x)
            (parts[1](hidden.tanh()) if joined else hidden).square().mean().backward()
        optimizer.step()
    return {f"{n}.{name}": whole(p) for n, part in enumerate(parts) for name, p in part.named_parameters()}


@pytest.mark.parametrize("later", [False, True])
def test_every_root_is_met(ranks, later):
    expected = train_two_roots(0, "alone", later)
    for found in ranks(train_two_roots, "fsdp", later):
        assert_near(found, expected)


ASCENDING = ("sam", "usam", "asam", "monge-sam", "fisher-sam", "random-sam")


@pytest.mark.parametrize("method", ASCENDING)
def test_all_ranks_look_at_one_place_whatever_sync_ascent(ranks, method):
    first, _ = ranks(train, method, "loop", "sgd", {"sync_ascent": True})
    assert_near(first, ranks(train, method, "loop", "sgd", {"sync_ascent": False})[0], atol=0)


@pytest.mark.parametrize("method", ["nso-split", "rwp"])
def test_half_batches_are_halves_of_each_share(ranks, method):
    first, _ = ranks(train, method, "loop", "sgd", {})
    eighths = torch.arange(32).view(4, 8)  # rank 0 has the first two; its halves are one each
    rows = torch.cat([eighths[0], eighths[2], eighths[1], eighths[3]])
    assert_near(first, Run(method, rows=rows).run(STEPS).weights())


def train_esam_on_replicas(rank):
    return Run("esam", "ddp", share(rank), sync_ascent=True).run(STEPS).weights()


def test_esam_is_that_of_replicas_which_look_together(ranks):
    first, _ = ranks(train, "esam", "loop", "sgd", {})
    assert_near(first, ranks(train_esam_on_replicas)[0])


@pytest.mark.parametrize(
    "options", [{"low_memory": True}, {"restore": "recompute"}, {"scale": "filter"}, {"num_perturbations": 3}]
)
def test_options_of_nso(ranks, options):
    first, _ = ranks(train, "nso", "loop", "sgd", options)
    assert_near(first, Run("nso", **options).run(STEPS).weights())


def refused(rank, method, options):
    with pytest.raises(ValueError, match="sharded") as error:
        Run(method, "fsdp", share(rank), **options).run(1)
    return str(error.value)


def test_rules_that_need_a_place_for_each_rank_say_so(ranks):
    assert "Use DistributedDataParallel" in ranks(refused, "sap", {})[0]


def count(rank, method, form, options):
    run = Run(method, "fsdp", share(rank), **options)
    run.run(2, form)
    run.probes = 0
    with Collectives() as seen:
        run.step(form)
    sizes = {name: sorted(sizes.elements()) for name, sizes in seen.sizes.items()}
    return sizes, run.probes


# name -> numbers that are added up over ranks: norms, inner products, whether all may step
NUMBERS = {"sam": 1, "asam": 2, "nso": 0, "momentum-sam": 1, "gsam": 3}


@pytest.fixture(scope="module")
def plain(ranks):
    """What one gradient costs."""
    return ranks(count, "nso-one-point", "loop", {"guard": False, "sigma": 0.0})[0][0]


@pytest.mark.parametrize("method", NUMBERS)
def test_norms_are_sums_of_numbers_and_nothing_is_gathered_for_them(ranks, plain, method):
    for sizes, probes in ranks(count, method, "loop", {"guard": False}):
        assert sizes["all_reduce"] == [1] * NUMBERS[method]
        assert sizes["reduce_scatter"] == sorted(plain["reduce_scatter"] * probes)
        assert sizes["all_gather"] == sorted(plain["all_gather"] * probes)
    if method == "sam":
        sizes, _ = ranks(count, method, "loop", {})[0]
        assert sizes["all_reduce"] == [1] * (NUMBERS[method] + 2)  # the norm of the direction; whether all may step


def pointers(rank, method):
    """Parameters stay where they are, and are back where they were."""
    run = Run(method, "fsdp", share(rank)).run(1)
    parts = [p.to_local() for p in run.optimizer.params]
    before = [(t.data_ptr(), t.clone()) for t in parts]
    for number, _ in enumerate(run.optimizer.probes()):
        run.evaluate()
        if number == 1:
            break
    after = [p.to_local() for p in run.optimizer.params]
    return all(a.data_ptr() == at and torch.equal(a, b) for a, (at, b) in zip(after, before, strict=True))


@pytest.mark.parametrize("method", ["sam", "nso"])
def test_shards_are_restored_in_place_bit_for_bit(ranks, method):
    assert ranks(pointers, method) == [True, True]


def poisoned(rank, method, gradients):
    run = Run(method, "fsdp", share(rank))
    before = run.weights()

    def closure():
        loss = run.closure()
        if rank == 1 and gradients:
            for p in run.optimizer.params:
                p.grad.mul_(math.nan)
        return loss * (math.nan if rank == 1 else 1.0)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        run.optimizer.step(closure)
    assert_near(run.weights(), before, atol=0)
    return run.optimizer.num_skipped, [str(w.message) for w in caught]


@pytest.mark.parametrize("gradients", [False, True])
def test_shards_skip_together(ranks, gradients):
    for skipped, texts in ranks(poisoned, "sam", gradients):
        assert skipped == 1
        assert any("not finite" in text for text in texts)


def vectors(rank):
    """Vector's arithmetic on shards against that on whole tensors."""
    mesh = init_device_mesh("cpu", (2,))
    whole = [torch.randn(5, 3), torch.randn(7), torch.randn(()), torch.randn(2, 2)]
    other = [torch.randn(5, 3), torch.randn(7), torch.randn(()), torch.randn(2, 2)]

    def shards(tensors):  # the last one is an ordinary tensor, the same on both ranks
        placed = [distribute_tensor(t.clone(), mesh, [Shard(0) if t.ndim else Replicate()]) for t in tensors[:-1]]
        return Vector([*placed, tensors[-1].clone()])

    def gathered(vector):
        return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in vector.present]

    a, b, x, y = Vector(whole), Vector(other), shards(whole), shards(other)
    radii = Radii([0.1, 0.2, 0.3, 0.4])
    same = torch.testing.assert_close
    same(x.norm(), a.norm())
    same(x.size(), a.size())
    same(x.dot(y), a.dot(b))
    same(gathered(x + y), (a + b).present)
    same(gathered(x.reject(y)), a.reject(b).present)
    same(gathered(radii.along(x)), radii.along(a).present)
    same(gathered(x * torch.tensor(3.0)), (a * 3.0).present)
    there, here = shards(other), [t.clone() for t in other]
    radii.ascent(x).add_to(there.present)
    radii.ascent(a).add_to(here)
    same(gathered(there), here)
    x = x.add_(y, 2.0)
    x.scale_(0.5)
    same(gathered(x), (a * 0.5 + b).present)
    assert x.isfinite()
    if rank == 1:
        local(x.tensors[1])[0] = math.inf
    return x.isfinite()


def test_vectors_of_shards(ranks):
    assert ranks(vectors) == [False, False]


def partial(rank):
    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(ValueError, match="partial sum"):
        Vector([DTensor.from_local(torch.ones(3), mesh, [Partial()])]).norm()


def test_a_partial_sum_has_no_norm_yet(ranks):
    ranks(partial)


def train_with_fsdp1(rank, named):
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.manual_seed(0)
    model = FullyShardedDataParallel(torch.nn.Linear(4, 3), device_id=torch.device("cpu"))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model if named else None)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match=r"Use torch\.distributed\.fsdp\.fully_shard"):
        optimizer.step(closure)
    return all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("named", [False, True])
def test_fsdp1_is_refused(ranks, named):
    assert ranks(train_with_fsdp1, named) == [True, True]
