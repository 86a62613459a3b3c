"""A task that would give wrong numbers silently is refused before anything is trained, by name and with the mend."""

import dataclasses
import warnings

import pytest
import torch
from torch import nn

import flatmin.lab.tasks as tasks_module
from flatmin.lab.compare import Compare
from flatmin.lab.launch import Train
from flatmin.lab.tasks import Splits, Task, get_task, tasks
from flatmin.lab.tasks.check import check_task
from flatmin.lab.train import scores_of
from flatmin.lab.tuning.tune import Tune

SAME = nn.Linear(3, 2)


def splits(seed, *, targets=None, change=None):
    """Train, validation and test of 20 rows; the seed chooses the first two."""
    parts = []
    for number in (2 * seed, 2 * seed + 1, 10**6):
        x = torch.randn(20, 3, generator=torch.Generator().manual_seed(number))
        parts.append((x, (x[:, 0] > 0).long() if targets is None else targets(x)))
    return change(Splits(*parts)) if change else Splits(*parts)


def task(**changes):
    given = {
        "name": "own",
        "summary": "a half space",
        "load": splits,
        "build_model": lambda: nn.Linear(3, 2),
        "criterion": nn.CrossEntropyLoss(),
        "batch_size": 10,
        "num_gradients": 20,
    }
    return Task(**given | changes)


def with_targets(targets, **changes):
    return task(load=lambda seed: splits(seed, targets=targets), **changes)


def with_data(change, **changes):
    return task(load=lambda seed: splits(seed, change=change), **changes)


def not_finite(parts):
    parts.test[0][3, 1] = float("nan")
    return parts


def value(x):
    return x[:, 0]


class Broadcast(nn.Module):
    def forward(self, outputs, targets):
        return ((outputs - targets) ** 2).mean()


class Ignoring(nn.Module):
    """A loss that leaves out 255 without saying so."""

    def forward(self, outputs, targets):
        return outputs.square().mean()


REFUSED = {
    "chance": (
        task(load=lambda seed: splits(int(torch.randint(1000, ())))),
        r"load\(0\) gave other data when it was called again",
    ),
    "test by seed": (
        task(load=lambda seed: Splits(*splits(seed)[:2], splits(seed + 50).train)),
        r"the test sets of load\(0\) and load\(1\) differ",
    ),
    "nan": (with_data(not_finite), r"test inputs of load\(0\) are not all finite"),
    "one model": (task(build_model=lambda: SAME), "returned the same parameters twice"),
    "no module": (task(build_model=lambda: torch.zeros), "build_model must return an nn.Module, got builtin_function"),
    "function": (task(criterion=nn.functional.cross_entropy), "criterion must be an nn.Module, got function"),
    "sum": (task(criterion=nn.CrossEntropyLoss(reduction="sum")), "it must be their mean, not their sum"),
    "per sample": (
        task(criterion=nn.CrossEntropyLoss(reduction="none")),
        r"must be one number, .* got \(20,\) float32",
    ),
    "float64": (
        with_data(lambda parts: Splits(*((x.double(), y) for x, y in parts))),
        r"model or loss fail on train \(inputs \(20, 3\) float64, targets \(20,\) int64\): RuntimeError",
    ),
    "int32": (with_targets(lambda x: value(x).int()), r"targets \(20,\) int32\): "),
    "label out of range": (with_targets(lambda x: torch.full((20,), 5)), "IndexError: Target 5 is out of bounds"),
    "broadcast": (
        with_targets(value, build_model=lambda: nn.Linear(3, 1), criterion=nn.MSELoss()),
        r"outputs \(20, 1\) and targets \(20,\) are of other shapes.*unsqueeze\(1\)",
    ),
    "broadcast, unwarned": (
        with_targets(value, build_model=lambda: nn.Linear(3, 1), criterion=Broadcast()),
        r"outputs \(20, 1\) and targets \(20,\) are of other shapes",
    ),
    "labels in a column": (
        with_targets(
            lambda x: value(x).long().unsqueeze(1), build_model=lambda: nn.Linear(3, 1), criterion=Broadcast()
        ),
        r"integer targets are class labels.* got \(20, 1\) int64 for \(20, 1\) float32",
    ),
    "labels of one class": (
        with_targets(lambda x: value(x).long(), build_model=lambda: nn.Linear(3, 1), criterion=Broadcast()),
        r"integer targets are class labels.* got \(20,\) int64 for \(20, 1\) float32",
    ),
    "batch of one": (
        task(build_model=lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), batch_size=19),
        r"fail on a batch of 1 training samples .*ValueError: Expected more than 1 value per channel",
    ),
    "batches of one": (
        task(build_model=lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), batch_size=1),
        "fail on a batch of 1 training samples",
    ),
    "lazy": (task(build_model=lambda: nn.LazyLinear(2)), "a model with lazy layers"),
    "two values for one target": (
        with_targets(lambda x: x[:, :1], build_model=lambda: nn.Linear(3, 2), criterion=nn.MSELoss()),
        r"outputs \(20, 2\) and targets \(20, 1\) are of other shapes",
    ),
    "loss not finite": (
        with_targets(lambda x: x[:, :2].abs() * 1e38, criterion=nn.MSELoss()),
        "the loss of train is inf before training",
    ),
    "label out of range, loss of its own": (
        with_targets(lambda x: torch.full((20,), 255), criterion=Ignoring()),
        r"there are labels outside of 0 .. 1, .* that are not the loss's ignore_index",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_would_mislead_is_refused(name):
    wrong, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"^task own: .*{message}"):
        check_task(wrong)


