"""The main job end to end, small: what it writes, what it does not do twice, what it refuses."""

import dataclasses
import json
import re
import shutil
import xml.etree.ElementTree as ET

import pytest

import flatmin.lab.pool as pool
import flatmin.lab.tasks as tasks_module
from flatmin.lab.compare import Compare, Report
from flatmin.lab.display import format_difference
from flatmin.lab.records import read_run
from flatmin.lab.summary import COLUMNS
from flatmin.lab.tasks import Settings, get_task


def compare(tmp_path, **options):
    options = {"num_seeds": 3, "num_gradients": 40, "methods": ("base", "nso"), "jobs": 1, **options}
    return Compare(name="small", out=tmp_path / "runs", **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished")
    compare(path).run()
    return path


def test_what_is_written(finished):
    folder = finished / "runs" / "small"
    assert sorted(p.name for p in folder.iterdir()) == ["comparison.json", "records", "report.html", "summary.json"]
    names = [f"{method}-seed{seed}" for method in ("base", "nso") for seed in range(3)]
    expected = {f"{name}.{suffix}" for name in names for suffix in ("jsonl", "safetensors")}
    assert {p.name for p in (folder / "records").iterdir()} == expected


def test_equal_gradients_is_the_default_and_equal_steps_an_option(finished, tmp_path):
    for name, steps in (("base", 40), ("nso", 20)):
        result = read_run(finished / "runs" / "small" / "records" / f"{name}-seed0.jsonl").result
        assert (result["steps"], result["gradients"]) == (steps, 40)
    assert {s.num_steps for s in compare(tmp_path, budget="steps").specs()} == {40}


def test_the_summary_is_computed_from_the_records(finished):
    folder = finished / "runs" / "small"
    summary = json.loads((folder / "summary.json").read_text())
    values = [100 * read_run(folder / "records" / f"nso-seed{s}.jsonl").result["test_accuracy"] for s in range(3)]
    assert summary["methods"]["nso"]["columns"]["test_accuracy"]["values"] == values
    assert summary["amount"] == 40


def test_the_report_is_self_contained_and_whole(finished):
    html = (finished / "runs" / "small" / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#)[^"]+"', html)
    assert "<script" not in html
    assert html.count("<svg") == 3
    assert not re.findall(r"\bnan\b|None|undefined", re.sub(r"<svg.*?</svg>", "", html, flags=re.S))
    for text in (
        "test accuracy, %",
        "generalisation gap",
        "Hessian trace",
        "lambda_max",
        "adaptive sharpness",
        "gradients",
    ):
        assert text in html
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.S):
        ET.fromstring(svg)


def test_the_report_shows_the_intervals_of_the_differences(finished):
    folder = finished / "runs" / "small"
    summary = json.loads((folder / "summary.json").read_text())
    section = (folder / "report.html").read_text().split("<h2>Differences to base</h2>")[1].split("<h2>")[0]
    cell = r"<td>(.*?)\s*(?:<span.*?</span>)?<small>(±.*?)</small><small>p = (.*?)</small></td>"
    rows = re.findall(r"<tr><td>(.*?)</td>\s*" + cell, section)
    assert [title for title, *_ in rows] == [column.title for column in COLUMNS if column.better]
    for column, (_, text, interval, p) in zip([c for c in COLUMNS if c.better], rows, strict=True):
        versus = summary["versus"][column.key]["nso"]
        assert f"{text} {interval}" == format_difference(versus)
        assert float(p) == pytest.approx(versus["p"], rel=0.06)


def test_the_report_says_what_each_method_used(tmp_path, monkeypatch):
    task = get_task("digits")
    usual = Settings(lr=0.1, weight_decay=0.001)
    changed = {"base": usual, "bsam": Settings(lr=0.1), "sam": usual, "nso": dataclasses.replace(usual, radius=0.02)}
    monkeypatch.setitem(tasks_module._TASKS, "digits", dataclasses.replace(task, settings=changed))
    report = compare(tmp_path, methods=("base", "sam", "bsam", "nso+swa"), num_seeds=1).run()
    path = tmp_path / "runs" / "small" / "records" / "bsam-seed0.jsonl"
    header, *rest = path.read_text().splitlines()
    old = json.loads(header)
    old["spec"]["settings"]["weight_decay"] = 0.02  # as it was recorded, and not used
    path.write_text("\n".join([json.dumps(old), *rest]) + "\n")
    assert Report(name="small", out=tmp_path / "runs").run() == report
    rows = re.findall(r"<tr><td>(.*?)</td></tr>", report.read_text().split("<h2>Settings</h2>")[1])
    assert [row.split("</td><td>") for row in rows] == [
        ["base", "SGD, momentum 0.9", "0.1", "0.001", "-"],
        ["sam", "SGD, momentum 0.9", "0.1", "0.001", "rho by default"],
        ["bsam", "SGD", "0.1", "-", "rho by default"],
        ["nso+swa", "SGD, momentum 0.9", "0.1", "0.001", "sigma 0.02"],
    ]
    assert "nso+swa: swa 0.75. Parts were not tuned." in " ".join(report.read_text().split())


def test_a_finished_comparison_is_not_run_again(finished, monkeypatch, capsys):
    monkeypatch.setattr(pool, "train", lambda *_: pytest.fail("trained again"))
    before = (finished / "runs" / "small" / "report.html").read_text()
    compare(finished).run()
    assert "report:" in capsys.readouterr().out
    assert (finished / "runs" / "small" / "report.html").read_text() == before


@pytest.mark.parametrize(("runs", "lost"), [("nso-seed1", 1), ("*", 5)])
def test_the_report_draws_runs_of_another_version_with_other_progress(finished, tmp_path, runs, lost):
    shutil.copytree(finished / "runs" / "small", tmp_path / "runs" / "small")
    for record in (tmp_path / "runs" / "small" / "records").glob(f"{runs}.jsonl"):
        lines = record.read_text().splitlines(keepends=True)
        assert all('"progress"' in line for line in lines[1:6])
        record.write_text("".join(lines[:1] + lines[1 + lost :]))
    assert "<svg" in Report(name="small", out=tmp_path / "runs").run().read_text()


def test_the_report_can_be_written_again(finished):
    report = finished / "runs" / "small" / "report.html"
    before = report.read_text()
    report.unlink()
    assert Report(name="small", out=finished / "runs").run() == report
    assert report.read_text() == before


def test_an_interrupted_comparison_continues_where_it_stopped(tmp_path, monkeypatch):
    train, trained = pool.train, []

    def interrupting(spec, folder, report):
        trained.append(spec.name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        train(spec, folder, report)

    monkeypatch.setattr(pool, "train", interrupting)
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path).run()
    first = list(trained)
    compare(tmp_path).run()
    assert trained[3:] == [first[2], *[n for n in trained[3:] if n not in first]]
    assert len(set(trained)) == 6
    assert len(trained) == 7


def test_more_seeds_are_added_to_what_is_there(tmp_path, monkeypatch):
    compare(tmp_path, num_seeds=1).run()
    train, trained = pool.train, []
    monkeypatch.setattr(pool, "train", lambda spec, *rest: (trained.append(spec.name), train(spec, *rest)))
    compare(tmp_path, num_seeds=2).run()
    assert trained == ["base-seed1", "nso-seed1"]


def test_processes_give_the_same_numbers_as_one(tmp_path, finished):
    compare(tmp_path, num_seeds=1, jobs=2).run()
    for name in ("base-seed0", "nso-seed0"):
        a, b = (read_run(p / "runs" / "small" / "records" / f"{name}.jsonl").result for p in (tmp_path, finished))
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_a_record_of_another_run_is_refused(finished, tmp_path):
    with pytest.raises(ValueError, match=r"is a comparison with another amount \(40, not 30\)"):
        compare(finished, num_gradients=30).run()


def test_a_run_with_other_settings_is_refused(finished, monkeypatch):
    task = get_task("digits")
    changed = {**task.settings, "nso": dataclasses.replace(task.settings["nso"], lr=0.3)}
    monkeypatch.setitem(tasks_module._TASKS, "digits", dataclasses.replace(task, settings=changed))
    with pytest.raises(ValueError, match=r"nso-seed0.jsonl is a run with other settings"):
        compare(finished).run()


def test_methods_are_added_to_what_is_there(tmp_path, monkeypatch, capsys):
    compare(tmp_path, methods=("base",), num_seeds=3).run()
    train, trained = pool.train, []
    monkeypatch.setattr(pool, "train", lambda spec, *rest: (trained.append(spec.name), train(spec, *rest)))
    compare(tmp_path, methods=("sam",), num_seeds=2).run()
    assert trained == ["sam-seed0", "sam-seed1", "sam-seed2"]
    assert "together with what is in" in capsys.readouterr().out
    summary = json.loads((tmp_path / "runs" / "small" / "summary.json").read_text())
    assert list(summary["methods"]) == ["base", "sam"]
    assert summary["num_seeds"] == 3


def test_other_seeds_are_other_runs_in_a_folder_of_their_own(tmp_path, finished):
    compare(tmp_path, num_seeds=2, first_seed=1).run()
    folder = tmp_path / "runs" / "small"
    assert {path.stem for path in (folder / "records").glob("*.jsonl")} == {
        f"{method}-seed{seed}" for method in ("base", "nso") for seed in (1, 2)
    }
    of_all = finished / "runs" / "small" / "records" / "nso-seed2.jsonl"
    here = read_run(folder / "records" / "nso-seed2.jsonl")
    assert here.result["test_loss"] == read_run(of_all).result["test_loss"]
    assert json.loads((folder / "summary.json").read_text())["first_seed"] == 1
    assert "2 seeds, from 1 on." in (folder / "report.html").read_text()
    with pytest.raises(ValueError, match=r"is a comparison with another first seed \(1, not 0\)"):
        compare(tmp_path, num_seeds=3).run()
    Report(name="small", out=tmp_path / "runs").run()


@pytest.mark.parametrize(("first_seed", "num_seeds"), [(-1, 3), (998, 3), (1000, 1)])
def test_seeds_of_tuning_are_not_among_those_of_a_comparison(tmp_path, first_seed, num_seeds):
    with pytest.raises(ValueError, match=f"--first-seed {first_seed} with {num_seeds} seeds.* are of tuning"):
        compare(tmp_path, num_seeds=num_seeds, first_seed=first_seed)


def test_a_report_of_an_unfinished_comparison_says_what_is_missing(tmp_path):
    compare(tmp_path).run()
    (tmp_path / "runs" / "small" / "records" / "nso-seed1.jsonl").unlink()
    with pytest.raises(ValueError, match=r"1 of 6 runs of .* are not finished. Continue it with flatmin compare"):
        Report(name="small", out=tmp_path / "runs").run()
    with pytest.raises(ValueError, match=r"there is no comparison 'nope' in .*There is: small"):
        Report(name="nope", out=tmp_path / "runs").run()


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_with_few_seeds_nothing_is_tested(tmp_path, num_seeds):
    html = compare(tmp_path, num_seeds=num_seeds).run().read_text()
    assert "not tested: too few seeds" in html
    assert "Nothing is tested: that takes at least three seeds." in html
    assert "significantly" not in html


@pytest.mark.parametrize(
    ("path", "key"), [("spec", 0), ("flatness", -1)], ids=["a header without its spec", "a result without its flatness"]
)
def test_a_record_that_lacks_something_is_refused(tmp_path, path, key):
    compare(tmp_path, num_seeds=1).run()
    file = tmp_path / "runs" / "small" / "records" / "nso-seed0.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    del lines[key][path]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(ValueError, match=rf"it is damaged: it has no {path}"):
        compare(tmp_path, num_seeds=1).run()


def test_a_folder_in_place_of_a_record_is_refused(tmp_path):
    compare(tmp_path, num_seeds=1).run()
    file = tmp_path / "runs" / "small" / "records" / "nso-seed0.jsonl"
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match=r"Is a directory. It is left as it is"):
        compare(tmp_path, num_seeds=1).run()


