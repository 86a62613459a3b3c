"""The command line as a user meets it: help, lists, one-line errors, and Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from importlib import metadata

import pytest

from flatmin.lab.cli import Interrupted, Methods, Tasks, Terminated, main
from flatmin.lab.compare import Compare
from flatmin.lab.launch import Train
from flatmin.lab.tuning.tune import Tune


def test_help_is_generated_from_the_dataclass(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["compare", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for word in (
        "--task",
        "--methods",
        "--num-seeds",
        "--budget",
        "gradients,steps",
        "--jobs",
        "equal budget of gradients (or steps)",
    ):
        assert word in text


def test_lists(capsys):
    assert main(["methods"]) == 0
    assert main(["tasks"]) == 0
    text = capsys.readouterr().out
    for word in ("nso-one-point", "2 gradient(s) a step, radius rho", "arXiv:2306.08553", "digits", "CC BY 4.0"):
        assert word in text
    *listed, of_claims = text.strip().splitlines()
    assert of_claims.startswith("For claims of the papers (flatmin reproduce): bad-start, digits-x3, ")
    assert [line.split(":")[0] for line in listed if line.startswith(("digits", "bad"))] == ["digits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "digit"], "unknown task 'digit'. Did you mean 'digits'?"),
        (["--methods", "base", "sem"], "unknown method 'sem'"),
        (["--num-seeds", "0"], "--num-seeds must be at least 1"),
        (["--out", "/proc/nowhere"], "Choose another place with --out"),
    ],
)
def test_an_error_is_one_line_and_status_2(arguments, message, capsys):
    try:
        status = main(["compare", *arguments])
    except SystemExit as exit_:  # tyro's own errors
        status = exit_.code
    assert status == 2
    captured = capsys.readouterr()
    assert message in captured.err + captured.out
    assert "Traceback" not in captured.err


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ctrl_c_leaves_whole_records_and_the_same_command_continues(tmp_path, jobs):
    arguments = ["compare", "--out", str(tmp_path), "--name", "c", "--num-gradients", "600", "--num-seeds", "2"]
    arguments += ["--methods", "base", "nso", "--jobs"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "flatmin", *arguments, jobs],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job may ignore it
    )
    records = tmp_path / "c" / "records"
    deadline = time.monotonic() + 60
    while not list(records.glob("*.partial")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # to the whole group, as a terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    for path in records.glob("*.jsonl*"):
        assert all(json.loads(line) for line in path.read_text().splitlines())
    assert len(list(records.glob("*.jsonl"))) < 4
    assert main([*arguments, "1"]) == 0  # how many run at once is no part of a comparison
    assert len(list(records.glob("*.jsonl"))) == 4
    assert not list(records.glob("*.partial"))


def test_an_interrupt_within_exec_of_a_string_ends_with_our_status_too(tmp_path):
    """`python -m` ends by the signal when a caught KeyboardInterrupt has passed through one: dataclasses use them."""
    body = "exec('import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(5)')"
    (tmp_path / "command.py").write_text(f"""if True:
        import signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it
        from flatmin.lab import cli
        cli.Tasks.run = lambda self: {body}
        sys.exit(cli.main(["tasks"]))""")
    command = [sys.executable, "-m", "command"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 130
    assert done.stderr == "flatmin: interrupted.\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("compare", "Finished runs are kept; the same command continues."),
        ("tune", "Finished runs are kept; the same command continues."),
        ("train", "Of a run that is not finished nothing is used; the same command begins it again."),
        ("methods", ""),
    ],
)
@pytest.mark.parametrize(("stopped", "status"), [(Interrupted, 130), (Terminated, 143)])
def test_what_is_left_is_said_as_it_is(monkeypatch, capsys, command, said, stopped, status):
    def stop(self):
        raise stopped

    for kind in (Compare, Tune, Train, Methods):
        monkeypatch.setattr(kind, "run", stop)
    assert main([command]) == status
    assert capsys.readouterr().err == f"flatmin: {stopped.__name__.lower()}. {said}".rstrip() + "\n"


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{metadata.version('flatmin')}\n"


def test_an_ignored_interrupt_stays_ignored(monkeypatch):
    seen = []
    monkeypatch.setattr(Tasks, "run", lambda _: seen.append(signal.getsignal(signal.SIGINT)))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert main(["tasks"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIG_IGN]


@pytest.mark.parametrize("arguments", [["methods"], ["compare", "--help"]])
def test_a_reader_that_has_gone_is_no_error(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "flatmin", *arguments]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert done.returncode == 141
    assert done.stderr == ""


def test_a_warning_is_one_line(monkeypatch, capsys):
    before = warnings.formatwarning
    monkeypatch.setattr(
        Tasks, "run", lambda _: print(warnings.formatwarning("mind it", UserWarning, "file.py", 7), end="")
    )
    assert main(["tasks"]) == 0
    assert capsys.readouterr().out == "flatmin: warning: mind it\n"
    assert warnings.formatwarning is before
