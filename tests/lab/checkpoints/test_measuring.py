"""`flatmin measure` and `flatmin landscape`: what they look at, and what they refuse."""

import argparse
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import flatmin
from flatmin.lab.checkpoints.subject import short_names
from flatmin.lab.cli import main
from flatmin.lab.records import read_run
from flatmin.lab.script import made_by
from flatmin.lab.tasks import get_task
from flatmin.lab.weights import load_weights

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "compare.md"
PATIENTS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)[0]
OBJECTIVE = """
import torch
from torch import nn

import flatmin

torch.manual_seed(0)
model = nn.Linear(3, 2, bias=False)
batches = [{"x": torch.randn(8, 3), "y": torch.randint(2, (8,))} for _ in range(2)]
OBJECTIVE = flatmin.Objective(model, nn.CrossEntropyLoss(), batches, forward=lambda m, b: (m(b["x"]), b["y"]))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two methods and two seeds on the digits, a few steps each."""
    out = tmp_path_factory.mktemp("runs")
    options = ["--methods", "base", "sam", "--num-seeds", "2", "--num-gradients", "40", "--jobs", "1"]
    assert main(["compare", *options, "--out", str(out)]) == 0
    return out / "digits" / "records"


pytestmark = pytest.mark.usefixtures("place")


def measured(*arguments, out="m"):
    assert main(["measure", *map(str, arguments), "--out", out]) == 0
    return json.loads((Path(out) / "measure.json").read_text())["reports"]


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_run_needs_no_more_than_its_weights_and_has_the_numbers_of_its_record(runs, capsys):
    found = measured(runs / "sam-seed1.safetensors")
    record = read_run(runs / "sam-seed1.jsonl").result["flatness"]
    assert found["sam-seed1"]["loss"]["value"] == pytest.approx(record["loss"]["value"], rel=1e-6)
    assert found["sam-seed1"]["trace"]["value"] == pytest.approx(record["trace"]["value"], rel=1e-5)
    assert found["sam-seed1"]["top_eigenvalue"]["value"] == pytest.approx(record["top_eigenvalue"]["value"], rel=1e-5)
    assert "lambda_max" in capsys.readouterr().out
    assert (Path("m") / "sam-seed1.png").stat().st_size > 5000


def test_another_part_of_the_data_and_another_seed(runs):
    run, result = runs / "base-seed1.safetensors", read_run(runs / "base-seed1.jsonl").result
    (test,) = measured(run, "--on", "test").values()
    assert test["loss"]["value"] == pytest.approx(result["test_loss"], rel=1e-6)
    (other,) = measured(run, "--seed", "0", out="n").values()
    assert other["loss"]["value"] != pytest.approx(result["train_loss"], rel=1e-3)


def test_several_are_compared(runs, capsys):
    found = measured(*sorted(runs.glob("*.safetensors")), "--num-eigenvalues", "2")
    assert list(found) == ["base-seed0", "base-seed1", "sam-seed0", "sam-seed1"]
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.strip().startswith("sam-seed1"))
    trace, loss = (found["sam-seed1"][name]["value"] for name in ("trace", "loss"))
    assert f"{trace:.4g}" in row
    assert f"{trace / loss:.4g}" in row
    assert "lambda_2" in shown


def test_what_is_kept_is_not_measured_again(runs, monkeypatch, capsys):
    first = measured(runs / "sam-seed0.safetensors")

    def again(name, *_):
        raise AssertionError(f"{name} is measured again")

    with monkeypatch.context() as patch:
        patch.setattr("flatmin.curvature.report.trace", again)
        more = measured(runs / "sam-seed0.safetensors", "--num-eigenvalues", "2")["sam-seed0"]
    assert more["trace"] == first["sam-seed0"]["trace"]
    result = read_run(runs / "sam-seed0.jsonl").result
    (test,) = measured(runs / "sam-seed0.safetensors", "--on", "test").values()  # makes room for it
    assert test["loss"]["value"] == pytest.approx(result["test_loss"], rel=1e-6)
    Path("m/sam-seed0.kept.json").write_text("{")
    assert "is not a file of results" in refused(capsys, "measure", runs / "sam-seed0.safetensors", "--out", "m")


