"""Runs on disk: whole lines, final names only when finished, and nothing foreign is ever overwritten."""

import json
import re
import subprocess

import pytest

import flatmin.lab.records as records_module
from flatmin.lab.records import RunWriter, environment, read_run

SPEC = {"method": "nso", "seed": 1, "settings": {}}
RESULT = {
    **dict.fromkeys(("test_accuracy", "test_loss", "train_loss", "gap", "seconds", "gradients", "steps"), 0.5),
    "flatness": {"trace": {"value": 1.0, "stderr": 0.1, "per_layer": {}}, "top_eigenvalue": {"value": 1.0}},
}


def write(path):
    with RunWriter(path, {"spec": SPEC, **environment()}) as writer:
        writer.write({"type": "progress", "step": 1})
        writer.finish({"status": "finished", **RESULT})


def test_round_trip(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path)
    record = read_run(path)
    assert record.finished
    assert record.header["spec"] == SPEC
    assert record.header["versions"]["torch"]
    assert record.progress == [{"type": "progress", "step": 1}]
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_whole_lines_and_no_finished_file(tmp_path):
    path = tmp_path / "a.jsonl"

    def run():
        with RunWriter(path, {"spec": {}}) as writer:
            writer.write({"type": "progress", "step": 1})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert not path.exists()
    lines = (tmp_path / "a.jsonl.partial").read_text().splitlines()
    assert [json.loads(line)["type"] for line in lines] == ["run", "progress", "interrupted"]
    write(path)  # and the run can be started again
    assert read_run(path).finished


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "does not begin with a flatmin-run/1 header"),
        ("name,score\nme,1\n", "line 1 is not JSON"),
        ('{"type": "run", "format": "flatmin-run/0"}\n', "does not begin with a flatmin-run/1 header"),
        ('{"type": "run", "format": "flatmin-run/1"}\n{"type": "prog', "line 2 is not JSON"),
        ('{"type": "run", "format": "flatmin-run/1"}\n[1]\n', "line 2 is not a record"),
        ('{"type": "run", "format": "flatmin-run/1"}\n', "its last line is not a result"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_and_left_alone(tmp_path, content, why):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=why) as error:
        read_run(path)
    assert "a.jsonl" in str(error.value)
    assert "left as it is" in str(error.value)
    assert path.read_text() == content


def test_a_foreign_partial_file_is_refused_and_left_alone(tmp_path):
    partial = tmp_path / "a.jsonl.partial"
    partial.write_text("my notes\n")
    with pytest.raises(ValueError, match="does not begin with a flatmin-run/1 header"):
        write(tmp_path / "a.jsonl")
    assert partial.read_text() == "my notes\n"


@pytest.mark.parametrize("rest", ["", '{"type": "run", "form'])
def test_a_run_that_was_cut_off_in_its_first_line_is_done_again(tmp_path, rest):
    (tmp_path / "a.jsonl.partial").write_text(rest)
    write(tmp_path / "a.jsonl")
    assert read_run(tmp_path / "a.jsonl").finished


def test_a_finished_run_is_never_overwritten(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path)
    before = path.read_text()
    with pytest.raises(ValueError, match=r"a\.jsonl is finished, and a finished run is never overwritten"):
        write(path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_commit_is_of_our_source_and_not_of_a_repository_around_it(tmp_path, monkeypatch):
    file = tmp_path / "venv" / "flatmin" / "lab" / "records.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    monkeypatch.setattr(records_module, "__file__", str(file))
    assert environment()["commit"] is None
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "a stranger's")
    assert environment()["commit"] is None
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "with our source")
    commit = environment()["commit"]
    assert re.fullmatch("[0-9a-f]{40}", commit)
    file.write_text("changed")
    assert environment()["commit"] == commit + "+changes"
