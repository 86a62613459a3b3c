"""A task in a file of the user's own: what the command line takes, and what it says of a file that is not right."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flatmin.lab.pool as pool
from flatmin.lab import Settings
from flatmin.lab.budget import Budget
from flatmin.lab.cli import main
from flatmin.lab.compare import Compare
from flatmin.lab.records import read_run
from flatmin.lab.tasks import get_task
from flatmin.lab.tuning.tuned import read_tuning

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "compare.md"
SHOWN = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)[0]
TUNING = ["--lr", "0.01", "0.1", "--weight-decay", "0", "--rho", "0.1", "--num-seeds", "1", "--num-gradients", "20"]
METHODS = ["--methods", "base", "sam"]


pytestmark = pytest.mark.usefixtures("place")


@pytest.fixture
def mine(place):
    file = place / "mine.py"
    file.write_text(SHOWN)
    return file


def tune(*more):
    assert main(["tune", "--task", "mine.py", *METHODS, *TUNING, "--jobs", "1", *more]) == 0


def test_the_file_of_the_page_is_tuned_and_compared(mine, place, capsys):
    tune()
    said = capsys.readouterr().out.splitlines()
    hint = next(line for line in said if line.startswith("flatmin compare"))
    assert main([*hint.split()[1:], "--num-seeds", "2"]) == 0  # two runs at a time, in processes of their own
    best = json.loads((place / "runs" / "tuning-patients" / "tuning.json").read_text())["best"]
    for method in ("base", "sam"):
        header = read_run(place / "runs" / "patients" / "records" / f"{method}-seed1.jsonl").header
        assert header["spec"]["task"] == "patients"  # wherever the file is
        assert header["spec"]["settings"]["lr"] == best[method]["lr"]
        assert header["spec"]["num_steps"] == {"base": 20, "sam": 10}[method]  # the budget of the tuning
    report = (place / "runs" / "patients" / "report.html").read_text()
    assert "Chosen by validation loss on 1 other seed, 2 settings for each method" in report
    assert "Efron et al. 2004" in report
    assert "That was at a budget" not in report


def test_one_run(mine, capsys):
    tune()
    mine.rename("elsewhere.py")
    arguments = ["train", "--task", "elsewhere.py", "--method", "sam", "--tuned", "runs/tuning-patients/tuning.json"]
    assert main(arguments) == 0
    assert "sam-seed0: step 10 of 10" in capsys.readouterr().out
    assert main(["train", "--task", "elsewhere.py", "--method", "nso", "--tuned", "runs/tuning-patients"]) == 2
    error = capsys.readouterr().err
    command = "flatmin tune --task elsewhere.py --methods base nso"
    assert f"task patients has no settings for nso. It has them for: base, sam. Find some with {command}, and" in error


def test_the_report_needs_no_task(mine, place):
    tune()
    assert main(["compare", "--task", "mine.py", *METHODS, "--tuned", "runs/tuning-patients", "--num-seeds", "2"]) == 0
    report = place / "runs" / "patients" / "report.html"
    before = report.read_text()
    report.unlink()
    mine.unlink()
    assert main(["report", "--name", "patients"]) == 0
    assert report.read_text() == before


def test_the_report_of_a_folder_from_before_it_held_what_the_task_is(place):
    arguments = ["--num-seeds", "2", "--num-gradients", "20", "--methods", "base", "sam", "--jobs", "1"]
    assert main(["compare", *arguments]) == 0
    report, config = place / "runs" / "digits" / "report.html", place / "runs" / "digits" / "comparison.json"
    before = report.read_text()
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "about"}))
    assert main(["report"]) == 0
    assert report.read_text() == before
    assert "That was at a budget of 2000 gradients; here it is 20 gradients" in before


def test_another_budget_than_the_tuned_one_is_said(mine):
    tune()
    options = {"task": "mine.py", "methods": ("base",), "tuned": Path("runs/tuning-patients"), "num_seeds": 2}
    report = Compare(**options, num_gradients=30, jobs=1).run().read_text()
    assert "at a budget of 20 gradients; here it is 30 gradients, for which nothing was tuned" in report


def test_settings_that_were_tuned_at_equal_steps_are_compared_at_equal_steps(mine, place, capsys):
    tune("--budget", "steps")
    for method in ("base", "sam"):
        (record, *_) = (place / "runs" / "tuning-patients").glob(f"{method}-*/*.jsonl")
        assert read_run(record).result["gradients"] == {"base": 20, "sam": 40}[method]
    arguments = ["--task", "mine.py", "--tuned", "runs/tuning-patients", "--jobs", "1"]
    assert main(["train", *arguments[:4], "--method", "sam"]) == 0
    assert "sam-seed0: step 20 of 20" in capsys.readouterr().out
    assert main(["train", *arguments[:4], "--method", "sam", "--num-gradients", "20", "--out", "gradients"]) == 0
    assert "sam-seed0: step 10 of 10" in capsys.readouterr().out  # they are gradients, whatever was equal in the tuning
    assert main(["compare", *arguments, *METHODS, "--num-seeds", "2"]) == 0
    report = (place / "runs" / "patients" / "report.html").read_text()
    assert "Equal steps: 20 a run" in report
    assert "That was at a budget" not in report
    assert main(["compare", *arguments, *METHODS, "--num-seeds", "2", "--budget", "gradients", "--name", "b"]) == 0
    other = (place / "runs" / "b" / "report.html").read_text()
    assert "That was at a budget of 20 steps; here it is 20 gradients, for which nothing was tuned" in other


def test_equal_steps_are_not_the_gradients_that_a_task_was_tuned_for(place):
    options = {"methods": ("base",), "num_seeds": 2, "budget": "steps", "jobs": 1}
    report = Compare(**options, num_gradients=20).run().read_text()
    assert "at a budget of 2000 gradients; here it is 20 steps, for which nothing was tuned" in report


def test_a_file_that_was_edited_is_read_again_by_the_next_command_and_not_before(mine, monkeypatch):
    tune()
    edited = SHOWN.replace("nn.ReLU()", "nn.Tanh()")
    monkeypatch.setattr(pool, "train", lambda *a, f=pool.train: (mine.write_text(edited), f(*a)))
    arguments = ["compare", "--task", "mine.py", *METHODS, "--tuned", "runs/tuning-patients", "--jobs", "1"]
    assert main([*arguments, "--num-seeds", "2"]) == 0
    assert "ReLU" in str(get_task("mine.py").build_model())
    with pytest.raises(ValueError, match="is of the task patients with another model"):
        Compare(task="mine.py", methods=("base",), tuned=Path("runs/tuning-patients")).run()
    assert "Tanh" in str(get_task("mine.py").build_model())


def test_runs_of_a_task_that_changed_in_between_make_no_report(mine, place, capsys):
    tune()
    arguments = ["compare", "--task", "mine.py", *METHODS, "--tuned", "runs/tuning-patients", "--jobs", "1"]
    assert main([*arguments, "--num-seeds", "2"]) == 0
    path = place / "runs" / "patients" / "records" / "sam-seed1.jsonl"
    before = path.read_text()
    digest = json.loads(before.splitlines()[0])["task"]
    for part in ("model", "data"):
        path.write_text(before.replace(digest[part], "0123456789abcdef"))
        assert main(["report", "--name", "patients"]) == 2
        assert f"has runs of the task with more than one {part}" in capsys.readouterr().err
    path.write_text(before)
    assert main(["report", "--name", "patients"]) == 0


def test_of_several_tasks_the_one_named_TASK_counts(mine):
    mine.write_text(SHOWN + "OLD = TASK\nTASK = Task(**{**vars(OLD), 'name': 'new'})\n")
    assert get_task("mine.py").name == "new"


def test_a_file_that_failed_leaves_no_module_behind(mine):
    mine.write_text("nothing\n")
    with pytest.raises(ValueError, match="line 1: NameError"):
        get_task("mine.py")
    assert "flatmin_file_mine" not in sys.modules


def test_the_report_says_where_the_best_is_at_the_edge_and_trials_may_diverge(mine):
    tune("--lr", "0.01", "1000000")
    trials = json.loads(Path("runs/tuning-patients/tuning.json").read_text())["trials"]["base"]
    assert trials[1]["validation_loss"] is None
    told = read_tuning(Path("runs/tuning-patients"), get_task("mine.py")).task.tuning
    assert "The best is at the edge of the grid for base (lr), sam (lr)." in told
    tune("--lr", "0.01", "0.02")
    best = json.loads(Path("runs/tuning-patients/tuning.json").read_text())["best"]
    assert best.keys() == {"base", "sam"}
    told = read_tuning(Path("runs/tuning-patients"), get_task("mine.py")).task.tuning
    assert "The best is at the edge of the grid for base (lr), sam (lr)." in told


def test_where_every_trial_diverged_there_is_no_winner(mine, capsys):
    assert main(["tune", "--task", "mine.py", *METHODS, *TUNING, "--jobs", "1", "--lr", "1e6", "1e7"]) == 2
    assert "no setting of base trained: in each trial a run diverged" in capsys.readouterr().err
    assert not Path("runs/tuning-patients/tuning.json").exists()


def test_a_script_without_a_guard_is_told(mine, capfd):
    script = (
        "from flatmin.lab.compare import Compare\nCompare(methods=('base',), num_seeds=2, num_gradients=20).run()\n"
    )
    Path("script.py").write_text(script)
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "starts runs as soon as it is imported" in done.stderr


def test_what_lies_beside_it_can_be_imported(mine, place):
    (place / "beside.py").write_text("SIZE = 7\n")
    mine.write_text("from beside import SIZE\n" + SHOWN.replace("batch_size=20", "batch_size=SIZE"))
    assert get_task("mine.py").batch_size == 7


def test_a_task_may_be_another_one_changed(mine):
    mine.write_text(
        "from dataclasses import replace\nfrom flatmin.lab.tasks.digits import DIGITS\n"
        "TASK = replace(DIGITS, name='bigger-batches', batch_size=50)\nSAME = TASK\n"
    )
    assert get_task("mine.py").name == "bigger-batches"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SHOWN + "TASK.settings['sam'] = nothing\n", r"mine\.py, line \d+: NameError: name 'nothing' is not defined"),
        ("import nothing_like_it\n", r"mine\.py, line 1: ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("x = (\n", r"mine\.py: SyntaxError: .* \(mine\.py, line 1\)"),
        ("import sys\n\nsys.exit(3)\n", r"mine\.py, line 3: SystemExit: 3"),
        ("", r"is to make one Task, as in TASK = Task\(name=..., ...\); it makes 0\."),
        (
            SHOWN.replace("TASK =", "ONE =") + "TWO = Task(**{**vars(ONE), 'name': 'two'})\n",
            r"it makes 2 \(patients, two\)",
        ),
        (SHOWN.replace('"patients"', '"digits"'), r"has the name of one that flatmin comes with, 'digits'"),
        (SHOWN.replace('"patients"', '"a/b"'), r"the name of a task is the name of a folder inside --out, got 'a/b'"),
        (SHOWN.replace("batch_size=20", "batch_size=0"), r"line \d+: ValueError: batch_size must be at least 1"),
        (
            SHOWN.replace("num_gradients", "settings={'sam': {'lr': 0.1}},\n    num_gradients"),
            r"settings\['sam'\] must be Settings\(lr=...\), got \{'lr': 0.1\}",
        ),
    ],
)
def test_a_file_that_is_not_right_is_one_line(mine, capsys, text, message):
    mine.write_text(text)
    for command in ("compare", "tune", "train"):
        assert main([command, "--task", "mine.py"]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error)
        assert len(error.splitlines()) == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("None", "it must return train, validation and test, got NoneType"),
        ("(x, y), (x, y)", "it must return train, validation and test, got 2 parts"),
        ("(x, y), (x, y), (x, y, y)", "test must be two tensors, inputs and targets, got Tensor, Tensor, Tensor"),
        ("(x, y), (x.tolist(), y), (x, y)", "validation must be two tensors, inputs and targets, got list, Tensor"),
        ("(x, y[1:]), (x, y), (x, y)", "train must have a target for each input, got 442 and 441"),
        ("(x, y), (x[:0], y[:0]), (x, y)", "validation is empty"),
    ],
)
def test_data_that_is_not_right_is_one_line(mine, capsys, returned, message):
    mine.write_text(SHOWN.replace("return Splits(*((x[part], y[part]) for part in rows))", f"return {returned}"))
    assert main(["tune", "--task", "mine.py", *METHODS, *TUNING, "--jobs", "1"]) == 2
    error = capsys.readouterr().err
    assert f"load of task 'patients': {message}" in error


def test_no_such_file(capsys):
    assert main(["compare", "--task", "nowhere/my.py"]) == 2
    assert "there is no Python file nowhere/my.py to read the Task from" in capsys.readouterr().err


def test_winners_become_the_settings(mine):
    tune()
    task, budget = read_tuning(Path("runs/tuning-patients"), get_task("mine.py"))
    assert task.settings.keys() == {"base", "sam"}
    assert task.settings["sam"] == Settings(lr=task.settings["sam"].lr, radius=0.1)
    assert budget == Budget(20, "gradients")
    path = Path("runs/tuning-patients/tuning.json")
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "budget"}))
    assert read_tuning(path, get_task("mine.py")).budget == budget  # as it was before there was a choice


def test_winners_that_another_call_of_tune_leaves_out_are_named(mine, capsys):
    tune()
    assert "before" not in capsys.readouterr().out
    tune("--methods", "base")
    assert "It had winners for sam before, which were not tuned now" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.unlink(), r"No such file or directory. flatmin tune writes it"),
        (lambda file: file.write_text("{"), "is not a tuning.json that flatmin tune wrote, or it is damaged"),
        (lambda file: file.write_text('{"best": {}}'), "is not a tuning.json that flatmin tune wrote"),
        (lambda file: file.write_text(file.read_text().replace('"patients"', '"other"')), "is of the task other, not"),
        (lambda file: file.write_text(file.read_text().replace('"lr": 0', '"lr": -1')), "is not a tuning.json"),
    ],
)
def test_a_tuning_that_is_not_right_is_one_line(mine, capsys, change, message):
    tune()
    change(Path("runs/tuning-patients/tuning.json"))
    capsys.readouterr()
    assert main(["compare", "--task", "mine.py", "--tuned", "runs/tuning-patients"]) == 2
    assert re.search(message, capsys.readouterr().err)
