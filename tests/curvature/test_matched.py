"""Comparisons at equal loss: interpolation by hand, refusals, errors that make the verdict."""

import dataclasses
import math

import pytest
import torch

import flatmin
from flatmin.curvature.results import Estimate
from tests.curvature.nets import criterion, make

NONE = Estimate(value=0.0, stderr=0.0)


def point(loss, trace, stderr=0.0):
    parts = {"lambda_max": NONE, "noise_stability": NONE, "seconds": 0.0, "overhead": 0.0, "num_probes": 1000}
    return flatmin.TrackPoint(step=0, loss=loss, trace=Estimate(value=trace, stderr=stderr), **parts)


def test_it_interpolates_at_the_lowest_common_loss():
    # Both follow trace = c loss^a; the first went on to a lower loss, where its trace is lower.
    first = [point(x, 100 * x**0.7) for x in (1.0, 0.3, 0.03, 0.001)]
    second = [point(x, 50 * x**0.7) for x in (1.1, 0.2, 0.01)]
    found = flatmin.compare_at_matched_loss(first, second)
    assert found.loss == 0.01
    assert found.first.value == pytest.approx(100 * 0.01**0.7)
    assert found.ratio.value == pytest.approx(0.5)
    assert first[-1].trace.value < second[-1].trace.value  # the wrong comparison says the opposite
    assert found.flatter == "second"
    at = flatmin.compare_at_matched_loss(first, second, loss=0.1)
    assert at.first.value == pytest.approx(100 * 0.1**0.7)
    assert "the second is flatter" in str(at)


def test_the_errors_decide():
    clear = flatmin.compare_at_matched_loss([point(0.1, 10, 0.5)], [point(0.1, 14, 0.5)])
    assert clear.flatter == "first"
    assert clear.ratio.value == pytest.approx(1.4)
    assert clear.ratio.stderr == pytest.approx(1.4 * math.hypot(0.05, 0.5 / 14))
    noisy = flatmin.compare_at_matched_loss([point(0.1, 10, 3)], [point(0.1, 14, 3)])
    assert noisy.flatter is None
    assert "no difference is seen" in str(noisy)
    # Half way between two measurements their errors average out.
    pair = [point(0.01, 10, 1.0), point(1.0, 10, 1.0)]
    assert flatmin.compare_at_matched_loss(pair, pair, loss=0.1).first.stderr == pytest.approx(math.sqrt(0.5))


def test_reports_of_measure():
    model, x, y = make("tanh")
    report = flatmin.measure(model, criterion, [(x, y)])
    found = flatmin.compare_at_matched_loss(report, [report])
    assert found.ratio.value == 1
    assert found.p_value == 1
    other = dataclasses.replace(report, loss=dataclasses.replace(report.loss, value=report.loss.value / 2))
    with pytest.raises(ValueError, match=r"the losses do not match.*A trace falls because the loss does"):
        flatmin.compare_at_matched_loss(report, other)


@pytest.mark.parametrize(
    ("first", "second", "options", "message"),
    [
        ([point(0.1, 1), point(0.2, 1)], [point(0.3, 1), point(0.4, 1)], {}, "do not match"),
        ([point(0.1, 1), point(0.2, 1)], [point(0.1, 1), point(0.4, 1)], {"loss": 0.3}, "do not match: the first"),
        ([], [point(0.1, 1)], {}, "no measurements"),
        ([point(0.1, -1)], [point(0.1, 1)], {}, "positive loss and trace"),
        (1, 2, {}, "by a Tracker, its points, or reports of flatmin.measure, got int"),
        ([point(0.1, 1)], ["trace"], {}, "got str"),
    ],
)
def test_refusals(first, second, options, message):
    with pytest.raises(ValueError, match=message):
        flatmin.compare_at_matched_loss(first, second, **options)