def test_a_damaged_record_is_refused_and_left_alone(tmp_path):
    compare(tmp_path, num_seeds=1).run()
    path = tmp_path / "runs" / "small" / "records" / "nso-seed0.jsonl"
    damaged = path.read_text()[:-20]
    path.write_text(damaged)
    with pytest.raises(ValueError, match=r"nso-seed0.jsonl is not a run that flatmin wrote, or it is damaged"):
        compare(tmp_path, num_seeds=1).run()
    assert path.read_text() == damaged


@pytest.mark.parametrize("content", ["", "{}", '{"format": "other"}'])
def test_a_folder_that_is_not_ours_is_refused(tmp_path, content):
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    if content:
        (folder / "comparison.json").write_text(content)
    with pytest.raises(ValueError, match="is not a comparison that flatmin wrote"):
        compare(tmp_path).run()
    assert not (folder / "records").exists()


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "runs").write_text("a file, not a folder")
    with pytest.raises(
        ValueError, match=r"cannot write to .*small/records: Not a directory. Choose another place with --out"
    ):
        compare(tmp_path).run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "digit"}, r"unknown task 'digit'. Did you mean 'digits'\? Known: digits"),
        ({"methods": ("base", "gsma")}, r"unknown method 'gsma'. Did you mean 'gsam'\? Known: base, "),
    ],
)
def test_unknown_names(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        compare(tmp_path, **options).run()
    assert not (tmp_path / "runs").exists()


def test_a_budget_that_does_not_pay_for_a_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a budget of 1 gradients does not pay for one step of nso, which costs 2\."):
        compare(tmp_path, num_gradients=1).run()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "options",
    [{"num_seeds": 0}, {"jobs": 0}, {"num_gradients": 0}, {"methods": ()}],
)
def test_bad_numbers(tmp_path, options):
    with pytest.raises(ValueError, match="at least"):
        compare(tmp_path, **options)


