"""`flatmin suggest`: how strongly a radius acts, against closed forms; where it is looked for; and what is printed."""

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

import flatmin
import flatmin.lab.pool as pool
import flatmin.lab.walk as walking
from flatmin.lab.cli import main
from flatmin.lab.costs import costs
from flatmin.lab.script import forget
from flatmin.lab.strength import Strengths, radius_for
from flatmin.lab.suggest import MOVED, RISES, Suggest
from flatmin.lab.tasks import Settings, get_task
from flatmin.lab.train import RunSpec, build_optimizer
from flatmin.lab.tune import Tune
from flatmin.lab.walk import walk


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    forget()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


class Bowl(nn.Module):
    """f(w) = c + w' H w / 2 with a diagonal H, whatever the inputs."""

    def __init__(self, curvature, weights):
        super().__init__()
        self.w, self.h = nn.Parameter(torch.tensor(weights)), torch.tensor(curvature)

    def forward(self, x):
        return (1.0 + 0.5 * (self.h * self.w**2).sum()).expand(len(x))


class Mean(nn.Module):
    def forward(self, outputs, _targets):
        return outputs.mean()


BATCHES = [(torch.zeros(2, 1), torch.zeros(2))] * 3


def strengths(model, rule, *, mirrored):
    return Strengths(model, Mean(), BATCHES, lambda r: rule(SGD(model.parameters(), lr=1.0), r), mirrored=mirrored)


def test_an_ascent_against_the_closed_form():
    model = Bowl([1.0, 4.0], [3.0, 1.0])
    before = model.w.detach().clone()
    found = strengths(model, lambda base, r: flatmin.SAM(base, rho=r), mirrored=False).at(0.5)
    g = torch.tensor([3.0, 4.0])  # |g| = 5
    loss, there = 1 + (9 + 4) / 2, before + 0.5 * g / 5
    rise = 0.5 * (there[0] ** 2 + 4 * there[1] ** 2).item() + 1 - loss
    assert found.moved == pytest.approx(0.5 / math.sqrt(10), rel=1e-5)
    assert found.rise == pytest.approx(rise / loss, rel=1e-5)
    assert torch.equal(model.w, before)
    assert model.training


def test_noise_rises_by_the_trace_without_what_is_linear():
    n, sigma = 20_000, 0.1
    model = Bowl([2.0] * n, [0.05] * n)
    for rule in (lambda base, r: flatmin.NSO(base, sigma=r), lambda base, r: flatmin.NSO(base, r, antithetic=False)):
        found = strengths(model, rule, mirrored=True).at(sigma)
        assert found.moved == pytest.approx(sigma * math.sqrt(n) / (0.05 * math.sqrt(n)), rel=0.02)
        rise, loss = 0.5 * sigma**2 * 2.0 * n, 1 + 0.5 * 2.0 * 0.05**2 * n
        assert found.rise == pytest.approx(rise / loss, rel=0.02)  # 3 draws: a standard error of 0.6%


def test_a_loss_that_overflows_has_an_infinite_rise():
    model = Bowl([1.0], [1.0])
    model.h = torch.tensor([1e30])
    assert strengths(model, lambda base, r: flatmin.SAM(base, rho=r), mirrored=False).at(1e10).rise == math.inf


@pytest.mark.parametrize("name", [n for n, m in flatmin.methods().items() if m.radius_name])
def test_every_method_can_be_looked_at_and_moves_more_for_a_larger_radius(name):
    task = get_task("diabetes")
    splits = task.splits(0)
    model = task.build_model()
    before = [p.detach().clone() for p in model.parameters()]

    def build(radius):
        settings = Settings(lr=0.1, radius=radius)
        spec = RunSpec(task="diabetes", method=name, seed=0, num_steps=1, settings=settings)
        return build_optimizer(spec, model, len(splits.train[1]))

    inputs, targets = splits.train
    batches = list(zip(inputs.split(20)[:6], targets.split(20)[:6], strict=True))
    mirrored = flatmin.methods()[name].radius_name == "sigma"
    looked = Strengths(model, nn.MSELoss(), batches, build, mirrored=mirrored)
    small, large = looked.at(0.01), looked.at(0.04)
    assert large.moved > small.moved > 0
    has_noise_too = name in ("random-sam", "bsam")  # which moves the weights further than the radius
    assert (large.rise / small.rise if has_noise_too else large.moved / small.moved) > 1.5
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("start", [1e-4, 1.0, 1e3])
def test_a_radius_is_found_wherever_the_search_begins(power, start):
    asked = []

    def value(radius):
        asked.append(radius)
        return 3.0 * radius**power

    found = radius_for(0.02, value, start)
    assert 3.0 * found**power == pytest.approx(0.02, rel=0.11)
    assert len(set(asked)) < 20


def test_a_radius_that_is_not_there_is_none():
    assert radius_for(1.0, lambda r: 0.5, 1.0) is None
    assert radius_for(1.0, lambda r: 2.0, 1.0) is None
    assert radius_for(1.0, lambda r: math.inf if r > 1e-3 else -1.0, 1.0) == pytest.approx(1e-3, rel=0.1)


