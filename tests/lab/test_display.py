"""What the terminal and the report show: mixed versions are said, and brackets are only text."""

import json
import re
from importlib import metadata
from pathlib import Path

from flatmin.lab.compare import Compare, Report
from flatmin.lab.display import print_table
from flatmin.lab.summary import COLUMNS


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


def test_markup_in_a_message_is_only_text(capsys):
    entry = {"columns": {c.key: {"mean": None} for c in COLUMNS}, "trace_stderr": None, "messages": ["at [0/1] [/red]"]}
    config = {"task": "digits", "num_seeds": 1, "budget": "steps", "amount": 1}
    print_table({**config, "methods": {"base": entry}, "best": {}, "versus": {}})
    assert "diverged: at [0/1] [/red]" in capsys.readouterr().out
