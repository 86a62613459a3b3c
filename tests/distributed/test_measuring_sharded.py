"""Measuring a model that FSDP2 shards: equal to one process that measures all of it, and to its dense Hessian."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import flatmin
from benchmarks.collectives import Collectives
from flatmin.curvature.products.operators import ResidualOperator
from flatmin.distributed import fsdp_modules, reshard
from flatmin.noise import Noise
from flatmin.radii import Radii
from flatmin.shards import local
from tests.distributed.setups import make_batch, make_smooth_model, whole, wrap

SIZES = [9, 14, 9]  # dealt in turn: two batches for the first rank, one for the second


def batches():
    x, y = (t.split(SIZES) for t in make_batch())
    return list(zip(x, y, strict=True))


def joined():
    """What both ranks evaluate together: the batches of one process."""
    both = [batches()[i : i + 2] for i in range(0, len(SIZES), 2)]
    return [tuple(torch.cat(parts) for parts in zip(*pair, strict=True)) for pair in both]


def one_process(**options):
    return flatmin.Objective(make_smooth_model(), nn.CrossEntropyLoss(), joined(), **options)


def on_rank(rank, how="root", **options):
    model = wrap(make_smooth_model(), how)
    return flatmin.Objective(model, nn.CrossEntropyLoss(), batches()[rank::2], **options)


def flat(vector):
    return torch.cat([whole(t).flatten() for t in vector.present])


def direction(objective):
    return Noise(objective.params, Radii([1.0] * len(objective.params)), "normal", 3).vector()


def measure(objective):
    operator = flatmin.HessianOperator(objective, "difference")
    top = flatmin.top_eigenvalues(operator, tol=1e-6, vectors=True)
    trace = flatmin.trace(objective, max_products=4, products="difference", method="hutchinson")
    return {
        **products(objective),
        "loss": torch.tensor([objective.loss(), objective.check()]),
        "zero": flat(operator.product(objective.zeros())),
        "eigenvalue": torch.tensor(top.value, dtype=torch.float64),
        "eigenvector": flat(top.vectors[0]).abs(),
        "trace": torch.tensor([trace.value, trace.stderr, *(e.value for e in trace.per_layer.values())]),
        "samples": torch.tensor([objective.num_samples, trace.num_samples, objective.num_params]),
    }


def products(objective):
    product = flatmin.HessianOperator(objective, "difference").product(direction(objective))
    return {"gradient": flat(objective.gradient()), "product": flat(product)}


def measure_on_rank(rank):
    return measure(on_rank(rank))


def products_on_rank(rank, how):
    return products(on_rank(rank, how))


def dense_hessian():
    """By reverse over reverse, of all 57 parameters in float64."""
    model = make_smooth_model()
    params = list(model.parameters())
    x, y = make_batch()
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), params, create_graph=True)
    flat_grad = torch.cat([g.flatten() for g in grads])
    rows = [torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True) for g in flat_grad]
    return torch.stack([torch.cat([t.flatten() for t in row]) for row in rows])


def assert_same(found, expected, dense):
    for name in expected:
        atol = 1e-5 if name == "eigenvector" else 1e-8  # from another start
        torch.testing.assert_close(found[name], expected[name], atol=atol, rtol=1e-7, msg=lambda m, n=name: f"{n} {m}")
    # Central differences in float64 are good to about eps^(2/3), 4e-11 of a product.
    product = dense @ flat(direction(one_process()))
    assert (found["product"] - product).norm() < 1e-8 * product.norm()


def test_ranks_measure_what_one_process_measures(ranks):
    expected, dense = measure(one_process()), dense_hessian()
    for found in ranks(measure_on_rank):
        assert_same(found, expected, dense)
        torch.testing.assert_close(found["eigenvalue"], torch.linalg.eigvalsh(dense)[-1], atol=0, rtol=1e-7)


@pytest.mark.parametrize("how", ["fsdp", "hsdp"])
def test_however_it_is_sharded(ranks, how):
    expected, dense = products(one_process()), dense_hessian()
    for found in ranks(products_on_rank, how):
        assert_same(found, expected, dense)


def tracked(objective):
    """From a random start, then from the vector found: near enough to the largest eigenvalue for both to agree."""
    tracker = flatmin.Tracker(objective, max_overhead=1, num_probes=2, num_steps=8)
    for _ in range(2):
        tracker.update()
    return tracker.points[-1].lambda_max.value


MEASURES = {
    "noise": lambda m: flatmin.noise_stability(m, 0.05, num_draws=2, scale="filter").value,
    "average": lambda m: flatmin.average_sharpness(m, 0.3, "adaptive", num_draws=2).value,
    "ascent": lambda m: flatmin.ascent_sharpness(m, 0.2, "filter", num_steps=1, num_starts=2).value,
    "monge": lambda m: flatmin.ascent_sharpness(m, 0.2, "monge", num_steps=1, num_starts=1).value,
    "slice": lambda m: np.sum(flatmin.loss_slice(m, flatmin.random_direction(m), num_points=3).losses),
    "checkpoint": lambda m: np.sum(flatmin.loss_slice(m, flatmin.direction_to(m, elsewhere()), num_points=2).losses),
    "losses": lambda m: flatmin.trace(m, products="loss", method="hutchinson", max_products=2).value,
    "published": lambda m: flatmin.layerwise_rayleigh_sum(flatmin.HessianOperator(m, "difference"), tol=0.1).value,
    "part": lambda m: flatmin.top_eigenvalues(m.only(["1.weight"]), tol=1e-6).value,
    "tracked": tracked,
}


def elsewhere():
    return {name: 1.5 * value for name, value in make_smooth_model().state_dict().items()}


def numbers(objective):
    return {name: float(measured(objective)) for name, measured in MEASURES.items()}


def numbers_on_rank(rank):
    return numbers(on_rank(rank))


def test_whatever_is_measured(ranks):
    expected = numbers(one_process())
    for found in ranks(numbers_on_rank):
        assert found == pytest.approx(expected, rel=1e-6)


def report_on_rank(rank, folder):
    objective, store = on_rank(rank), folder / f"{rank}.json"  # as on machines without a common file system
    report, again = (
        flatmin.measure(objective.model, objective.criterion, objective.data, rtol=0.5, tol=0.01, store=store)
        for _ in range(2)
    )
    density = flatmin.spectral_density(objective, num_probes=3, num_steps=3)
    return report.to_dict(), again.to_dict(), density.value, density.stderr


def test_a_report(ranks, tmp_path):
    found, same = ranks(report_on_rank, tmp_path)
    assert found == same
    first, again, mean, error = found
    assert first == again
    assert [path.name for path in tmp_path.iterdir()] == ["0.json"]
    dense = dense_hessian()
    assert abs(first["trace"]["value"] - float(dense.trace())) < 4 * first["trace"]["stderr"]
    assert abs(mean - float(dense.trace()) / len(dense)) < 4 * error
    assert first["top_eigenvalue"]["value"] == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-2)
    for part in ("trace", "top_eigenvalue"):
        assert "differences of gradients (sharded parameters, FSDP2)" in first[part]["method"]


def untouched(rank):
    model = wrap(make_smooth_model(), "root")
    data = batches()[rank::2]
    x, y = data[0]
    F.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        model(x)  # leaves the weights of the root gathered
    reshard(model)
    params = list(model.parameters())
    kept = [(p, local(p).data_ptr(), whole(p), p.grad, whole(p.grad)) for p in params]
    state = torch.get_rng_state()
    with torch.no_grad():
        model(x)
    objective = flatmin.Objective(model, nn.CrossEntropyLoss(), data)
    flatmin.trace(objective, max_products=2)
    flatmin.top_eigenvalues(objective, tol=0.1)
    flatmin.noise_stability(objective, 0.1, num_draws=2)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    for now, (p, place, value, grad, slope) in zip(model.parameters(), kept, strict=True):
        assert now is p
        assert now.grad is grad
        assert local(now).data_ptr() == place
        torch.testing.assert_close(whole(now), value, atol=0, rtol=0)
        torch.testing.assert_close(whole(grad), slope, atol=0, rtol=0)


def test_nothing_is_changed(ranks):
    ranks(untouched)


def counted(rank):
    objective = on_rank(rank)
    operator, v = flatmin.HessianOperator(objective), direction(objective)
    model, (x, y) = objective.model, batches()[0]
    objective.gradient()  # a backward pass after losses alone gathers more, ahead of time
    with Collectives() as once:
        F.cross_entropy(model(x), y).backward()
    with Collectives() as seen:
        operator.product(v)
    return [{name: dict(found.sizes[name]) for name in found.sizes} for found in (once, seen)]


def test_what_a_product_sends(ranks):
    rounds = 2
    for once, seen in ranks(counted):
        for name in ("all_gather", "reduce_scatter"):
            assert seen[name] == {size: 2 * rounds * count for size, count in once[name].items()}
        # Who has a batch, rounds + 1 times; the norm of v in each round; the loss and its samples at every evaluation;
        # at the end its norm, whether it is finite.
        assert seen["all_reduce"] == {1: 2 * rounds + 2, 2: 2 * rounds}


def by_sums(rank):
    """FSDP2 told to add gradients up, not to average them."""
    objective = on_rank(rank)
    for module in fsdp_modules(objective.model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return flat(objective.gradient())


def test_whatever_gradients_are_divided_by(ranks):
    expected = flat(one_process().gradient())
    for found in ranks(by_sums):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)


def refusals(rank):
    texts = []

    def refused(what):
        with pytest.raises(ValueError, match=r"\.$") as error:
            what()
        texts.append(str(error.value))

    objective = on_rank(rank)
    refused(lambda: flatmin.HessianOperator(objective, "autograd"))
    refused(lambda: flatmin.GaussNewtonOperator(objective))
    refused(lambda: ResidualOperator(objective).product(objective.zeros()))
    refused(lambda: flatmin.flat_minimum_estimate(objective, num_eigenvectors=0))
    refused(lambda: flatmin.model_function(objective))
    for also_fsdp in (False, True):
        refused(lambda also=also_fsdp: flatmin.Objective(by_tensors(also), nn.CrossEntropyLoss(), batches()))
    gathered = len(texts)
    refused(lambda: flatmin.trace(objective, method="gauss-newton"))
    refused(lambda: on_rank(rank, group=alone[rank]))
    refused(lambda: flatmin.Objective(objective.model, nn.CrossEntropyLoss(), Late(rank)).loss())
    refused(lambda: flatmin.Objective(objective.model, poisoned(rank), batches()).loss())
    fsdp_modules(objective.model)[0].set_requires_gradient_sync(False)  # of the root: of all
    refused(objective.gradient)
    partly = make_smooth_model()
    fully_shard(partly.get_submodule("1"))
    refused(lambda: flatmin.Objective(partly, nn.CrossEntropyLoss(), batches()))
    return texts[:gathered], texts[gathered:]


def by_tensors(also_fsdp):
    """Tensor parallelism, by hand."""
    layer, mesh = nn.Linear(6, 4), init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    for name, p in list(layer.named_parameters()):
        layer.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), mesh["tensor"], [Shard(0)])))
    if also_fsdp:
        fully_shard(layer, mesh=mesh["data"])
    return layer


class Late:
    """The first rank has no batch."""

    def __init__(self, rank):
        self.rank = rank

    def __iter__(self):
        return iter(batches()[: self.rank])


def poisoned(rank):
    """A loss that is not finite on the second rank."""
    return lambda outputs, targets: F.cross_entropy(outputs, targets) * (math.nan if rank else 1.0)


alone = {}


def make_groups(rank):
    for member in range(2):
        group = distributed.new_group([member])
        if member == rank:
            alone[rank] = group


def test_what_cannot_be_measured_says_what_can(ranks):
    ranks(make_groups)
    for gathered, others in ranks(refusals):
        assert all("Gather the model" in text for text in gathered)
        expected = [
            "by Hutchinson's probes",
            "the processes that hold the shards, which are [0, 1]",
            "each needs at least one",
            "the loss is nan on a batch of 18",
            "set_requires_gradient_sync(True)",
            "'3.weight' is not sharded",
        ]
        for text, part in zip(others, expected, strict=True):
            assert part in text