class Dice(nn.Module):
    """A loss of the whole batch, in its own shape."""

    def forward(self, outputs, targets):
        return 1 - (outputs[:, :1].sigmoid() * targets).mean()


class TwoHeads(nn.Module):
    """Outputs that are no tensor."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])

    def forward(self, x):
        return tuple(head(x) for head in self.heads)


class FirstHead(nn.Module):
    def forward(self, outputs, targets):
        return (outputs[0] - targets).square().mean() + 0.1 * outputs[1].square().mean()


class Images(nn.Module):
    def forward(self, x):
        return x.view(-1, 3, 2, 2)


class Pixels(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))[:, :2]


class Averaging(nn.CrossEntropyLoss):
    """A loss with a state."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, input, target):
        self.seen += 1
        return super().forward(input, target)


@pytest.mark.parametrize(
    "right",
    [
        task(),
        task(criterion=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0]), label_smoothing=0.1)),
        task(build_model=lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))),
        task(batch_size=19),  # nothing here needs two samples
        with_targets(lambda x: torch.where(x[:, 0] > 1, -100, 1)),
        with_targets(lambda x: x[:, :1], build_model=TwoHeads, criterion=FirstHead()),
        task(build_model=lambda: nn.Sequential(nn.Linear(3, 12), Images(), nn.BatchNorm2d(3), Pixels()), batch_size=19),
        task(criterion=Averaging()),
        with_targets(value, build_model=lambda: nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), criterion=nn.MSELoss()),
        with_targets(lambda x: (x[:, :2] > 0).float(), criterion=nn.BCEWithLogitsLoss()),
        with_targets(lambda x: x[:, :1], criterion=Dice()),
        with_targets(lambda x: x[:, :1].expand(20, 2), criterion=nn.MSELoss()),
        with_targets(
            lambda x: (x > 0).long(), build_model=lambda: nn.Sequential(nn.Linear(3, 12), nn.Unflatten(1, (4, 3)))
        ),
    ],
)
def test_what_is_right_is_not(right):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_task(right)


@pytest.mark.parametrize("name", [name for name in tasks() if not name.startswith(("bad", "solar"))])
def test_those_of_the_library_are_right_and_the_random_state_stays(name):
    before = torch.get_rng_state()
    check_task(get_task(name))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_with_a_state_is_left_as_it_was():
    given = task(criterion=Averaging())
    check_task(given)
    assert given.criterion.seen == 0  # type: ignore[union-attr]


def test_runs_do_not_share_the_state_of_a_loss(tmp_path, monkeypatch):
    given = task(criterion=Averaging(), settings=SETTINGS)
    monkeypatch.setitem(tasks_module._TASKS, "own", given)
    Compare(task="own", methods=("base",), num_seeds=1, jobs=1, out=tmp_path).run()
    assert given.criterion.seen == 0  # type: ignore[union-attr]


def test_inputs_that_are_in_two_parts_are_said():
    def leaks(parts):
        parts.test[0][:7] = parts.train[0][:7]
        return parts

    leaking = task(load=lambda seed: splits(0, change=leaks))
    with pytest.warns(UserWarning, match="task own: 7 of 20 test inputs are also train inputs"):
        check_task(leaking)
    same = task(load=lambda seed: Splits(splits(seed).train, splits(seed).test, splits(seed).test))
    with pytest.warns(UserWarning, match="20 of 20 test inputs are also validation inputs"):
        check_task(same)
    trained = task(load=lambda seed: Splits(splits(seed).train, splits(seed).train, splits(seed).test))
    with pytest.warns(UserWarning, match="20 of 20 validation inputs are also train inputs"):
        check_task(trained)


def test_every_command_looks_before_it_trains(tmp_path, monkeypatch):
    monkeypatch.setitem(tasks_module._TASKS, "own", dataclasses.replace(REFUSED["sum"][0], settings=SETTINGS))
    for command in (
        Compare(task="own", methods=("base",), out=tmp_path / "c"),
        Train(task="own", method="base", out=tmp_path / "c"),
        Tune(task="own", methods=("base",), out=tmp_path / "c"),
    ):
        with pytest.raises(ValueError, match="not their sum"):
            command.run()
    assert not (tmp_path / "c").exists()


SETTINGS = get_task("digits").settings


def test_labels_that_the_loss_ignores_do_not_count_in_the_accuracy():
    outputs, labels = torch.eye(4)[:, :3], torch.tensor([0, 1, -100, 2])
    for criterion, targets in (
        (nn.CrossEntropyLoss(), labels),
        (nn.CrossEntropyLoss(ignore_index=2), labels.abs() % 3),
    ):
        scores = scores_of(nn.Identity(), criterion, {"test": (outputs, targets)})
        assert scores["test_accuracy"] == pytest.approx(2 / 3)


def test_ignored_labels_are_not_mixed(tmp_path, monkeypatch):
    some = with_targets(lambda x: torch.where(x[:, 0] > 1, -100, 1), settings=SETTINGS)
    monkeypatch.setitem(tasks_module._TASKS, "own", some)
    with pytest.raises(ValueError, match="mixup mixes labels, and some of task own are ignored by the loss"):
        Compare(task="own", methods=("base+mixup",), num_seeds=1, jobs=1, out=tmp_path).run()
