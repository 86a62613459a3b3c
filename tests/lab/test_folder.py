"""One process at a time in a folder, and a folder that can always be continued."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flatmin.files import write_json
from flatmin.lab.compare import Compare
from flatmin.lab.folder import locked
from flatmin.lab.records import make_writable
from flatmin.lab.tuning.tune import Tune


def compare(tmp_path, **options):
    options = {"num_seeds": 1, "num_gradients": 40, "methods": ("base",), "jobs": 1, **options}
    return Compare(name="small", out=tmp_path, **options)


def tune(tmp_path, **options):
    options = {"methods": ("base",), "lr": (0.1,), "weight_decay": (0.0,), "num_seeds": 1, "jobs": 1, **options}
    return Tune(out=tmp_path / "small", **options)


@pytest.mark.parametrize("job", [compare, tune])
def test_two_at_work_in_one_folder_are_refused(tmp_path, job):
    folder = tmp_path / "small"
    folder.mkdir()
    with locked(folder), pytest.raises(ValueError, match=r"^another flatmin is at work in .*small\.$"):
        job(tmp_path).run()
    job(tmp_path).run()
    assert not list(folder.rglob(".*"))


def test_a_lock_of_a_dead_process_holds_nothing(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from flatmin.lab.folder import locked
with locked(Path({str(tmp_path)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGKILL
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_folder_is_not_even_locked(tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "thesis.txt").write_text("mine")
    with locked(tmp_path / "small"), pytest.raises(ValueError, match="is not a comparison that flatmin wrote"):
        compare(tmp_path).run()


@pytest.mark.parametrize("rest", [[], ["records/.writable"], [".lock", "comparison.json.123.tmp", "records/.writable"]])
def test_a_comparison_that_was_killed_while_it_made_its_folder_continues(tmp_path, rest):
    (tmp_path / "small" / "records").mkdir(parents=True)
    for name in rest:
        (tmp_path / "small" / name).touch()
    compare(tmp_path).run()
    assert (tmp_path / "small" / "report.html").exists()


@pytest.mark.parametrize("rest", ["records/base-seed0.jsonl", "comparison.json", "notes.tmp"])
def test_a_folder_with_anything_else_is_refused(tmp_path, rest):
    (tmp_path / "small" / "records").mkdir(parents=True)
    (tmp_path / "small" / rest).touch()
    with pytest.raises(ValueError, match="is not a comparison that flatmin wrote"):
        compare(tmp_path).run()


def test_temporary_files_of_two_processes_do_not_meet(tmp_path, monkeypatch):
    seen, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: (seen.append(path.name), replace(path, to)))
    write_json(tmp_path / "a.json", {})
    assert str(os.getpid()) in seen[0]


def test_a_folder_is_probed_by_two_at_once(tmp_path, monkeypatch):
    touch = Path.touch
    monkeypatch.setattr(Path, "touch", lambda path: (touch(path), path.unlink()))  # the other one's unlink came first
    make_writable(tmp_path)


def group_members(leader):
    """The living processes of a process group: (pid, state)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def begin(tmp_path, jobs):
    command = [sys.executable, "-m", "flatmin", "compare", "--out", str(tmp_path), "--name", "c", "--jobs", jobs]
    command += ["--num-gradients", "100000", "--num-seeds", "1", "--methods", "base", "nso"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 150  # on a busy machine importing takes long
    while (begun := len(list((tmp_path / "c" / "records").glob("*.partial")))) < int(jobs):
        assert time.monotonic() < deadline, f"{begun} of {jobs} runs have begun"
        time.sleep(0.05)
    time.sleep(0.5)
    assert process.poll() is None
    return process


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_end_with_their_parent(tmp_path):
    process = begin(tmp_path, "2")
    assert len(group_members(process.pid)) >= 3
    process.kill()
    process.wait(timeout=60)
    if process.stderr:
        process.stderr.close()  # not read to its end: orphans would hold it open
    deadline = time.monotonic() + 10
    while group_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = group_members(process.pid)
    if left:
        os.killpg(process.pid, signal.SIGKILL)
    assert left == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("jobs", "to_all"), [("1", False), ("2", False), ("2", True)], ids=["alone", "parent", "group"]
)
def test_sigterm_stops_as_ctrl_c_does(tmp_path, jobs, to_all):
    process = begin(tmp_path, jobs)
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors.strip() == "flatmin: terminated. Finished runs are kept; the same command continues."
    assert not (tmp_path / "c" / ".lock").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_killed_worker_is_one_line(tmp_path):
    process = begin(tmp_path, "2")
    for pid in group_members(process.pid):
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "flatmin: error: a worker process died" in errors
    assert "Traceback" not in errors
