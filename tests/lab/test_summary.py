"""Intervals and paired tests against scipy and hand-computed values; a mark only where it is earned."""

import re

import numpy as np
import pytest
from scipy import stats

from flatmin.lab.display import differences_table
from flatmin.lab.records import RunRecord
from flatmin.lab.report import _verdict
from flatmin.lab.summary import holm, paired_p_value, summarize


def record(seed, accuracy, status="finished", message=""):
    flatness = {"trace": {"value": 10.0 + seed, "stderr": 0.5}, "top_eigenvalue": {"value": 2.0}}
    result = {
        "type": "result", "status": status, "message": message, "test_accuracy": accuracy, "test_loss": 1 - accuracy,
        "train_loss": 0.1, "gap": 0.9 - accuracy, "flatness": flatness, "seconds": 1.0, "gradients": 10, "steps": 5,
    }  # fmt: skip
    return RunRecord({"spec": {"seed": seed}}, [], result)


def runs(**accuracies):
    return {name: [record(seed, a) for seed, a in enumerate(values)] for name, values in accuracies.items()}


def test_mean_and_interval():
    values = [0.90, 0.92, 0.91, 0.95]
    found = summarize(runs(base=values))["methods"]["base"]["columns"]["test_accuracy"]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert found["mean"] == pytest.approx(92.0)
    assert found["half_width"] == pytest.approx(100 * (high - low) / 2)
    assert found["values"] == pytest.approx([90, 92, 91, 95])


def test_the_paired_test_is_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=8), rng.normal(size=8)
    ours = paired_p_value(dict(enumerate(a)), dict(enumerate(b)))
    assert ours == pytest.approx(stats.ttest_rel(a, b).pvalue)  # type: ignore[attr-defined]
    shuffled = {seed: b[seed] for seed in reversed(range(8))} | {99: 5.0}  # by seed, not by position
    assert paired_p_value(dict(enumerate(a)), shuffled) == pytest.approx(ours)


def test_the_paired_test_at_its_limits():
    assert paired_p_value({0: 1.0, 1: 2.0}, {0: 0.0, 1: 0.0}) is None  # two seeds prove nothing
    assert paired_p_value(dict.fromkeys(range(5), 1.0), dict.fromkeys(range(5), 1.0)) == 1.0
    # The same difference every time has no spread to judge it by: accuracies on few samples often do, by chance.
    assert paired_p_value(dict.fromkeys(range(5), 2.0), dict.fromkeys(range(5), 1.0)) is None
    hundredths = {seed: 0.9 + seed / 100 for seed in range(5)}  # the same difference up to rounding
    assert paired_p_value({seed: a + 0.03 for seed, a in hundredths.items()}, hundredths) is None


def test_holm():
    # Worked by hand: sorted .01 .02 .03 .04 times 4 3 2 1 is .04 .06 .06 .04, made monotone .04 .06 .06 .06.
    assert holm([0.02, 0.01, 0.04, 0.03]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.01, float("nan")]) == pytest.approx([0.02, 1.0])  # what could not be tested is not significant
    assert holm([]) == []


def test_best_is_marked_only_if_it_beats_every_other():
    base = [0.90, 0.91, 0.89, 0.92, 0.90, 0.91]
    better = [a + 0.03 + 0.001 * i for i, a in enumerate(base)]
    tied = [a - 0.001 * (-1) ** i for i, a in enumerate(better)]
    assert summarize(runs(base=base, sam=better))["best"]["test_accuracy"] == "sam"
    assert summarize(runs(base=base, sam=better, nso=tied))["best"]["test_accuracy"] is None
    assert summarize(runs(base=base))["best"]["test_accuracy"] is None
    versus = summarize(runs(base=base, sam=better))["versus"]["test_accuracy"]["sam"]
    assert versus["difference"] == pytest.approx(3.25)
    assert versus["p"] < 1e-5