def test_the_walk_goes_downhill_in_both_directions(monkeypatch):
    trained = []

    def train(points, *_):
        trained.extend(points)
        return {point: bent(*point) for point in points}

    def bent(lr, decay):  # lowest at lr 0.3 and decay 0.1, and they act together
        x, y = math.log10(lr / 0.3), math.log10(max(decay, 1e-9) / 0.1)
        return x * x + y * y + x * y

    monkeypatch.setattr(walking, "_train", train)
    unused: Any = None
    tried = walk((0.03, 1e-3), unused, range(1), Path(), 1)
    best = min(tried, key=lambda point: tried[point])
    assert best == (0.3, 0.1)
    assert len(trained) == len(set(trained)) == len(tried) < 20
    assert {decay for _, decay in walk((0.03, 0.0), unused, range(1), Path(), 1)} == {0.0}


def suggest(*more):
    options = [
        "--task",
        "diabetes",
        "--num-gradients",
        "40",
        "--jobs",
        "1",
        "--methods",
        "base",
        "sam",
        "nso",
        "sam+ema",
    ]
    assert main(["suggest", *options, *more]) == 0
    return json.loads(Path("runs/suggest-diabetes/suggest.json").read_text())


def test_what_is_suggested_can_be_tuned_and_is_not_done_again(monkeypatch, capsys):
    found = suggest()
    printed = capsys.readouterr().out
    assert f"\n{found['command']}\n" in printed
    assert "On 1 process: about" in printed
    for name, targets, what in (("sam", MOVED, "moved"), ("nso", RISES, "rise"), ("sam+ema", MOVED, "moved")):
        got = [strength[what] for strength in found["radii"][name]]
        assert got == pytest.approx(targets, rel=0.2)
    losses = {(p["lr"], p["weight_decay"]): p["validation_loss"] for p in found["control"]}
    assert min(losses, key=lambda point: losses[point]) == (found["best"]["lr"], found["best"]["weight_decay"])

    given = shlex.split(found["command"])
    assert given[:2] == ["flatmin", "tune"]
    tuned = {}
    monkeypatch.setattr(Tune, "_run", lambda self: tuned.update({m: self._settings(m, 0.0) for m in self.methods}))
    assert main(given[1:]) == 0
    assert {len(settings) for settings in tuned.values()} == {16}
    assert {s.radius for s in tuned["sam"]} == {s["radius"] for s in found["radii"]["sam"]}
    assert found["best"]["weight_decay"] in {s.weight_decay for s in tuned["base"]}

    monkeypatch.setattr(pool, "train", lambda *_: pytest.fail("trained again"))
    assert suggest()["radii"] == found["radii"]


def test_a_method_whose_radius_does_not_show_keeps_the_grid_of_tune(capsys):
    options = ["--task", "diabetes", "--num-gradients", "40", "--jobs", "1", "--methods", "base", "random-sam"]
    assert main(["suggest", *options]) == 0
    assert "random-sam: no rho does so much and no more; tune takes its own --rho." in capsys.readouterr().out
    found = json.loads(Path("runs/suggest-diabetes/suggest.json").read_text())
    assert found["radii"] == {"random-sam": []}
    assert "--radii" not in found["command"]


def test_seconds_add_up_and_the_model_stays():
    task = get_task("diabetes")
    splits, model = task.splits(0), task.build_model()
    before = [p.detach().clone() for p in model.parameters()]

    def build(name, model):
        spec = RunSpec(task="diabetes", method=name, seed=0, num_steps=1, settings=Settings(lr=0.1))
        return build_optimizer(spec, model, len(splits.train[1]))

    names = ("base", "sam", "looksam")
    made = {name: (lambda model, name=name: build(name, model)) for name in names}
    price = costs(task, splits, model, made, num_gradients=600, num_seeds=10)
    for name, steps in zip(names, (600, 300, 500), strict=True):
        assert price[name].run == pytest.approx(steps * price[name].step)
        assert price[name].tuning == pytest.approx(80 * price[name].run)
        assert price[name].comparison > 10 * price[name].run > 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert np.isfinite(price["base"].step)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("sam",)}, "the first of --methods is the control and has no radius, got sam"),
        ({"methods": ("base", "base")}, "none twice"),
        ({"methods": ("base", "sem")}, "unknown method 'sem'"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"num_seeds": 0}, "--num-seeds must be at least 1"),
        ({"num_gradients": 1}, "does not pay for one step of sam"),
    ],
)
def test_all_is_checked_before_anything_is_trained(options, message, monkeypatch):
    monkeypatch.setattr(pool, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        Suggest(**{"methods": ("base", "sam"), **options}).run()
    assert not Path("runs").exists()


def test_a_control_that_diverges_everywhere_is_said(capsys):
    assert main(["suggest", "--task", "diabetes", "--lr", "1e9", "--num-gradients", "20", "--jobs", "1"]) == 2
    assert "base diverged at all learning rates near 1e+09" in capsys.readouterr().err