def test_a_comparison_in_which_everything_diverges_still_reports(tmp_path, monkeypatch, capsys):
    task = get_task("digits")
    monkeypatch.setitem(task.settings, "nso", Settings(lr=1e8, radius=0.05))  # type: ignore[arg-type]
    report = compare(tmp_path, num_gradients=400).run()
    assert "Diverged: nso on digits, seed 0: the loss became" in report.read_text()
    assert "diverged: nso on digits" in capsys.readouterr().out


def test_a_comparison_names_runs_that_did_not_train(tmp_path, monkeypatch, capsys):
    task = get_task("digits")
    monkeypatch.setitem(task.settings, "nso", Settings(lr=1e-9, radius=0.05))  # type: ignore[arg-type]
    report = compare(tmp_path, num_gradients=400, methods=("base", "sam", "nso")).run()
    summary = json.loads((report.parent / "summary.json").read_text())["methods"]
    assert [len(summary[name]["untrained"]) for name in ("base", "sam", "nso")] == [0, 0, 3]
    assert summary["nso"]["columns"]["test_loss"]["mean"] > 2  # they count
    assert "Not trained: nso, seed 0 (training loss from 2.3" in report.read_text()
    shown = " ".join(capsys.readouterr().out.split())
    assert "not trained: nso, seed 0 (training loss" in shown
    assert "They count like the others, and may decide what is told apart." in shown