def test_best_beats_the_control_by_the_test_that_marks_it():
    # sam beats base with p = 0.03: enough for one comparison with base, not for the largest of three.
    base = [0.90, 0.91, 0.89, 0.92, 0.90, 0.91]
    gains = (0.010, 0.030, 0.002, 0.020, 0.040, 0.001)
    sam = [a + d for a, d in zip(base, gains, strict=True)]
    found = summarize(runs(base=base, sam=sam))
    assert 0.02 < found["versus"]["test_accuracy"]["sam"]["p"] < 0.05
    assert found["best"]["test_accuracy"] == "sam"
    # nso and rsp follow sam closely, below it: beaten beyond doubt, and not to be told from base.
    others = {
        name: [a - np.mean(gains) + k * i for i, a in enumerate(sam)] for name, k in (("nso", 1e-4), ("rsp", -1e-4))
    }
    found = summarize(runs(base=base, sam=sam, **others))
    assert found["versus"]["test_accuracy"]["sam"]["mark"] is None
    assert found["best"]["test_accuracy"] is None


def fitted(train_loss, over_loss, gap):
    """Runs with these training losses, traces over the loss and gaps, by seed."""
    found = [record(seed, 0.9) for seed in range(len(train_loss))]
    for r, loss, ratio, g in zip(found, train_loss, over_loss, gap, strict=True):
        r.result.update(train_loss=loss, gap=g)
        r.result["flatness"]["trace"]["value"] = ratio * loss
    return found


@pytest.mark.parametrize(("train_loss", "mark"), [(0.001, "better"), (0.010, "better"), (0.050, "confounded")])
def test_a_worse_fit_is_no_better_gap_and_no_better_trace_over_the_loss(train_loss, mark):
    noise = np.array([1, -1, 2, 0, -2, 1]) * 1e-4
    base = fitted(0.010 + noise, 700 + 1e4 * noise, 0.30 + noise)
    sam = fitted(train_loss - noise, 400 + 2e4 * noise, 0.20 + 2 * noise)
    for first, second, said in (("base", "sam", mark), ("sam", "base", mark.replace("better", "worse"))):
        runs_ = {name: {"base": base, "sam": sam}[name] for name in (first, second)}
        found = summarize(runs_)
        for key in ("gap", "trace_per_loss"):
            assert found["versus"][key][second]["p"] < 1e-4
            assert found["versus"][key][second]["mark"] == said
            assert found["best"][key] == (None if mark == "confounded" else "sam")
    assert summarize({"base": base, "sam": sam})["versus"]["trace"]["sam"]["mark"] in ("better", "worse")


def test_the_verdict_says_that_the_fit_is_worse():
    noise = np.array([1, -1, 2, 0, -2, 1]) * 1e-4
    base = fitted(0.010 + noise, 700 + 1e4 * noise, 0.30 + noise)
    sam = fitted(0.050 - noise, 400 + 2e4 * noise, 0.20 + 2 * noise)
    (sentence,) = _verdict(summarize({"base": base, "sam": sam}))
    assert re.search(r"trace over loss -43% \(p = \S+, but at a higher training loss\)", sentence)
    (sentence,) = _verdict(summarize({"sam": sam, "base": base}))
    assert re.search(r"trace over loss \+75% \(p = \S+, but at a lower training loss\)", sentence)


def test_best_beats_none_that_fits_better():
    # Below base, which fits as well, and below nso, which fits better: against nso it does not count.
    noise = np.array([1, -1, 2, 0, -2, 1]) * 1e-4
    base = fitted(0.010 + noise, 700 + 1e4 * noise, 0.30 + noise)
    sam = fitted(0.010 - noise, 400 + 2e4 * noise, 0.20 + 2 * noise)
    nso = fitted(0.001 + noise, 600 - 1e4 * noise, 0.25 - noise)
    for key in ("gap", "trace_per_loss"):
        assert summarize({"base": base, "sam": sam})["best"][key] == "sam"
        found = summarize({"base": base, "sam": sam, "nso": nso})
        assert found["versus"][key]["sam"]["mark"] == "better"
        assert found["best"][key] is None


