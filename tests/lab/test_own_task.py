"""A task of one's own: targets that are no labels, and a task that is edited between two commands."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import flatmin.lab.pool as pool
import flatmin.lab.tasks as tasks_module
from flatmin.lab.compare import Compare
from flatmin.lab.fingerprint import fingerprint
from flatmin.lab.records import read_run
from flatmin.lab.tasks import Settings, Splits, Task
from flatmin.lab.train import RunSpec, build_optimizer
from flatmin.lab.tuning.tune import Tune


def splits(seed: int) -> Splits:
    train, validation = product(2 * seed), product(2 * seed + 1)
    return Splits(train, validation, product(1_000_000))


def product(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :1] * x[:, 1:2]


def network(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))


def adamw(model: nn.Module, settings: Settings, **options) -> AdamW:
    return AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, **options)


OWN = Task(
    name="own",
    summary="a product",
    source="made here",
    licence="none",
    load=splits,
    build_model=network,
    criterion=nn.MSELoss(),
    batch_size=10,
    num_gradients=60,
    settings={"base": Settings(lr=0.05), "sam": Settings(lr=0.05, radius=0.05)},
    tuning="guessed",
)


@pytest.fixture
def own(monkeypatch):
    def change(**changes):
        monkeypatch.setitem(tasks_module._TASKS, "own", dataclasses.replace(OWN, **changes))

    change()
    return change


def compare(tmp_path, **options):
    options = {"methods": ("base", "sam"), "num_seeds": 3, "jobs": 1, **options}
    return Compare(task="own", out=tmp_path, **options)


def test_where_targets_are_no_labels_the_comparison_is_by_test_loss(own, tmp_path, capsys):
    report = compare(tmp_path).run()
    assert report == tmp_path / "own" / "report.html"  # the name is the task's
    summary = json.loads((tmp_path / "own" / "summary.json").read_text())
    for entry in summary["methods"].values():
        assert "test_accuracy" not in entry["columns"]
        assert entry["columns"]["test_loss"]["mean"] > 0
    shown, html = capsys.readouterr().out, report.read_text()
    assert "accuracy" not in shown.lower()
    assert "accuracy" not in html.lower()
    assert "test loss" in shown
    change = (
        summary["versus"]["test_loss"]["sam"]["difference"] / summary["methods"]["base"]["columns"]["test_loss"]["mean"]
    )
    assert f"sam against base: test loss {100 * change:+.1f}%" in html
    assert "Test loss against trace" in html
    assert "training loss, seconds, gradients and steps are\n  never marked" in html
    assert "guessed." in html


def test_settings_are_tuned_by_loss_without_labels(own, tmp_path, capsys):
    Tune(task="own", methods=("base", "sam"), lr=(0.01, 0.05), weight_decay=(0.0,), rho=(0.05,), num_seeds=1,
         num_gradients=20, out=tmp_path, jobs=1).run()  # fmt: skip
    tuning = json.loads((tmp_path / "tuning.json").read_text())
    assert all("validation_accuracy" not in trial for trials in tuning["trials"].values() for trial in trials)
    best, shown = tuning["best"]["sam"], capsys.readouterr().out
    printed = next(line for line in shown.splitlines() if '"sam"' in line)
    assert printed.strip().startswith(f'"sam": Settings(lr={best["lr"]}, radius=0.05),')
    side = "largest" if best["lr"] == 0.05 else "smallest"
    assert f"{best['lr']:g} is the {side} --lr that was tried" in shown


@pytest.mark.parametrize("part", ["mixup", "label-smoothing"])
def test_what_needs_labels_says_so(own, tmp_path, part):
    with pytest.raises(ValueError, match=r"labels|cross-entropy"):
        compare(tmp_path, methods=("base", f"base+{part}")).run()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"build_model": lambda: network(9)}, "model"),
        ({"build_model": lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))}, "model"),
        ({"criterion": nn.HuberLoss()}, "loss"),
        ({"criterion": nn.SmoothL1Loss(beta=2.0)}, "loss"),
        ({"load": lambda seed: splits(seed + 1)}, "data"),
        ({"batch_size": 5}, "batch size"),
        ({"batch_size": 5, "criterion": nn.L1Loss()}, "loss and batch size"),
        ({"build_base": adamw}, "base"),
    ],
)
def test_runs_of_a_task_that_was_edited_are_not_mixed_with_new_ones(own, tmp_path, monkeypatch, changes, what):
    compare(tmp_path, num_seeds=1).run()
    own(**changes)
    monkeypatch.setattr(pool, "train", lambda *_: pytest.fail("trained"))
    for num_seeds in (1, 2):
        with pytest.raises(ValueError, match=rf"of the task own with another {what}\. It is left as it is"):
            compare(tmp_path, num_seeds=num_seeds).run()


def test_a_task_names_its_base(own, tmp_path):
    settings = {
        "base": Settings(lr=0.01, weight_decay=0.1),
        "sam": Settings(lr=0.02),
        "bsam": Settings(lr=0.1),
    }
    own(build_base=partial(adamw, betas=(0.9, 0.95)), settings=settings)
    for name, chosen in settings.items():
        spec = RunSpec(task="own", method=name, seed=0, num_steps=1, settings=chosen)
        optimizer = build_optimizer(spec, network(), 20)
        base = getattr(optimizer, "base", optimizer)
        assert type(base) is (SGD if name == "bsam" else AdamW)
        assert (base.defaults["lr"], base.defaults["weight_decay"]) == (chosen.lr, chosen.weight_decay)
    html = compare(tmp_path, methods=("base", "sam", "bsam"), num_seeds=1).run().read_text()
    for name, base in (("base", "AdamW, betas (0.9, 0.95)"), ("sam", "AdamW, betas (0.9, 0.95)"), ("bsam", "SGD")):
        assert f"<tr><td>{name}</td><td>{base}</td>" in html
    losses = {method: record_of(tmp_path, method).result["test_loss"] for method in ("base", "sam")}
    own(settings=settings)
    compare(tmp_path / "sgd", methods=("base", "sam"), num_seeds=1).run()
    assert all(record_of(tmp_path / "sgd", method).result["test_loss"] != losses[method] for method in losses)


def record_of(path, method):
    return read_run(path / "own" / "records" / f"{method}-seed0.jsonl")


@pytest.mark.parametrize(
    ("build_base", "message"),
    [
        (
            lambda model, _: AdamW(model.parameters(), weight_decay=0.0),
            "made AdamW with lr=0.001, where the settings of",
        ),
        (lambda model, s: AdamW(model.parameters(), lr=s.lr), "made AdamW with weight_decay=0.01, where .* sam say 0:"),
        (
            lambda model, s: SGD([{"params": list(model.parameters()), "lr": 7.0}], lr=s.lr),
            "made SGD with lr=7, where the settings of",
        ),
    ],
)
def test_a_base_that_does_not_take_the_settings_is_refused(own, build_base, message):
    own(build_base=build_base)
    spec = RunSpec(task="own", method="sam", seed=0, num_steps=1, settings=OWN.settings["sam"])
    with pytest.raises(ValueError, match=message):
        build_optimizer(spec, network(), 20)


def test_a_base_may_leave_biases_without_weight_decay(own):
    def groups(model, settings):
        matrices, others = ([p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
        decayed = {"params": matrices, "weight_decay": settings.weight_decay}
        return SGD([decayed, {"params": others}], lr=settings.lr)

    own(build_base=groups)
    spec = RunSpec(task="own", method="sam", seed=0, num_steps=1, settings=Settings(lr=0.1, weight_decay=0.01))
    optimizer = build_optimizer(spec, network(), 20)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


@pytest.mark.parametrize("base", [SGD, AdamW])
def test_records_from_before_a_task_named_its_base_are_of_sgd(own, tmp_path, base):
    compare(tmp_path, num_seeds=1, methods=("base",)).run()
    path = tmp_path / "own" / "records" / "base-seed0.jsonl"
    first, *rest = path.read_text().splitlines()
    header = json.loads(first)
    assert header["task"].pop("base") == "SGD, momentum 0.9"
    path.write_text("\n".join([json.dumps(header), *rest]) + "\n")
    if base is AdamW:
        own(build_base=adamw)
        with pytest.raises(ValueError, match="of the task own with another base"):
            compare(tmp_path, num_seeds=1, methods=("base",)).run()
    else:
        html = compare(tmp_path, num_seeds=1, methods=("base",)).run().read_text()
        assert "<tr><td>base</td><td>SGD, momentum 0.9</td>" in html


def test_what_changes_no_number_may_be_edited(own, tmp_path, monkeypatch):
    compare(tmp_path, num_seeds=1).run()
    own(summary="another sentence", tuning="another rule")
    monkeypatch.setattr(pool, "train", lambda *_: pytest.fail("trained"))
    assert "another sentence" in compare(tmp_path, num_seeds=1).run().read_text()


def test_records_from_before_there_were_digests_are_taken(own, tmp_path):
    compare(tmp_path, num_seeds=1).run()
    for path in (tmp_path / "own" / "records").glob("*.jsonl"):
        first, *rest = path.read_text().splitlines()
        header = json.loads(first)
        del header["task"]
        path.write_text("\n".join([json.dumps(header), *rest]) + "\n")
    compare(tmp_path, num_seeds=1).run()


def test_a_digest_leaves_the_random_state_and_does_not_depend_on_it():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = fingerprint(OWN, splits(0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert fingerprint(OWN, splits(0)) == first
    assert fingerprint(OWN, splits(1)) != first


def test_a_task_without_settings_says_how_to_find_some(own, tmp_path):
    own(settings={})
    with pytest.raises(ValueError, match=r"It has none yet. Find some with flatmin tune --task own --methods base sam"):
        compare(tmp_path, methods=("sam",)).run()


def test_the_header_of_a_run_has_the_digests(own, tmp_path):
    compare(tmp_path, num_seeds=1, methods=("base",)).run()
    header = read_run(tmp_path / "own" / "records" / "base-seed0.jsonl").header
    assert header["task"] == json.loads(json.dumps(fingerprint(OWN, splits(0))))
