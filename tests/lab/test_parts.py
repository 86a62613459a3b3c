"""Methods joined with label smoothing, mixup, distances and averages, by name."""

import dataclasses
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import SGD

import flatmin
import flatmin.lab.tasks as tasks_module
import flatmin.lab.train as train_module
from flatmin.lab.compare import Compare
from flatmin.lab.parts import PARTS, Training, settings_of, split_name
from flatmin.lab.records import read_run
from flatmin.lab.tasks import get_task
from flatmin.lab.train import RunSpec, train


def spec(name, **changes):
    settings = settings_of(get_task("digits"), name)
    return RunSpec(task="digits", method=name, seed=0, num_steps=30, settings=settings, **changes)


def run(path, name):
    path.mkdir(exist_ok=True)
    train(spec(name), path)
    return read_run(path / f"{name}-seed0.jsonl"), load_file(path / f"{name}-seed0.safetensors")


def surroundings(model, parts, criterion=None, **changes):
    sizes = {"num_steps": 40, "epoch": 10, "num_classes": 3, **changes}
    return Training(model, criterion or nn.CrossEntropyLoss(), parts, **sizes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sam+swaa", r"unknown part 'swaa'. Did you mean 'swa'\?"),
        ("samm+swa", r"unknown method 'samm'. Did you mean 'sam'\?"),
        ("sam+swa+swa", "names a part twice"),
        ("sam+swa+ema", "has two averages: name one of swa, tail-average, ema"),
        ("looksam+swa", "no settings for looksam"),
    ],
)
def test_names_that_mean_nothing(name, message):
    with pytest.raises(ValueError, match=message):
        Compare(methods=("base", name)).specs()


def test_where_settings_come_from_is_a_command_that_works(monkeypatch):
    monkeypatch.setitem(tasks_module._TASKS, "digits", dataclasses.replace(get_task("digits"), settings={}))
    for names, all_names in ((("base",), "base"), (("sam", "nso+swa"), "base sam nso+swa")):
        command = re.escape(f"flatmin tune --task digits --methods {all_names}, and")
        with pytest.raises(ValueError, match=f"no settings for {re.escape(', '.join(names))}. .*{command}"):
            Compare(methods=names).specs()


def test_a_part_has_its_usual_strength_beside_the_settings_of_the_rule():
    settings = settings_of(get_task("digits"), "sam+mixup+swa")
    assert settings.parts == {"mixup": 0.2, "swa": 0.75}
    assert settings.radius == get_task("digits").settings["sam"].radius


@pytest.mark.parametrize("name", [f"nso+{part}" for part in PARTS] + ["base+mixup+swa+distance-penalty"])
def test_every_part_trains_and_changes_the_numbers(tmp_path, name, monkeypatch):
    number = {"value": 1.0, "stderr": 0.1}  # most of the time of a run, and not what is tested
    flatness = {"flatness": {"trace": {**number, "per_layer": {}}, "top_eigenvalue": number}}
    monkeypatch.setattr(train_module, "_flatness", lambda *_: flatness)
    monkeypatch.setitem(PARTS, "distance-projection", (0.1, "small enough for a short run"))
    record, weights = run(tmp_path, name)
    assert record.result["status"] == "finished"
    assert record.header["spec"]["settings"]["parts"] == split_name(name)[1]
    _, plain = run(tmp_path, name.split("+")[0])
    assert any(not torch.equal(weights[key], plain[key]) for key in weights)
    # The scores and the weights are of the same model, the average where there is one.
    model, splits = get_task("digits").build_model(), get_task("digits").load(0)
    model.load_state_dict(weights)
    loss = nn.functional.cross_entropy(model(splits.test[0]), splits.test[1])
    assert float(loss.detach()) == pytest.approx(record.result["test_loss"], rel=1e-6)


def test_a_run_without_parts_is_recorded_as_before(tmp_path):
    record, _ = run(tmp_path, "sam")
    assert set(record.header["spec"]["settings"]) == {"lr", "weight_decay", "radius"}


