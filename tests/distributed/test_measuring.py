"""Measuring over ranks: each has some of the batches, uneven numbers of them; equal to one process with all."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import flatmin
from benchmarks.collectives import Collectives
from flatmin.curvature.products import hessian_product
from flatmin.noise import Noise
from flatmin.vectors import Radii
from tests.distributed.setups import make_batch, make_model, wrap

SIZES = [5, 9, 3, 8, 7]  # dealt in turn: three batches for the first rank, two for the second, of all sizes


def objective(batches, group=None, how="alone"):
    model = wrap(make_model(), "fsdp" if how == "gathered" else how)
    if how == "gathered":
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        model = make_model()
        model.load_state_dict(whole)
    x, y = (t.split(SIZES) for t in make_batch())
    return flatmin.Objective(model, nn.CrossEntropyLoss(), list(zip(x, y, strict=True))[batches], group=group)


def measure(measured):
    v = Noise(measured.params, Radii([1.0] * len(measured.params)), "normal", 3).vector()
    with Collectives() as seen:
        product = hessian_product(measured, v)
    largest = flatmin.top_eigenvalues(measured, tol=1e-8)
    trace = flatmin.trace(measured, max_products=8, max_seconds=60)
    return {
        "loss": torch.tensor([measured.loss(), measured.check()]),
        "gradient": flat(measured.gradient()),
        "product": flat(product),
        "eigenvalue": torch.tensor(largest.values),
        "trace": torch.tensor([trace.value, trace.stderr, *(e.value for e in trace.per_layer.values())]),
        "samples": torch.tensor([measured.num_samples, trace.num_samples]),
    }, dict(seen.sizes["all_reduce"])


def flat(vector):
    return torch.cat([t.flatten() for t in vector.present])


def on_a_rank(rank, how):
    return measure(objective(slice(rank, None, 2), distributed.group.WORLD, how))


@pytest.mark.parametrize("how", ["alone", "gathered"])
def test_ranks_measure_what_one_process_measures(ranks, how):
    one = objective(slice(None))
    expected, alone = measure(one)
    assert not alone
    for found, sizes in ranks(on_a_rank, how):
        for name in expected:
            torch.testing.assert_close(
                found[name], expected[name], atol=1e-9, rtol=1e-9, msg=lambda m, n=name: f"{n} {m}"
            )
        assert sizes == {one.num_params + 2: 1}  # one product: one all-reduce, of the product and a count


def in_single_precision(rank):
    model = nn.Linear(2, 1)
    data = [(torch.ones(3, 2), torch.ones(3, 1))] * (1 + rank)
    measured = flatmin.Objective(model, nn.MSELoss(), data, group=distributed.group.WORLD)
    measured.mean(torch.ones(2), 2**24 + 1 + rank)
    return measured.num_samples


def test_large_counts_are_exact(ranks):
    assert ranks(in_single_precision) == [2**25 + 3] * 2


def refused(rank):
    with pytest.raises(ValueError, match="Gather it"):
        objective(slice(None), how="fsdp")


def test_sharded_models_are_refused_with_the_mend(ranks):
    ranks(refused)
