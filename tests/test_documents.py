"""What the documents show is executed, and what they quote is in the records."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.measuring import markdown as measuring_tables
from benchmarks.split_batch import markdown as split_table
from benchmarks.step import markdown as cost_table
from docs.refresh import methods_table
from flatmin.lab.compare import Compare
from flatmin.lab.display import markdown_table
from flatmin.lab.summary import summarize
from flatmin.lab.tasks import get_task

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "docs" / "records" / "digits"
BLOCK = re.compile(r"```python\n(.*?)```", re.S)


def blocks():
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for number, code in enumerate(BLOCK.findall(path.read_text())):
            yield pytest.param(code, id=f"{path.relative_to(ROOT)}-{number}")


@pytest.mark.parametrize("code", list(blocks()))
def test_code_blocks_run(code, tmp_path):
    script = tmp_path / "block.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_run(path, tmp_path):
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_quickstart_is_short():
    (code, *_) = BLOCK.findall((ROOT / "README.md").read_text())
    setup, ours = code.split("# ----", 1)
    assert "flatmin" not in setup.replace("import flatmin", "")
    assert len([line for line in ours.splitlines()[1:] if line.strip()]) <= 10


def committed_summary():
    return json.loads((RECORDS / "summary.json").read_text())


def test_the_committed_summary_is_computed_from_the_committed_records():
    summary = committed_summary()
    runs = Compare(num_seeds=summary["num_seeds"], name="digits", out=RECORDS.parent).runs()
    again = json.loads(json.dumps(summarize(runs)))
    assert again == {key: summary[key] for key in again}


def test_the_settings_are_the_winners_of_the_committed_tuning():
    tuning = json.loads((RECORDS / "tuning.json").read_text())
    for method, settings in get_task("digits").settings.items():
        best = min(tuning["trials"][method], key=lambda trial: trial["validation_loss"])
        assert (settings.lr, settings.weight_decay, settings.radius) == (
            best["lr"],
            best["weight_decay"],
            best["radius"],
        )


def test_the_tables_of_measuring_are_computed_from_the_record():
    record = json.loads((ROOT / "benchmarks" / "results" / "measuring.json").read_text())
    assert measuring_tables(record) in (ROOT / "docs" / "results.md").read_text()


@pytest.mark.parametrize("path", ["README.md", "docs/results.md"])
def test_the_tables_are_computed_from_the_records(path):
    text = (ROOT / path).read_text()
    assert markdown_table(committed_summary()) in text
    assert cost_table(json.loads((ROOT / "benchmarks" / "results" / "step.json").read_text())) in text


def test_the_table_of_methods_is_computed_from_the_registry():
    assert methods_table() in (ROOT / "docs" / "methods.md").read_text()


def test_the_table_of_half_batches_is_the_committed_result():
    results = json.loads((ROOT / "benchmarks" / "results" / "split_batch.json").read_text())
    assert split_table(results) in (ROOT / "docs" / "concepts" / "step.md").read_text()


def test_links_lead_somewhere():
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)}: {target}"