def test_label_smoothing_is_torchs_and_the_scores_are_not_smoothed():
    model, batch = nn.Linear(4, 3), (torch.randn(8, 4), torch.randint(3, (8,)))
    criterion = nn.CrossEntropyLoss()
    loss = surroundings(model, {"label-smoothing": 0.3}, criterion).evaluation(None)(model, batch)
    wanted = nn.functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.3)
    assert torch.equal(loss, wanted)
    assert criterion.label_smoothing == 0.0
    with pytest.raises(ValueError, match="label smoothing needs a cross-entropy, and the loss is MSELoss"):
        surroundings(model, {"label-smoothing": 0.3}, nn.MSELoss())


def test_the_penalty_is_in_the_loss_and_the_ball_around_the_start():
    model, batch = nn.Linear(4, 3), (torch.randn(8, 4), torch.randint(3, (8,)))
    training = surroundings(model, {"distance-penalty": 2.0, "distance-projection": 0.1})
    with torch.no_grad():
        start = model.bias.clone()
        model.bias.add_(torch.tensor([1.0, 2.0, 2.0]))
    moved = nn.functional.cross_entropy(model(batch[0]), batch[1])
    torch.testing.assert_close(training.evaluation(None)(model, batch), moved + 2.0 * 9)
    training.after_step()
    torch.testing.assert_close((model.bias.detach() - start).norm(), torch.tensor(0.1))


@pytest.mark.parametrize(("parts", "chosen"), [({"swa": 0.5}, [30, 40]), ({"tail-average": 0.75}, list(range(31, 41)))])
def test_what_is_averaged(parts, chosen):
    model = nn.Linear(1, 1)
    training = surroundings(model, parts)
    seen = {}
    for step in range(1, 41):
        with torch.no_grad():
            model.weight.fill_(float(step * step))
        seen[step] = float(step * step)
        training.after_step()
    with training.worn():
        assert model.weight.item() == pytest.approx(sum(seen[t] for t in chosen) / len(chosen))
    assert model.weight.item() == 1600.0


def test_progress_has_the_statistics_of_the_average(tmp_path, monkeypatch):
    """Those of batch norm: without them the averager warns, and the last progress is not the result."""
    task = get_task("digits")

    def build():
        return nn.Sequential(nn.BatchNorm1d(task.load(0).train[0].shape[1]), task.build_model())

    monkeypatch.setitem(tasks_module._TASKS, "digits", dataclasses.replace(task, build_model=build))
    record, _ = run(tmp_path, "base+tail-average")
    assert record.progress[-1]["train_loss"] == record.result["train_loss"]


def test_an_average_keeps_the_learning_rate():
    model = nn.Linear(1, 1)
    rates = {}
    for parts in ({}, {"swa": 0.5}):
        optimizer = flatmin.SAM(SGD(model.parameters(), lr=0.5))
        scheduler = surroundings(model, parts).schedule(optimizer, 40)
        for _ in optimizer.probes():
            model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        for _ in range(40):
            scheduler.step()
        rates[bool(parts)] = optimizer.param_groups[0]["lr"]
    assert rates[True] == 0.5
    assert rates[False] == pytest.approx(0.0, abs=1e-12)


class Columns(nn.Module):
    def forward(self, x):
        return x @ self.w

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.eye(3))


@pytest.mark.parametrize(
    ("criterion", "targets", "message"),
    [
        (nn.MSELoss(), torch.zeros(8, 3), None),
        (nn.CrossEntropyLoss(), torch.zeros(8, dtype=torch.long), None),
        (nn.CrossEntropyLoss(weight=torch.tensor([10.0, 1.0, 1.0])), torch.arange(8) % 3, "class weights"),
        (nn.CrossEntropyLoss(ignore_index=2), torch.arange(8) % 3, "labels that it ignores"),
        (nn.KLDivLoss(reduction="batchmean"), torch.full((8, 3), 0.5), "plain mean over samples"),
    ],
)
def test_a_method_that_chooses_samples_has_the_loss_of_the_others_or_none(criterion, targets, message):
    torch.manual_seed(0)
    model, x = Columns(), torch.randn(8, 3)
    optimizer = flatmin.ESAM(SGD(model.parameters(), lr=0.1), rho=0.05)
    evaluate = Training(model, criterion, {}, num_steps=1, epoch=1, num_classes=None).evaluation(optimizer)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append(evaluate(model, (x, targets)))
        seen[-1].backward()
        return seen[-1]

    if message:
        with pytest.raises(ValueError, match=message):
            optimizer.step(closure)
        return
    optimizer.step(closure)
    assert seen[0].item() == pytest.approx(criterion(x, targets).item())