def test_a_training_loss_that_is_higher_by_the_same_on_every_seed_is_higher():
    noise = np.array([1, -1, 2, 0]) * 1e-4
    base = fitted([0.25] * 4, 700 + 1e4 * noise, 0.30 + noise)
    sam = fitted([0.50] * 4, 400 + 2e4 * noise, 0.20 + 2 * noise)
    assert summarize({"base": base, "sam": sam})["versus"]["gap"]["sam"]["mark"] == "confounded"


@pytest.mark.parametrize(
    ("train_loss", "mark"),
    [
        ([1e24, 1.0, 1e-2], "confounded"),  # a wild difference has a large p
        ([0.5, 0.011, 0.012], "confounded"),  # 3.9 times, in the geometric mean
        ([0.03, 0.009, 0.009], "better"),  # 1.3 times
        ([-1.0, 0.5, 0.6], "better"),  # no logarithms, and p = 0.97
    ],
)
def test_a_training_loss_that_is_higher_by_half_is_higher_whatever_its_spread(train_loss, mark):
    base = fitted([0.010, 0.011, 0.009], [700.0, 710.0, 690.0], [0.30, 0.31, 0.29])
    nso = fitted(train_loss, [0.0, 0.0, 0.0], [0.10, 0.12, 0.11])
    p = paired_p_value(dict(enumerate(train_loss)), {0: 0.010, 1: 0.011, 2: 0.009})
    assert p is not None
    assert p > 0.05
    for key in ("gap", "trace_per_loss"):
        assert summarize({"base": base, "nso": nso})["versus"][key]["nso"]["mark"] == mark


def test_best_implies_the_mark():
    rng = np.random.default_rng(2)
    num_best = 0
    for _ in range(120):
        values = {name: list(0.9 + shift + 0.01 * rng.normal(size=5)) for name, shift in
                  (("base", 0.0), ("sam", 0.02), ("nso", 0.0), ("rsp", 0.0))}  # fmt: skip
        found = summarize(runs(**values))
        best = found["best"]["test_accuracy"]
        if best not in (None, "base"):
            num_best += 1
            assert found["versus"]["test_accuracy"][best]["mark"] == "better"
    assert num_best > 5


def test_chance_rarely_earns_a_mark():
    rng = np.random.default_rng(1)
    marked = 0
    for _ in range(400):
        same = {name: list(0.9 + 0.01 * rng.normal(size=6)) for name in ("base", "sam", "nso")}
        marked += summarize(runs(**same))["best"]["test_accuracy"] is not None
    assert marked <= 20  # 5% of 400; the test is conservative, since the leader must beat both


def test_diverged_runs_are_counted_and_left_out():
    all_runs = runs(base=[0.9, 0.91, 0.92], sam=[0.9, 0.95, 0.93])
    all_runs["sam"][1] = RunRecord({"spec": {"seed": 1}}, [], {"status": "diverged", "message": "sam: nan at step 3"})
    found = summarize(all_runs)
    assert found["methods"]["sam"]["num_diverged"] == 1
    assert found["methods"]["sam"]["messages"] == ["sam: nan at step 3"]
    assert found["methods"]["sam"]["columns"]["test_accuracy"]["values"] == pytest.approx([90, 93])
    everything = {"base": all_runs["base"], "sam": [all_runs["sam"][1]]}
    assert summarize(everything)["methods"]["sam"]["columns"]["test_accuracy"]["mean"] is None


def diverged(seed):
    return RunRecord({"spec": {"seed": seed}}, [], {"status": "diverged", "message": "no"})


def trained(*losses):
    """Runs whose training losses went from the first to the second of each pair."""
    found = [record(seed, 0.9) for seed in range(len(losses))]
    for one, (first, last) in zip(found, losses, strict=True):
        one.result.update(train_loss=last, **({} if first is None else {"initial_loss": first}))
    return found


