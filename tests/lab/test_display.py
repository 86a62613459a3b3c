"""What the terminal and the report show: mixed versions are said, and brackets are only text."""

import io
import json
import re
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from flatmin.lab.compare import Compare, Report
from flatmin.lab.display import Live, format_cell, print_table
from flatmin.lab.records import RunRecord
from flatmin.lab.summary import COLUMNS, summarize


def test_records_of_different_versions_are_named(tmp_path, capsys):
    Compare(name="small", out=tmp_path / "runs", num_seeds=1, num_gradients=40, methods=("base", "nso"), jobs=1).run()
    assert "different versions" not in capsys.readouterr().out
    file = tmp_path / "runs" / "small" / "records" / "nso-seed0.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["versions"].update(flatmin="0.0.1", torch="2.0.0")
    lines[0]["commit"] = "0" * 40
    file.write_text("\n".join(json.dumps(line) for line in lines))
    report = Report(name="small", out=tmp_path / "runs").run()
    line = rf"made with different versions: flatmin 0\.0\.1, {re.escape(metadata.version('flatmin'))}; torch 2\.0\.0, "
    assert re.search(line, " ".join(report.read_text().split()))
    assert re.search(line, " ".join(capsys.readouterr().out.split()))
    assert "numpy" not in json.loads((tmp_path / "runs" / "small" / "summary.json").read_text())["mixed_versions"]


def test_markup_in_a_name_is_only_text(tmp_path, capsys, monkeypatch):
    # "a[/b]" is a folder a[ with b] in it, which --name does not take; --out does.
    monkeypatch.chdir(tmp_path)
    job = Compare(name="[bold]", out=Path("a[/b]"), num_seeds=1, num_gradients=40, methods=("base",), jobs=1)
    assert job.run().exists()
    assert "a[/b]/[bold]" in capsys.readouterr().out.split("report:")[0]


def wide_summary(names):
    noise = np.random.default_rng(0).normal(size=(len(names), len(COLUMNS), 5)) / 100
    runs = {}
    for i, name in enumerate(names):
        values = {c.key: 0.5 + i / 100 + noise[i, j] for j, c in enumerate(COLUMNS)}
        runs[name] = [RunRecord({"spec": {"seed": s}}, [], result(values, s)) for s in range(5)]
    return {"task": "digits", "num_seeds": 5, "budget": "steps", "amount": 1, **summarize(runs)}


def result(values, seed):
    one = {key: float(value[seed]) for key, value in values.items()}
    flatness = {"trace": {"value": one["trace"], "stderr": 0.012}, "top_eigenvalue": {"value": one["lambda_max"]}}
    return {"status": "finished", "flatness": flatness, **one}


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_table_is_whole_whatever_the_width(width):
    names = ["base", "sam", "nso", "nso-one-point+tail-average", "monge-sam", "looksam+swa", "eigen-sam", "bsam+mixup"]
    summary, out = wide_summary(names), io.StringIO()
    print_table(summary, Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in out.getvalue()
    words = out.getvalue().split()
    for name in names:
        for column in COLUMNS:
            number = format_cell(summary["methods"][name]["columns"][column.key]).replace(" ±", "±")
            assert number in words, (name, column.key)
        rows = [line.split() for line in lines if line.split()[:1] == [name]]
        assert len(rows) == len([line for line in lines if line.split()[:1] == ["base"]])


def test_marks_stand_beside_the_numbers():
    out = io.StringIO()
    summary = wide_summary(["base", "sam", "nso", "rsp"])
    for name, mark in (("sam", "better"), ("nso", "worse"), ("rsp", "confounded")):
        summary["versus"]["gap"][name]["mark"] = mark
    summary["best"]["gap"] = "sam"
    summary["versus"]["test_loss"]["nso"]["mark"] = "better"
    print_table(summary, Console(file=out, width=200))
    text = out.getvalue()
    for name, key, mark in (("sam", "gap", "*"), ("nso", "gap", "▼"), ("rsp", "gap", "†"), ("nso", "test_loss", "▲")):
        assert f"{format_cell(summary['methods'][name]['columns'][key]).replace(' ±', '±')} {mark}" in text
    assert "▲ better, ▼ worse than base; * better than every other method" in text
    assert "† Different, but the lower value is at the higher training loss" in text


def test_an_output_that_has_no_arrows_gets_signs():
    summary = wide_summary(["base", "sam"])
    summary["versus"]["gap"]["sam"]["mark"] = "worse"
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_table(summary, Console(file=out, width=100))
    out.flush()
    assert re.search(r"\d\+-\S+ - *\|", out.buffer.getvalue().decode("ascii"))


def test_two_seeds_leave_the_mean_its_digits():
    assert format_cell({"mean": 93.1623, "half_width": 22.31, "values": [91.4, 94.9]}) == "93.16 ±22"
    assert format_cell({"mean": 93.1623, "half_width": 22.31, "values": [91.4, 94.9, 93.2]}) == "93 ±22"


def test_markup_in_a_message_is_only_text(capsys):
    entry = {"columns": {c.key: {"mean": None} for c in COLUMNS}, "trace_stderr": None, "messages": ["at [0/1] [/red]"]}
    entry["untrained"] = ["seed [0]"]
    config = {"task": "digits", "num_seeds": 1, "budget": "steps", "amount": 1}
    print_table({**config, "methods": {"base": entry}, "best": {}, "versus": {}})
    assert "diverged: at [0/1] [/red]" in capsys.readouterr().out


def test_an_interrupted_comparison_says_that_it_is_ending(capsys):
    with Live(4, 1, "runs/digits") as live:
        live.update("sam-seed0", 3, 10, 0.5)
        live.stopping()
    assert "stopping" in capsys.readouterr().out
