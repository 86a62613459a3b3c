"""Measuring over ranks: each has some of the batches, uneven numbers of them; equal to one process with all."""

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import flatmin
from benchmarks.collectives import Collectives
from flatmin.noise import Noise
from flatmin.radii import Radii
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
    operator = flatmin.HessianOperator(measured)
    with Collectives() as seen:
        product = operator.product(v)
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


RISES = {
    "noise": lambda measured: flatmin.noise_stability(measured, 0.05, num_draws=6).value,
    "average": lambda measured: flatmin.average_sharpness(measured, 0.05, num_draws=6).value,
    "ascent": lambda measured: flatmin.ascent_sharpness(measured, 0.05).value,
    "density": lambda measured: flatmin.spectral_density(measured, num_probes=2).value,
    "slice": lambda measured: np.sum(flatmin.loss_slice(measured, flatmin.random_direction(measured)).losses),
}


def rise_on_a_rank(rank, name):
    return float(RISES[name](objective(slice(rank, None, 2), distributed.group.WORLD)))


@pytest.mark.parametrize("name", RISES)
def test_whatever_is_measured(ranks, name):
    expected = float(RISES[name](objective(slice(None))))
    assert ranks(rise_on_a_rank, name) == [pytest.approx(expected, rel=1e-6)] * 2


def on_the_first_rank_alone(rank):
    with pytest.raises(ValueError, match="each needs at least one"):
        objective(slice(5 * rank, 5), distributed.group.WORLD)


def test_a_rank_without_batches_leaves_none_waiting(ranks):
    ranks(on_the_first_rank_alone)


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


def rises(measured):
    """What displaces the weights, and what is built on products: by name."""
    direction = flatmin.random_direction(measured)
    noise = flatmin.noise_stability(measured, 0.05, num_draws=10, max_seconds=60, per_layer=True)
    ascent = flatmin.ascent_sharpness(measured, 0.2, "monge", num_steps=4)
    density = flatmin.spectral_density(measured, num_probes=2, num_steps=4)
    flat_estimate = flatmin.flat_minimum_estimate(measured, num_probes=4, num_eigenvectors=1)
    blocks = flatmin.block_eigenvalues(measured, tol=1e-6)
    return {
        "noise": torch.tensor(
            [noise.value, noise.stderr, noise.clean_loss, *(p.value for p in noise.per_layer.values())]
        ),
        "average": torch.tensor(flatmin.average_sharpness(measured, 0.3, num_draws=4).samples),
        "ascent": torch.tensor([ascent.value, ascent.one_step, *ascent.starts]),
        "slice": torch.tensor(flatmin.loss_slice(measured, direction, num_points=3).losses),
        "density": torch.tensor(density.quadrature()[0]),
        "flat": torch.tensor([flat_estimate.trace_gradient.value, flat_estimate.tangential_gradient.value]),
        "blocks": torch.tensor([result.value for result in blocks.values()]),
        "published": torch.tensor(flatmin.layerwise_rayleigh_sum(measured).value),
    }


def rises_on_a_rank(rank):
    return rises(objective(slice(rank, None, 2), distributed.group.WORLD))


@pytest.mark.slow
def test_ranks_find_the_rises_that_one_process_finds(ranks):
    expected = rises(objective(slice(None)))
    for found in ranks(rises_on_a_rank):
        for name in expected:
            torch.testing.assert_close(
                found[name], expected[name], atol=1e-9, rtol=1e-7, msg=lambda m, n=name: f"{n} {m}"
            )


def tracked_by_clocks_that_differ(rank):
    measured = objective(slice(rank, None, 2), distributed.group.WORLD)
    ticks = iter(range(10**6))
    clock = (lambda: float(next(ticks))) if rank else (lambda: 0.0)
    tracker = flatmin.Tracker(measured, max_overhead=0.01, num_probes=2, num_steps=1, clock=clock)
    for _ in range(4):
        tracker.update()
    return len(tracker.points)


def test_ranks_track_together_whatever_their_clocks_say(ranks):
    assert ranks(tracked_by_clocks_that_differ) == [4, 4]


def report_of(batches, group=None):
    measured = objective(batches, group)
    options = {"method": "hutchinson", "rtol": 0.3, "sigma": 0.01, "group": group}
    return flatmin.measure(measured.model, measured.criterion, measured.data, **options)


def report_on_a_rank(rank):
    report = report_of(slice(rank, None, 2), distributed.group.WORLD)
    return numbers(report)


def numbers(report):
    found = (report.loss, report.trace, report.top_eigenvalue, report.noise_stability)
    return [number.value for number in found]


def test_a_report_over_ranks_is_that_of_one_process(ranks):
    report = report_of(slice(None))
    assert report.trace.method.startswith("Hutchinson")
    one = numbers(report)
    for found in ranks(report_on_a_rank):
        assert found == pytest.approx(one, rel=1e-6)


def in_single_precision(rank):
    model = nn.Linear(2, 1)
    data = [(torch.ones(3, 2), torch.ones(3, 1))] * (1 + rank)
    measured = flatmin.Objective(model, nn.MSELoss(), data, group=distributed.group.WORLD)
    measured.mean(torch.ones(2), 2**24 + 1 + rank)
    return measured.num_samples


def test_large_counts_are_exact(ranks):
    assert ranks(in_single_precision) == [2**25 + 3] * 2


def as_a_function(rank):
    with pytest.raises(ValueError, match="one process"):
        flatmin.model_function(objective(slice(rank, None, 2), distributed.group.WORLD))


def test_a_function_of_the_weights_is_of_one_process(ranks):
    ranks(as_a_function)
