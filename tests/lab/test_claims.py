"""Claims: the rule, what it is computed from, and the committed verdicts."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import flatmin.lab.tasks as tasks_module
from docs.refresh import outcomes_table, verdicts_table
from flatmin.lab.claims import CLAIMS, Claim, judge, verdict
from flatmin.lab.claims.reproduce import needed
from flatmin.lab.cli import main
from flatmin.lab.records import RunRecord
from flatmin.lab.summary import COLUMNS, holm
from flatmin.lab.tasks import get_task
from flatmin.lab.tasks.digits import DIGITS

RECORD = Path(__file__).parents[2] / "docs" / "records" / "claims" / "claims.json"
BETTER = {column.key: column.better for column in COLUMNS}


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        (["better"], "supported"),
        (["worse"], "not supported"),
        ([None], "inconclusive"),
        (["better", "better", None], "supported"),
        (["better", None], "supported"),
        (["better", None, None], "inconclusive"),
        (["better", "better", "worse"], "inconclusive"),
        (["worse", "worse", None], "not supported"),
        (["worse", "worse", "better"], "inconclusive"),
        (["worse", None, None], "inconclusive"),
        (["better", "confounded", None, None], "inconclusive"),
    ],
)
def test_the_rule(marks, expected):
    assert verdict(marks) == expected


def run(seed, *, accuracy=None, loss=1.0, trace=1.0, status="finished"):
    flatness = {"trace": {"value": trace, "stderr": 0.0}, "top_eigenvalue": {"value": 1.0}}
    result = {"status": status, "test_loss": loss, "train_loss": 0.1, "gap": 0.0, "flatness": flatness}
    if accuracy is not None:
        result["test_accuracy"] = accuracy
    return RunRecord({"spec": {"seed": seed}}, [], result)


CLAIM = Claim(name="c", paper="p", statement="s", better="sam", than="base", column="score", tasks=("one", "two"))


def test_it_is_the_paired_test_with_holm_over_tasks():
    random = np.random.default_rng(0)
    a, b = 0.9 + 0.02 * random.standard_normal(8), 0.88 + 0.02 * random.standard_normal(8)
    c, d = 1 + 0.1 * random.standard_normal(8), 1.2 + 0.1 * random.standard_normal(8)
    comparisons = {
        "one": {
            "sam": [run(s, accuracy=v) for s, v in enumerate(a)],
            "base": [run(s, accuracy=v) for s, v in enumerate(b)],
        },
        "two": {"sam": [run(s, loss=v) for s, v in enumerate(c)], "base": [run(s, loss=v) for s, v in enumerate(d)]},
    }
    found = judge(CLAIM, comparisons)["tasks"]
    assert (found["one"]["column"], found["two"]["column"]) == ("test_accuracy", "test_loss")  # by what there is
    p_values = [stats.ttest_rel(a, b).pvalue, stats.ttest_rel(c, d).pvalue]
    expected = [min(1, 2 * min(p_values)), max(p_values)] if p_values[0] < p_values[1] else None
    expected = expected or [max(p_values), min(1, 2 * min(p_values))]
    assert [found[task]["p"] for task in ("one", "two")] == pytest.approx(expected)
    assert found["two"]["difference"] == pytest.approx(np.mean(c - d))
    assert found["one"]["better"] == pytest.approx(100 * a)


def of(claim_runs):
    return judge(dataclasses.replace(CLAIM, column="trace", tasks=("one",)), {"one": claim_runs})


def test_a_run_that_diverged_has_lost():
    """RSP that finishes 4 of 20 seeds is not better, whatever it reaches on these; who diverges on all has lost."""
    random = np.random.default_rng(0)
    base = [run(s, trace=v) for s, v in enumerate(10 + random.standard_normal(20))]
    lucky = [run(s, trace=0.1 * s + 1, status="finished" if s < 4 else "diverged") for s in range(20)]
    judged = of({"sam": lucky, "base": base})
    entry = judged["tasks"]["one"]
    assert (entry["diverged"], entry["seeds"], entry["mark"]) == ([16, 0], [0, 1, 2, 3], "worse")
    assert entry["p"] == pytest.approx(stats.binomtest(4, 20).pvalue)
    assert judged["verdict"] == "not supported"
    gone = [run(s, status="diverged") for s in range(20)]
    assert of({"sam": base, "base": gone})["verdict"] == "supported"
    both = of({"sam": gone, "base": gone})
    assert (both["verdict"], both["tasks"]["one"]["p"]) == ("inconclusive", 1.0)


def test_a_task_that_cannot_be_tested_still_counts_in_the_correction():
    random = np.random.default_rng(1)
    good = {
        "sam": [run(s, trace=v) for s, v in enumerate(random.standard_normal(6))],
        "base": [run(s, trace=v + 0.8) for s, v in enumerate(random.standard_normal(6))],
    }
    few = {name: runs[:2] for name, runs in good.items()}
    claim = dataclasses.replace(CLAIM, column="trace")
    alone = judge(dataclasses.replace(claim, tasks=("one",)), {"one": good})["tasks"]["one"]["p"]
    found = judge(claim, {"one": good, "two": few})["tasks"]
    assert found["one"]["p"] == pytest.approx(min(1, 2 * alone))
    assert (found["two"]["p"], found["two"]["mark"]) == (1.0, None)


def test_methods_and_tasks_of_the_claims_exist_and_have_settings():
    for claim in CLAIMS.values():
        for task in claim.tasks:
            for method in (claim.better, claim.than):
                assert method in get_task(task).settings, f"{claim.name}: {method} on {task}"
        assert claim.column in (*BETTER, "score")


def test_the_control_is_the_same_whatever_is_asked_first():
    assert needed("digits", [CLAIMS["nso-beats-sam"]]) == ("base", "sam", "nso")
    assert needed("digits", [CLAIMS["nso-beats-sam"], CLAIMS["nso-generalises"]]) == ("base", "sam", "nso")
    assert needed("digits-x3", [CLAIMS["msam-stands-3-times"]]) == ("sam", "monge-sam")


def test_the_command(tmp_path, monkeypatch, capsys):
    for name in ("digits", "cancer", "diabetes"):
        monkeypatch.setitem(tasks_module._TASKS, name, dataclasses.replace(get_task(name), num_gradients=40))
    arguments = ["reproduce", "--claims", "nso-trace-below-sam", "nso-generalises", "--num-seeds", "3", "--jobs", "1"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "claims.json").read_text())
    assert list(record["claims"]) == ["nso-trace-below-sam", "nso-generalises"]
    assert record["claims"]["nso-trace-below-sam"]["tasks"]["cancer"]["seeds"] == [0, 1, 2]
    shown = capsys.readouterr().out
    assert "nso-trace-below-sam" in shown
    assert f"nso-generalises: {record['claims']['nso-generalises']['verdict']}" in shown
    assert main(["reproduce", "--claims", "nso-beats-sam", "--num-seeds", "3", "--out", str(tmp_path)]) == 0
    later = json.loads((tmp_path / "claims.json").read_text())["claims"]
    assert list(later) == ["nso-trace-below-sam", "nso-generalises", "nso-beats-sam"]
    assert later["nso-generalises"] == record["claims"]["nso-generalises"]


def test_an_unknown_claim_is_one_line(capsys):
    assert main(["reproduce", "--claims", "nso-trace-below-sams"]) == 2
    assert "unknown claim 'nso-trace-below-sams'. Did you mean 'nso-trace-below-sam'?" in capsys.readouterr().err


def committed():
    return json.loads(RECORD.read_text())


@pytest.mark.parametrize("name", list(CLAIMS))
def test_the_committed_verdicts_follow_from_the_committed_values(name):
    judged = committed()["claims"][name]
    entries = list(judged["tasks"].values())
    assert list(judged["tasks"]) == list(CLAIMS[name].tasks)
    p_values = [stats.ttest_rel(entry["better"], entry["than"]).pvalue for entry in entries]
    for entry, p in zip(entries, holm(p_values), strict=True):
        assert entry["p"] == pytest.approx(p)
        difference = np.mean(np.subtract(entry["better"], entry["than"]))
        assert entry["difference"] == pytest.approx(difference)
        is_better = difference * BETTER[entry["column"]] > 0
        assert entry["mark"] == (None if p >= 0.05 else "better" if is_better else "worse")
    assert judged["verdict"] == verdict([entry["mark"] for entry in entries])


@pytest.mark.parametrize("task", ["digits", "cancer", "diabetes", "bad-start"])
def test_the_settings_are_the_winners_of_the_committed_tuning(task):
    place = RECORD.parents[1] if task == "digits" else RECORD.parent  # those of the demo
    tuning = json.loads((place / task / "tuning.json").read_text())
    for method, trials in tuning["trials"].items():
        trained = [trial for trial in trials if trial["validation_loss"] is not None]
        best, settings = min(trained, key=lambda trial: trial["validation_loss"]), get_task(task).settings[method]
        assert dataclasses.asdict(settings) == {key: best[key] for key in dataclasses.asdict(settings)}


def test_the_page_shows_the_committed_verdicts():
    page = (RECORD.parents[2] / "claims.md").read_text()
    before = json.loads((RECORD.parents[1] / "claims-by-hand" / "claims.json").read_text())["claims"]
    assert verdicts_table(committed()["claims"], before) in page
    assert outcomes_table(committed()["claims"]) in page
    assert committed()["claims"].keys() == CLAIMS.keys()


def test_a_bad_start_fits_its_training_data_and_little_else():
    import torch

    task = get_task("bad-start")
    torch.manual_seed(0)
    model, splits = task.build_model(), task.load(0)
    accuracies = [float((model(x).argmax(1) == y).float().mean()) for x, y in splits]
    assert accuracies[0] == 1.0
    assert max(accuracies[1:]) < 0.6
    mislabelled = DIGITS.load(0).validation[0][:300]
    assert not any((splits.validation[0] == row).all(1).any() for row in mislabelled[:20])