def test_few_probes_leave_few_degrees_of_freedom():
    """The same true trace twice, known from three normal samples each: 5% of verdicts, where a normal test has 13%."""
    generator = torch.Generator().manual_seed(0)

    def measured() -> flatmin.TrackPoint:
        samples = 100 + torch.randn(3, generator=generator, dtype=torch.float64)
        parts = {"lambda_max": NONE, "noise_stability": NONE, "seconds": 0.0, "overhead": 0.0, "num_probes": 3}
        trace = Estimate(value=samples.mean().item(), stderr=samples.std().item() / math.sqrt(3))
        return flatmin.TrackPoint(step=0, loss=0.1, trace=trace, **parts)

    verdicts = [flatmin.compare_at_matched_loss(measured(), measured()).flatter is not None for _ in range(2000)]
    assert sum(verdicts) / 2000 == pytest.approx(0.045, abs=4 * math.sqrt(0.05 * 0.95 / 2000))


def test_measurements_at_one_loss_are_averaged():
    several = [point(0.1, trace, 0.1) for trace in (0.8, 1.2, 1.25)]
    found = flatmin.compare_at_matched_loss(several, several)
    assert found.first.value == pytest.approx((0.8 * 1.2 * 1.25) ** (1 / 3))


def test_a_loss_that_was_passed_before_a_spike_counts_after_it():
    spiked = [point(*p) for p in ((1.0, 10.0), (0.05, 5.0), (2.0, 20.0), (0.1, 0.5), (0.05, 0.4))]
    found = flatmin.compare_at_matched_loss(spiked, spiked, loss=0.5)
    share = math.log(0.5 / 2.0) / math.log(0.1 / 2.0)
    assert found.first.value == pytest.approx(20.0 ** (1 - share) * 0.5**share)


def test_only_the_traces_that_are_used_must_be_positive_and_have_an_error():
    curve = [point(1.0, -3.0), point(0.5, 2.0), point(0.1, 1.0), point(0.05, 1.0, math.nan)]
    assert flatmin.compare_at_matched_loss(curve, curve, loss=0.5).first.value == pytest.approx(2.0)
    for loss in (0.07, 0.8):
        with pytest.raises(ValueError, match="need a positive loss and trace with an error"):
            flatmin.compare_at_matched_loss(curve, curve, loss=loss)


def test_the_last_pass_counts_though_an_earlier_point_is_at_that_very_loss():
    curve = [point(*p) for p in ((2.0, 8.0), (1.0, 1.0), (3.0, 9.0), (0.5, 4.0))]
    at, beside = (flatmin.compare_at_matched_loss(curve, curve, loss=x).first.value for x in (1.0, 1.00001))
    assert at == pytest.approx(beside, rel=1e-4)


def test_a_loss_of_zero_beside_is_no_logarithm():
    curve = [point(1.0, 2.0), point(0.0, 1.0)]
    with pytest.raises(ValueError, match="need a positive loss"):
        flatmin.compare_at_matched_loss(curve, curve, loss=0.5)


def test_errors_of_one_probe_and_of_the_size_of_rounding_give_a_p_value():
    tiny = [point(0.1, 1.0, 1e-90)]
    assert flatmin.compare_at_matched_loss(tiny, tiny).p_value == pytest.approx(1.0)
    single = dataclasses.replace(point(0.1, 1.0, 0.1), num_probes=1)
    assert 0 < flatmin.compare_at_matched_loss(single, point(0.1, 2.0, 0.1)).p_value < 1


def test_a_tracker_that_measured_the_beginning_alone_says_so():
    model, x, y = make("tanh")
    tracker = flatmin.Tracker(flatmin.Objective(model, criterion, [(x, y)]), max_overhead=1e-9)
    assert tracker.update() is not None
    assert tracker.update() is None
    end = point(tracker.points[0].loss, 1.0, 0.1)
    with pytest.warns(UserWarning, match=r"single point.*update\(force=True\)"):
        flatmin.compare_at_matched_loss(tracker, end)
    assert tracker.update(7, force=True) is not None
    assert [p.step for p in tracker.points] == [0, 7]
    flatmin.compare_at_matched_loss(tracker, end)