def test_json_is_all_that_is_printed(runs, capsys):
    capsys.readouterr()
    found = measured(runs / "sam-seed0.safetensors", "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed["reports"] == found
    assert (printed["task"], printed["on"], printed["seeds"]) == ("digits", "train", {"sam-seed0": 0})


@pytest.mark.parametrize("nested", [False, True])
def test_a_checkpoint_of_torch_is_as_good(runs, nested):
    weights = load_file(runs / "sam-seed0.safetensors")
    state = {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}
    torch.save({"epoch": 3, "model": state} if nested else state, "c.pt")
    (found,) = measured("c.pt", "--task", "digits").values()
    (same,) = measured(runs / "sam-seed0.safetensors", out="n").values()
    assert found["trace"]["value"] == same["trace"]["value"]


@pytest.mark.parametrize("start", ["module.", "_orig_mod.module.", "model.model._orig_mod."])
def test_names_may_begin_as_wrappers_let_them(start):
    model = nn.ModuleDict({"model": nn.Linear(2, 2)})  # whose own names begin like a wrapper's
    state = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    torch.save({start + name: tensor for name, tensor in state.items()}, "c.pt")
    load_weights(model, Path("c.pt"))
    assert all(bool((p == 1).all()) for p in model.parameters())


def test_tied_weights_may_be_there_once_and_must_be_equal():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    torch.save({"0.weight": torch.ones(2, 2)}, "once.pt")
    load_weights(model, Path("once.pt"))
    assert all(torch.equal(p, torch.ones(2, 2)) for p in model.parameters())
    assert len(list(model.parameters())) == 1
    torch.save({"0.weight": torch.zeros(2, 2), "1.weight": torch.ones(2, 2)}, "apart.pt")
    with pytest.raises(ValueError, match=r"different weights for 0\.weight and 1\.weight, which are one in the model"):
        load_weights(model, Path("apart.pt"))


def test_without_weights_the_model_is_as_it_is_built():
    (found,) = measured("--task", "digits", "--seed", "3").values()
    task = get_task("digits")
    torch.manual_seed(3)
    inputs, labels = task.splits(3).train
    loss = task.criterion(task.build_model().eval()(inputs), labels)
    assert found["loss"]["value"] == pytest.approx(loss.item())


def test_a_pickled_model_is_not_run(capsys):
    class Trap:
        def __reduce__(self):
            return Path.touch, (Path("sprung"),)

    with Path("trap.pt").open("wb") as file:
        pickle.dump(Trap(), file, protocol=2)
    torch.save({"model": Trap()}, "other.pt")
    for name in ("trap.pt", "other.pt"):
        assert "is not a file of tensors alone" in refused(capsys, "measure", name, "--task", "digits")
    assert not Path("sprung").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds nothing, and no weights"),
        (torch.zeros(3), "holds no dict of tensors"),
        ({"lr": 0.1}, "holds lr, and no weights"),
        (
            {"state_dict": {"0.weight": torch.zeros(2, 64)}},
            "weights of another model: it has no '0.bias'; '0.weight' is",
        ),
    ],
)
def test_other_files_are_refused(content, message, capsys):
    torch.save(content, "c.pt")
    assert message in refused(capsys, "measure", "c.pt", "--task", "digits")


def test_files_that_are_not_there_or_damaged(capsys):
    Path("c.safetensors").write_bytes(b"no")
    torch.save(torch.zeros(50), "whole.pt", _use_new_zipfile_serialization=False)
    Path("cut.pt").write_bytes(Path("whole.pt").read_bytes()[:150])
    Path("t.csv").write_text("a,b\n1,2\n")
    for name in ("cut.pt", "t.csv"):
        assert "is not a file of tensors alone" in refused(capsys, "measure", name, "--task", "digits")
    assert "there is no file nowhere.pt" in refused(capsys, "measure", "nowhere.pt", "--task", "digits")
    assert "no file of safetensors" in refused(capsys, "measure", "c.safetensors", "--task", "digits")


def test_contradictions_and_gaps_are_refused(runs, capsys):
    run = runs / "sam-seed0.safetensors"
    torch.save({}, "c.pt")
    assert "nothing to look at" in refused(capsys, "measure")
    assert "named twice" in refused(capsys, "measure", run, run)
    assert "named twice" in refused(capsys, "landscape", run, run.parent / ".." / "records" / run.name)
    assert "are for one file" in refused(capsys, "landscape", run, runs / "base-seed0.safetensors", "--num-dims", "1")
    assert "no record of a run beside" in refused(capsys, "measure", "c.pt")
    assert "is of the task digits, not cancer" in refused(capsys, "measure", run, "--task", "cancer")
    assert "data of its own" in refused(capsys, "measure", "--objective", "o.py", "--task", "digits")
    assert "no Python file o.py" in refused(capsys, "measure", "--objective", "o.py")


