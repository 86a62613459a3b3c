"""One run: reproducible, recorded, interruptible, and honest about divergence."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file

import flatmin
import flatmin.lab.flatness as flatness_module
import flatmin.lab.tasks as tasks_module
import flatmin.lab.train as train_module
from flatmin.lab.records import read_run
from flatmin.lab.tasks import Settings, get_task
from flatmin.lab.train import RunSpec, build_optimizer, train

# One of each kind: what the lab does differently is the base, a seed, parts of a batch, losses by sample.
FEW = ("base", "sam", "nso", "bsam", "esam", "sap")


def spec(method="nso", seed=0, steps=20, lr=0.1, radius=0.05):
    radius = None if method == "base" else radius
    return RunSpec(task="digits", method=method, seed=seed, num_steps=steps, settings=Settings(lr=lr, radius=radius))


def run(path, which):
    path.mkdir(exist_ok=True)
    train(which, path)
    return read_run(path / f"{which.name}.jsonl")


@pytest.mark.parametrize("method", FEW)
def test_same_seed_same_numbers(tmp_path, method):
    a, b = run(tmp_path / "a", spec(method)), run(tmp_path / "b", spec(method))
    for record in (a, b):
        record.result.pop("seconds")
    assert a.result == b.result
    assert a.progress == b.progress
    other = run(tmp_path / "c", spec(method, seed=1))
    assert other.result["test_loss"] != a.result["test_loss"]


@pytest.mark.parametrize(("method", "gradients"), [("base", 20), ("sam", 40), ("nso", 40), ("nso-one-point", 20)])
def test_gradients_are_counted(tmp_path, method, gradients, monkeypatch):
    calls, inner = [], train_module._step

    def counting(model, optimizer, criterion, batch, processes):
        hook = model.register_forward_hook(lambda *_: calls.append(1))
        loss = inner(model, optimizer, criterion, batch, processes)
        hook.remove()
        return loss

    monkeypatch.setattr(train_module, "_step", counting)
    record = run(tmp_path, spec(method))
    assert record.result["gradients"] == gradients == len(calls)
    assert record.result["steps"] == 20


def test_the_record_is_complete(tmp_path):
    record = run(tmp_path, spec())
    assert record.header["spec"]["settings"] == {"lr": 0.1, "weight_decay": 0.0, "radius": 0.05}
    assert set(record.header["versions"]) == {"python", "flatmin", "torch", "numpy", "scipy"}
    assert record.progress[-1]["step"] == 20
    assert record.result["gap"] == pytest.approx(record.result["test_loss"] - record.result["train_loss"])
    assert set(record.result["flatness"]["trace"]["per_layer"]) == {"0", "2", "4"}


def test_the_saved_weights_give_the_recorded_scores(tmp_path):
    record = run(tmp_path, spec())
    task = get_task("digits")
    model = task.build_model()
    model.load_state_dict(load_file(tmp_path / "nso-seed0.safetensors"))
    inputs, labels = task.load(0).test
    assert float(task.criterion(model(inputs), labels).detach()) == record.result["test_loss"]


def test_splits_are_disjoint_and_the_test_set_is_fixed():
    task = get_task("digits")
    a, b = task.load(0), task.load(1)
    assert [len(y) for _, y in a] == [200, 800, 797]
    assert torch.equal(a.test[0], b.test[0])
    assert not torch.equal(a.train[0], b.train[0])
    rows = {name: {tuple(x.tolist()) for x in inputs} for name, (inputs, _) in a._asdict().items()}
    assert not rows["train"] & rows["test"]
    assert not rows["train"] & rows["validation"]


def test_an_interrupt_leaves_whole_records(tmp_path):
    def report(name, step, num_steps, loss):
        if step >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(spec(), tmp_path, report)
    (partial,) = tmp_path.iterdir()
    lines = [json.loads(line) for line in partial.read_text().splitlines()]
    assert partial.name == "nso-seed0.jsonl.partial"
    assert lines[-1] == {"type": "interrupted", "by": "KeyboardInterrupt"}
    whole = run(tmp_path, spec())
    assert whole.progress[: len(lines) - 2] == lines[1:-1]  # started again from the beginning, with the same numbers


@pytest.mark.parametrize("method", FEW)
def test_divergence_is_recorded_and_names_the_mend(tmp_path, method):
    record = run(tmp_path, spec(method, steps=200, lr=1e8))
    assert not record.finished
    assert f"{method} on digits, seed 0: " in record.result["message"]
    assert "A lower learning rate" in record.result["message"]
    assert record.result["steps"] < 200


def test_threads_are_put_back(tmp_path):
    before = torch.get_num_threads()
    run(tmp_path, spec(steps=2))
    assert torch.get_num_threads() == before


def test_settings_are_checked():
    with pytest.raises(ValueError, match="lr must be positive"):
        Settings(lr=0)
    with pytest.raises(ValueError, match="weight_decay must be at least 0, got -1"):
        Settings(lr=1, weight_decay=-1)
    with pytest.raises(ValueError, match="radius must be at least 0, got -1"):
        Settings(lr=1, radius=-1)
    with pytest.raises(ValueError, match="radius must be a finite number, got nan"):
        Settings(lr=1, radius=math.nan)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("bsam", {"weight_decay": 1e-3}, "a prior of its own in place of weight decay: take weight_decay=0.001 out"),
        ("base", {"radius": 0.1}, "base has no radius: take radius=0.1 out"),
        ("sam+swa", {}, r"the parts of its name \(swa\), and have none"),
        ("sam", {"parts": {"swa": 0.75, "mixup": 0.2}}, r"the parts of its name \(none\), and have swa and mixup"),
    ],
)
def test_settings_that_a_method_would_not_use_are_refused(method, settings, message):
    with pytest.raises(ValueError, match=message):
        RunSpec(task="digits", method=method, seed=0, num_steps=1, settings=Settings(lr=0.1, **settings))


def test_the_base_of_a_method_with_a_prior_is_plain_sgd():
    base = build_optimizer(spec("bsam"), torch.nn.Linear(2, 2), 200).param_groups[0]
    assert (base["momentum"], base["weight_decay"]) == (0.0, 0.0)
    assert build_optimizer(spec("sam"), torch.nn.Linear(2, 2), 200).param_groups[0]["momentum"] == 0.9


def test_the_seed_decides_the_first_weights_and_the_order_of_the_batches(tmp_path):
    for seed in (0, 1):
        train(spec("base", seed=seed, steps=1, lr=1e-12), tmp_path)
    a, b = (load_file(tmp_path / f"base-seed{seed}.safetensors") for seed in (0, 1))
    assert not torch.equal(a["0.weight"], b["0.weight"])
    data = (torch.arange(100.0), torch.arange(100))
    order = [next(train_module.shuffled(data, 10, seed))[1] for seed in (0, 0, 1)]
    assert torch.equal(order[0], order[1])
    assert not torch.equal(order[0], order[2])


def test_a_run_whose_steps_are_skipped_has_diverged(tmp_path):
    record = run(tmp_path, spec("sam", radius=1e20))
    assert not record.finished
    assert "sam on digits, seed 0: step 1 was skipped" in record.result["message"]
    assert "A lower learning rate or rho usually mends it." in record.result["message"]
    assert record.result["steps"] == 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_run_whose_final_loss_is_not_finite_has_diverged(tmp_path, monkeypatch, split):
    scores = train_module.scores_of
    monkeypatch.setattr(train_module, "scores_of", lambda *a: {**scores(*a), f"{split}_loss": float("nan")})
    record = run(tmp_path, spec())
    assert not record.finished
    assert f"the {split}_loss became nan at step 4 " in record.result["message"]
    assert record.progress == []


def test_scores_on_the_way_take_at_most_half_as_long_as_the_gradients_beyond_five_of_them():
    digits = get_task("digits")
    splits = digits.splits(0)  # 1,797 images, scored at the price of 29.95 gradients of 20
    assert [train_module.num_progress(digits, splits, n) for n in (10**6, 2000, 600, 300, 40)] == [20, 20, 10, 5, 5]
    whole = dataclasses.replace(digits, batch_size=10**4)  # a gradient of all 200 images
    assert train_module.num_progress(whole, splits, 40) == train_module.num_progress(
        dataclasses.replace(digits, batch_size=200), splits, 40
    )


@pytest.mark.parametrize("steps", [7, 39, 100, 130])
def test_fewer_scores_are_some_of_the_more(tmp_path, monkeypatch, steps):
    seen = []
    for times in (20, 10, 5):
        monkeypatch.setattr(train_module, "num_progress", lambda *_, times=times: times)
        seen.append({p["step"] for p in run(tmp_path / str(times), spec("base", steps=steps)).progress})
    assert seen[2] <= seen[1] <= seen[0]
    assert [len(found) for found in seen] == [min(steps, times) for times in (20, 10, 5)]
    assert steps in seen[2]


class Noisy(torch.nn.Sequential):
    """Draws random numbers in evaluation, too, and has a batch norm that is frozen on purpose."""

    def forward(self, input):
        return super().forward(input) + 0.0 * torch.randn(())


def noisy():
    norm = torch.nn.BatchNorm1d(64)
    model = Noisy(norm, torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(32, 10))
    norm.eval()
    return model


@pytest.mark.parametrize("build", [noisy, lambda: noisy().eval()])
def test_scores_leave_nothing_behind(tmp_path, monkeypatch, build):
    monkeypatch.setitem(tasks_module._TASKS, "digits", dataclasses.replace(get_task("digits"), build_model=build))
    monkeypatch.setattr(train_module, "flatness_of", lambda *_: {})  # of a model that draws random numbers: refused
    found = []
    for place in (tmp_path / "trial", tmp_path / "whole"):
        place.mkdir()
        train(dataclasses.replace(spec(steps=40), measured=place.name == "whole"), place)
        found.append(load_file(place / "nso-seed0.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True))
    moved = found[0]["0.running_mean"].any().item()
    assert moved == (build is not noisy)  # a whole model in evaluation mode comes from a library; a part is frozen


def test_a_trial_is_scored_at_its_end_alone_and_comes_out_the_same(tmp_path, monkeypatch):
    scored, scores = [], train_module.scores_of
    monkeypatch.setattr(train_module, "scores_of", lambda *a: scored.append(0) or scores(*a))
    run_spec = spec(steps=40)
    trial = run(tmp_path / "trial", dataclasses.replace(run_spec, measured=False))
    assert len(scored) == len(trial.progress) == 1
    whole = run(tmp_path, run_spec)
    assert len(scored) == 1 + 1 + 5  # the trial; before the run, and along it
    assert len(whole.progress) == 5
    assert trial.progress == whole.progress[-1:]
    for name, value in trial.progress[-1].items():
        if name.endswith(("loss", "accuracy", "gap")):
            assert trial.result[name] == whole.result[name] == value


def refused(*_, **__):
    raise ValueError("the Hessian is not finite")


def test_a_run_whose_flatness_cannot_be_measured_has_diverged(tmp_path, monkeypatch):
    monkeypatch.setattr(flatness_module, "measure", refused)
    record = run(tmp_path, spec())
    assert not record.finished
    assert record.result["message"].endswith("flatness could not be measured: the Hessian is not finite")
    assert len(record.progress) == 5


def test_a_run_whose_flatness_is_not_finite_has_diverged(tmp_path, monkeypatch):
    def measure(*arguments, **options):
        report = flatmin.measure(*arguments, **options)
        return dataclasses.replace(report, trace=dataclasses.replace(report.trace, value=float("nan")))

    monkeypatch.setattr(flatness_module, "measure", measure)
    record = run(tmp_path, spec())
    assert record.result["message"].endswith("flatness could not be measured: the trace is nan")