@pytest.mark.parametrize(
    ("losses", "seeds"),
    [
        ([(2.31, 2.30), (2.3, 0.01), (2.3, 0.01)], [0]),
        ([(2.31, 0.01), (2.3, 5.0), (2.3, 0.01)], [1]),  # it rose
        ([(0.72, 0.70), (0.71, 0.70), (0.72, 0.69)], []),  # there is not much to learn
        ([(21.0, 20.1), (21.0, 20.99), (21.0, 20.1)], [1]),  # a constant in the loss
        ([(-1.0, -3.0), (-1.0, -1.1), (-1.0, -3.0)], [1]),
        ([(2.3, 2.4), (2.3, 2.3), (2.3, 2.3)], []),  # none trained: nothing to compare with
        ([(None, 2.3), (2.3, 0.1), (2.3, 0.1)], []),  # a run of an older version
    ],
)
def test_runs_that_did_not_train_are_named_and_count(losses, seeds):
    entry = summarize({"base": trained(*losses), "sam": trained((None, 0.1))})["methods"]["base"]
    assert [int(words.split()[1]) for words in entry["untrained"]] == seeds
    assert len(entry["columns"]["test_accuracy"]["values"]) == 3


def test_a_method_that_diverged_is_never_best():
    # On the seeds that nso finished it is better; the hard seeds, which lower base's mean, are those that it lost.
    base = [0.90, 0.91, 0.92, 0.90, 0.60, 0.61]
    all_runs = runs(base=base, nso=[a + 0.01 + 0.001 * i for i, a in enumerate(base[:4])])
    assert summarize(all_runs)["best"]["test_accuracy"] == "nso"
    all_runs["nso"] += [diverged(4), diverged(5)]
    assert summarize(all_runs)["best"]["test_accuracy"] is None


def test_best_is_decided_on_common_seeds():
    # base lost its worst seeds: its mean over the rest is the highest, though sam beats it wherever both finished.
    sam = [0.90, 0.91, 0.92, 0.90, 0.40, 0.41]
    all_runs = runs(base=[a - 0.01 - 0.001 * i for i, a in enumerate(sam[:4])], sam=sam)
    all_runs["base"] += [diverged(4), diverged(5)]
    assert summarize(all_runs)["best"]["test_accuracy"] == "sam"
    # Without the diverged records (seeds that were never run), the same holds.
    all_runs["base"] = all_runs["base"][:4]
    assert summarize(all_runs)["best"]["test_accuracy"] == "sam"


def test_the_table_of_differences_copes_with_what_is_missing():
    three = summarize(runs(base=[0.9, 0.91, 0.92], sam=[0.92, 0.92, 0.95]))
    assert "+2.0 ±2.5" in differences_table(three)
    one = summarize(runs(base=[0.9], sam=[0.92]))
    assert "| sam | +2 | -0.02 |" in differences_table(one)
    diverged = {"base": [record(0, 0.9)], "sam": [record(0, 0.9, status="diverged")]}
    assert "| sam | - |" in differences_table(summarize(diverged))


def test_the_verdict_says_the_trace_over_the_loss_beside_the_trace():
    base, sam = [record(seed, 0.9 + seed / 100) for seed in range(4)], [record(seed, 0.91) for seed in range(4)]
    for one in sam:  # half the trace at half the loss
        one.result["train_loss"] = 0.05
        one.result["flatness"]["trace"]["value"] /= 2
    (sentence,) = _verdict({**summarize({"base": base, "sam": sam}), "num_seeds": 4})
    assert "Hessian trace -50%" in sentence
    assert "trace over loss +0%" in sentence
    base[0].result["train_loss"] = 0.0
    (sentence,) = _verdict({**summarize({"base": base, "sam": sam}), "num_seeds": 4})
    assert "over loss" not in sentence


def test_the_verdict_says_the_loss_beside_the_accuracy():
    found = runs(base=[0.9, 0.91, 0.92], sam=[0.92 - 1e-9, 0.93, 0.88])
    (sentence,) = _verdict({**summarize(found), "num_seeds": 3})
    assert "test accuracy +0.00 points" in sentence  # the mean difference is a little below 0
    assert "test loss +0.0% (" in sentence