def test_runs_of_ones_own_task_need_its_file_as_it_was(capsys):
    Path("patients.py").write_text(PATIENTS)
    tuning = ["--lr", "0.01", "--weight-decay", "0", "--rho", "0.1", "--num-seeds", "1", "--num-gradients", "20"]
    assert main(["tune", "--task", "patients.py", "--methods", "base", *tuning, "--jobs", "1"]) == 0
    assert main(["train", "--task", "patients.py", "--method", "base", "--tuned", "runs/tuning-patients"]) == 0
    run = "runs/train-patients/base-seed0.safetensors"
    assert "a task of your own, patients: give its file" in refused(capsys, "measure", run)
    (found,) = measured(run, "--task", "patients.py").values()
    assert found["loss"]["value"] == read_run(Path(run).with_suffix(".jsonl")).result["train_loss"]
    Path("patients.py").write_text(PATIENTS.replace("20 * x", "10 * x"))
    assert "made of patients with another data" in refused(capsys, "measure", run, "--task", "patients.py")
    Path("patients.py").write_text(PATIENTS.replace("MSELoss", "L1Loss"))
    for more in ([], ["--seed", "7"]):
        assert "made of patients with another loss" in refused(capsys, "measure", run, "--task", "patients.py", *more)


def test_runs_of_two_tasks_are_not_mixed(runs, tmp_path, capsys):
    assert main(["train", "--task", "cancer", "--method", "base", "--num-gradients", "20"]) == 0
    files = runs / "sam-seed0.safetensors", "runs/train-cancer/base-seed0.safetensors"
    for command in ("measure", "landscape"):
        assert "of several tasks, cancer and digits" in refused(capsys, command, *files, "--out", "h")


def test_an_objective_of_ones_own(capsys):
    Path("mine.py").write_text(OBJECTIVE)
    (found,) = measured("--objective", "mine.py", "--sigma", "0.1", "--rho", "0.1", "--density").values()
    assert found["loss"]["num_samples"] == 16
    assert found["noise_stability"]["value"] > 0
    assert "mine" in found or "noise rise" in capsys.readouterr().out
    torch.save({"weight": torch.zeros(2, 3)}, "zero.pt")
    both = measured("zero.pt", "--objective", "mine.py", out="n")
    assert both["zero"]["loss"]["value"] == pytest.approx(np.log(2))
    Path("mine.py").write_text("import flatmin")
    assert "is to make one Objective, as in OBJECTIVE = " in refused(capsys, "measure", "--objective", "mine.py")


def drawn(*arguments):
    before = set(Path("l").glob("*.json"))
    assert main(["landscape", *map(str, arguments), "--out", "l"]) == 0
    (new,) = set(Path("l").glob("*.json")) - before
    assert new.with_suffix(".png").stat().st_size > 10_000
    return json.loads(new.read_text())


def test_a_line_and_a_plane_go_through_the_weights(runs):
    sam, base, other = (runs / f"{name}.safetensors" for name in ("sam-seed0", "base-seed0", "base-seed1"))
    losses = {name: read_run(runs / f"{name}-seed0.jsonl").result["train_loss"] for name in ("sam", "base")}
    line = drawn(sam, base)
    (axis,) = line["coordinates"]
    assert line["losses"][axis.index(0.0)] == pytest.approx(losses["sam"], rel=1e-5)
    assert line["losses"][axis.index(1.0)] == pytest.approx(losses["base"], rel=1e-5)
    plane = drawn(sam, other, base, "--num-points", "5")
    first, second = plane["coordinates"]
    assert plane["labels"] == ["to base-seed1", "to base-seed0"]
    assert plane["losses"][first.index(0.0)][second.index(1.0)] == pytest.approx(losses["base"], rel=1e-5)


def test_around_one(runs, capsys):
    run = runs / "base-seed0.safetensors"
    record = read_run(runs / "base-seed0.jsonl").result
    plane = drawn(run, "--num-points", "5")
    assert np.array(plane["losses"]).shape == (5, 5)
    assert plane["losses"][2][2] == pytest.approx(record["train_loss"], rel=1e-5)
    assert "random direction" in capsys.readouterr().out
    files = [f"{name}.pt" for name in "abcd"]
    assert "room for three" in refused(capsys, "landscape", *files, "--task", "digits")


def test_along_the_first_eigenvector_the_loss_bends_by_the_eigenvalue():
    Path("mine.py").write_text(OBJECTIVE)
    options = ["--along", "eigenvectors", "--num-dims", "1", "--span", "-0.1", "0.1", "--num-points", "3"]
    left, middle, right = drawn("--objective", "mine.py", *options)["losses"]
    (found,) = measured("--objective", "mine.py").values()
    assert (left - 2 * middle + right) / 0.1**2 == pytest.approx(found["top_eigenvalue"]["value"], rel=0.01)


NORMED = """
import torch
from torch import nn

import flatmin

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
OBJECTIVE = flatmin.Objective(model, nn.CrossEntropyLoss(), [(torch.randn(16, 3), torch.randint(2, (16,)))])
"""


def test_statistics_of_batch_norm_that_are_not_in_the_picture_are_said(capsys):
    Path("mine.py").write_text(NORMED)
    objective = made_by(Path("mine.py"), flatmin.Objective, "")
    state = {name: tensor.clone() for name, tensor in objective.model.state_dict().items()}
    torch.save(state, "a.pt")
    other = {**state, "0.weight": state["0.weight"] + 0.1, "1.running_mean": torch.full((4,), 3.0)}
    torch.save(other, "b.pt")
    line = drawn("a.pt", "b.pt", "--objective", "mine.py", "--num-points", "5", "--span", "0", "1")
    said = capsys.readouterr().err
    objective.model.load_state_dict({**other, "1.running_mean": state["1.running_mean"]})
    assert line["losses"][-1] == pytest.approx(objective.loss())
    assert f"the loss at b is {objective.loss():.4g}; " in said
    objective.model.load_state_dict(other)
    assert f"with its own it is {objective.loss():.4g}." in said
    torch.save({**other, "1.running_mean": state["1.running_mean"]}, "c.pt")
    drawn("a.pt", "c.pt", "--objective", "mine.py", "--num-points", "3")
    assert "buffers" not in capsys.readouterr().err


def test_weights_without_a_record_say_whose_samples_they_are_measured_on(runs, capsys):
    shutil.copy(runs / "sam-seed1.safetensors", "moved.safetensors")
    (moved,) = measured("moved.safetensors", "--task", "digits").values()
    printed = capsys.readouterr()
    assert "no record of a run beside moved.safetensors: the train samples are those of seed 0" in printed.err
    assert "moved on train samples of digits, seed 0:" in printed.out
    (right,) = measured("moved.safetensors", "--task", "digits", "--seed", "1").values()
    assert "no record" not in capsys.readouterr().err
    assert right["loss"]["value"] == pytest.approx(read_run(runs / "sam-seed1.jsonl").result["train_loss"], rel=1e-6)
    assert moved["loss"]["value"] != pytest.approx(right["loss"]["value"], rel=1e-3)


def test_what_goes_wrong_inside_the_model_is_one_line(capsys):
    Path("mine.py").write_text(OBJECTIVE.replace('b["y"]', 'b["labels"]'))
    assert "mine cannot be measured: KeyError: 'labels'" in refused(capsys, "measure", "--objective", "mine.py")
    torch.save({"weight": torch.full((2, 3), torch.nan)}, "bad.pt")
    Path("mine.py").write_text(OBJECTIVE)
    assert "bad: the loss is nan" in refused(capsys, "measure", "bad.pt", "--objective", "mine.py")
    assert "no Python file bad.pt" in refused(capsys, "measure", "--objective", "bad.pt")


def test_what_is_in_the_way_of_a_checkpoint_is_named(capsys):
    torch.save({"state_dict": {}, "args": argparse.Namespace()}, "c.pt")
    assert "beside tensors it holds argparse.Namespace" in refused(capsys, "measure", "c.pt", "--task", "digits")
    torch.save({"state_dict": {"a": torch.zeros(1)}, "model": {"a": torch.ones(1)}}, "two.pt")
    assert "has weights as state_dict and as model" in refused(capsys, "measure", "two.pt", "--task", "digits")


def test_short_names_tell_files_apart():
    assert short_names((Path("a/x/w.pt"), Path("b/x/v.pt"))) == ["w", "v"]
    assert short_names((Path("a/x/w.pt"), Path("b/x/w.pt"))) == ["a-x-w", "b-x-w"]
    assert short_names((Path("w.pt"), Path("w.safetensors"))) == ["w-pt", "w-safetensors"]
    alike = short_names((Path("a/b-w"), Path("a-b/w"), Path("w")))
    assert len(set(alike)) == 3


def test_losses_that_differ_are_said(capsys):
    Path("mine.py").write_text(OBJECTIVE)
    for size in (0.0, 1.0):
        torch.save({"weight": torch.full((2, 3), size) * torch.tensor([[1.0], [-1.0]])}, f"w{size:g}.pt")
    measured("w0.pt", "w1.pt", "--objective", "mine.py")
    assert "Their losses differ" in " ".join(capsys.readouterr().out.split())
    torch.save(torch.load("w0.pt"), "same.pt")
    measured("w0.pt", "same.pt", "--objective", "mine.py", out="n")
    assert "Their losses differ" not in " ".join(capsys.readouterr().out.split())
