"""`flatmin suggest`: how strongly a radius acts, against closed forms; where it is looked for; and what is printed."""

import json
import math
import shlex
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import flatmin
import flatmin.lab.pool as pool
import flatmin.lab.tuning.costs as costs_module
import flatmin.lab.tuning.suggest as suggest_module
from flatmin.lab.budget import Budget
from flatmin.lab.cli import main
from flatmin.lab.parts import Training
from flatmin.lab.tasks import Settings, get_task
from flatmin.lab.train import RunSpec, build_optimizer, training_of
from flatmin.lab.tuning.costs import costs
from flatmin.lab.tuning.standing import Standing
from flatmin.lab.tuning.strength import Strengths, radius_for
from flatmin.lab.tuning.suggest import RISES, Suggest
from flatmin.lab.tuning.tune import Tune
from flatmin.lab.tuning.walk import walk

pytestmark = pytest.mark.usefixtures("place")


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


def plain(model, criterion=None):
    return Training(model, criterion or Mean(), {}, num_steps=1, epoch=1, num_classes=None)


def strengths(model, rule, *, mirrored, batches=BATCHES):
    def build(radius, model):
        return Standing(model, plain(model), rule(SGD(model.parameters(), lr=1.0), radius))

    return Strengths(model, Mean(), batches, build, unit=2.0, mirrored=mirrored)


def test_an_ascent_against_the_closed_form():
    model = Bowl([1.0, 4.0], [3.0, 1.0])
    before = model.w.detach().clone()
    found = strengths(model, lambda base, r: flatmin.SAM(base, rho=r), mirrored=False).at(0.5)
    g = torch.tensor([3.0, 4.0])  # |g| = 5
    loss, there = 1 + (9 + 4) / 2, before + 0.5 * g / 5
    rise = 0.5 * (there[0] ** 2 + 4 * there[1] ** 2).item() + 1 - loss
    assert found.moved == pytest.approx(0.5 / math.sqrt(10), rel=1e-5)
    assert found.rise == pytest.approx(rise / 2.0, rel=1e-5)
    assert torch.equal(model.w, before)
    assert model.training


def test_noise_rises_by_the_trace_without_what_is_linear():
    n, sigma = 20_000, 0.1
    model = Bowl([2.0] * n, [5.0] * n)  # the linear part of one draw is as large as the rise
    for rule in (lambda base, r: flatmin.NSO(base, sigma=r), lambda base, r: flatmin.NSO(base, r, antithetic=False)):
        found = strengths(model, rule, mirrored=True, batches=BATCHES[:1]).at(sigma)
        assert found.moved == pytest.approx(sigma / 5.0, rel=0.02)
        rise = 0.5 * sigma**2 * 2.0 * n
        assert found.rise == pytest.approx(rise / 2.0, rel=0.04)  # one draw: a standard error of 1%


class Parted(Bowl):
    """With a part that notes the mode it is used in."""

    def __init__(self):
        super().__init__([1.0], [1.0])
        self.part, self.seen = nn.Dropout(0.0), set()

    def forward(self, x):
        self.seen.add(self.part.training)
        return super().forward(self.part(x))


@pytest.mark.parametrize("whole", [False, True])
def test_a_part_that_is_frozen_stays_so_while_strengths_are_seen(whole):
    model = Parted()
    (model if whole else model.part).eval()
    strengths(model, lambda base, r: flatmin.SAM(base, rho=r), mirrored=False).at(0.1)
    assert model.seen == {whole}
    assert not model.part.training


def test_a_loss_that_overflows_has_an_infinite_rise():
    model = Bowl([1.0], [1.0])
    model.h = torch.tensor([1e30])
    assert strengths(model, lambda base, r: flatmin.SAM(base, rho=r), mirrored=False).at(1e10).rise == math.inf


def standing(task, method, settings, model):
    spec = RunSpec(task=task, method=method, seed=0, num_steps=1, settings=settings)
    splits = get_task(task).splits(0)
    training = training_of(spec, model, get_task(task).criterion, splits)
    return Standing(model, training, build_optimizer(spec, model, len(splits.train[1])))


@pytest.mark.parametrize("name", [n for n, m in flatmin.methods().items() if m.radius_name])
def test_every_method_can_be_looked_at_and_moves_more_for_a_larger_radius(name):
    task = get_task("diabetes")
    splits = task.splits(0)
    model = task.build_model()
    before = [p.detach().clone() for p in model.parameters()]

    def build(radius, model):
        return standing("diabetes", name, Settings(lr=0.1, radius=radius), model)

    inputs, targets = splits.train
    batches = list(zip(inputs.split(20)[:6], targets.split(20)[:6], strict=True))
    mirrored = flatmin.methods()[name].radius_name == "sigma"
    looked = Strengths(model, nn.MSELoss(), batches, build, unit=1.0, mirrored=mirrored)
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
    assert radius_for(1.0, lambda r: 0.5) is None
    assert radius_for(1.0, lambda r: 2.0) is None
    assert radius_for(1.0, lambda r: math.inf if r > 1e-3 else -1.0) is None  # a step, and nothing between
    assert radius_for(1.0, lambda r: math.inf if r > 1 else 1e3 * r) == pytest.approx(1e-3, rel=0.1)


def bowl(points):
    """Lowest at lr 0.3 and decay 0.1, and they act together."""

    def loss(lr, decay):
        x, y = math.log10(lr / 0.3), math.log10(max(decay, 1e-9) / 0.1)
        return 1 + x * x + y * y + x * y

    return [loss(*point) for point in points]


def test_the_walk_goes_downhill_in_both_directions():
    asked = []
    found = walk(0.03, 1e-3, lambda points: asked.extend(points) or bowl(points))
    assert found.best == (0.3, 0.1)
    assert found.ended
    assert len(asked) == len(set(asked)) == len(found.tried) < 20
    assert {decay for _, decay in walk(0.03, 0.0, bowl).tried} == {0.0}


def test_the_walk_says_that_it_had_to_stop():
    found = walk(1e-8, 0.0, bowl)
    assert not found.ended
    assert found.best[0] == pytest.approx(1e-4)


def test_the_walk_does_not_go_on_over_nothing():
    found = walk(0.03, 1e-3, lambda points: [1.0 + 1e-4 * abs(math.log10(lr)) for lr, _ in points])
    assert found.best[0] == 0.03
    assert found.ended


def acting_from(end):
    def losses(points):
        return [1.0 - 1e-4 * math.log10(lr) + (decay > end) * math.log10(decay / min(end, 1e9)) for lr, decay in points]

    return losses


@pytest.mark.parametrize(("end", "decay"), [(0.05, 0.01), (0.5, 0.1), (1e-3, 1e-3), (math.inf, 1e-3)])
def test_of_decays_that_do_nothing_the_walk_takes_the_largest(end, decay):
    found = walk(0.03, 1e-3, acting_from(end))
    assert found.best == (0.03, decay)
    assert found.ended
    assert found.indifferent == (end == math.inf)
    assert max(wd for _, wd in found.tried) <= 10


def test_the_walk_goes_on_where_a_decay_begins_to_help():
    def losses(points):
        return [
            2.0 - (decay >= 0.5) + 0.5 * abs(math.log10(lr / (0.03 if decay < 0.5 else 0.3))) for lr, decay in points
        ]

    found = walk(0.03, 1e-3, losses)
    assert found.best == (0.3, 1.0)
    assert found.ended


def test_a_decay_that_changes_what_was_learned_does_something():
    rising = walk(0.03, 1e-3, lambda points: [1.0 + 0.002 * math.log10(decay / 1e-3) for _, decay in points])
    assert rising.best == (0.03, 0.01)  # a quarter of a hundredth from where it ended, not from one decay to the next
    fading = {1e-4: 0.7015, 1e-3: 0.7013, 1e-2: 0.6968, 0.1: 0.6934}  # until the weights are 0
    found = walk(0.03, 1e-3, lambda points: [fading.get(decay, 0.6934) for _, decay in points], untrained=0.7204)
    assert found.best == (0.03, 1e-3)
    little = {1e-4: 20.0, 1e-3: 20.0, 1e-2: 20.04}  # a loss with a constant in it: 0.04 of 0.5 that was learned
    assert walk(0.03, 1e-3, lambda points: [little.get(d, 20.5) for _, d in points], 20.5).best == (0.03, 1e-3)
    assert walk(0.03, 1e-3, lambda points: [1.0] * len(points), untrained=0.9).best == (0.03, 1e-3)


def test_the_walk_that_finds_nothing_says_so():
    assert not math.isfinite(walk(0.03, 1e-3, lambda points: [math.inf] * len(points)).tried[0.03, 1e-3])


def test_the_walk_leaves_where_nothing_trains():
    found = walk(0.3, 1e-3, lambda points: [math.inf if lr > 0.2 else 1.0 for lr, _ in points])
    assert found.best[0] == pytest.approx(0.095)


def test_standing_steps_leave_the_weights_bit_for_bit():
    model = nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    for base in (SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1), AdamW(model.parameters(), lr=0.1)):
        still = Standing(model, plain(model, nn.CrossEntropyLoss()), flatmin.SAM(base, rho=0.1))
        seen: list[torch.Tensor] = []
        look = partial(lambda into: into.append(model.weight.detach().clone()), seen)
        for _ in range(3):
            still.step((torch.randn(5, 3), torch.randint(2, (5,))), look)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert torch.equal(seen[0], before[0])
        assert not torch.equal(seen[1], before[0])  # the ascent


def test_rises_are_those_of_training():
    """With batch norm by the batch, dropout with the same masks, and nothing left changed."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = torch.randn(16, 4), torch.randn(16, 1)

    def build(radius, model):
        return Standing(model, plain(model, nn.MSELoss()), flatmin.SAM(SGD(model.parameters(), lr=1.0), rho=radius))

    random = torch.get_rng_state()
    found = Strengths(model, nn.MSELoss(), [batch] * 2, build, unit=1.0, mirrored=False).at(1e-12)
    assert abs(found.rise) < 1e-5  # other masks, or the running statistics, would show
    assert not model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    looked = partial(Strengths, model, nn.MSELoss(), [batch] * 2, build, unit=1.0, mirrored=False)
    first = looked().at(0.1).rise
    model.load_state_dict({**state, "1.running_var": 100 * state["1.running_var"]})
    assert looked().at(0.1).rise == pytest.approx(first)


def suggest(*more):
    options = ["--task", "diabetes", "--num-gradients", "40", "--jobs", "1"]
    options += ["--methods", "base", "sam", "nso", "sam+ema"]
    assert main(["suggest", *options, *more]) == 0
    return json.loads(Path("runs/suggest-diabetes/suggest.json").read_text())


def test_what_is_suggested_can_be_tuned_and_is_not_done_again(monkeypatch, capsys):
    found = suggest()
    printed = capsys.readouterr().out
    assert f"\n{found['command']}\n" in printed
    assert "On 1 process: about" in printed
    for name, radius in (("sam", "rho"), ("nso", "sigma"), ("sam+ema", "rho")):
        got = [strength["rise"] for strength in found["radii"][name]]
        assert got == pytest.approx(RISES[radius], rel=0.2)
    control = found["control"]
    losses = {(p["lr"], p["weight_decay"]): p["validation_loss"] for p in control["tried"]}
    assert losses[control["lr"], control["weight_decay"]] <= 1.01 * min(losses.values())

    given = shlex.split(found["command"])
    assert given[:2] == ["flatmin", "tune"]
    tuned = {}
    monkeypatch.setattr(Tune, "_run", lambda self: tuned.update({m: self._settings(m, 0.0) for m in self.methods}))
    assert main(given[1:]) == 0
    assert {len(settings) for settings in tuned.values()} == {16}
    assert {s.radius for s in tuned["sam"]} == {s["radius"] for s in found["radii"]["sam"]}
    assert control["weight_decay"] in {s.weight_decay for s in tuned["base"]}

    monkeypatch.setattr(pool, "train", lambda *_: pytest.fail("trained again"))
    assert suggest()["radii"] == found["radii"]


def test_a_method_whose_radius_does_not_show_keeps_the_grid_of_tune(capsys, monkeypatch):
    monkeypatch.setattr(suggest_module, "radius_for", lambda target, value: 0.1 if target < 0.1 else None)
    options = ["--task", "diabetes", "--num-gradients", "40", "--jobs", "1", "--methods", "base", "random-sam"]
    assert main(["suggest", *options]) == 0
    assert "random-sam: no four radii do what is looked for; tune takes its own --rho." in capsys.readouterr().out
    found = json.loads(Path("runs/suggest-diabetes/suggest.json").read_text())
    assert found["radii"] == {"random-sam": []}
    assert "--radii" not in found["command"]


@pytest.mark.parametrize(
    "more", [["--weight-decay", "0"], ["--methods", "base+ema", "sam+ema", "--weight-decay", "0.1"]]
)
def test_what_is_printed_is_what_tune_takes(more, capsys):
    options = ["--task", "diabetes", "--num-gradients", "40", "--jobs", "1", "--methods", "base", "sam"]
    assert main(["suggest", *options, *more]) == 0
    command = json.loads(Path("runs/suggest-diabetes/suggest.json").read_text())["command"]
    given = dict(part.split(maxsplit=1) for part in command.split(" --")[1:])
    radii = tuple(given["radii"].split())
    lr, decay = (tuple(map(float, given[name].split())) for name in ("lr", "weight-decay"))
    Tune(task="diabetes", methods=tuple(given["methods"].split()), lr=lr, weight_decay=decay, radii=radii).check()
    assert len(set(decay)) == 4
    assert given["jobs"] == "1"


def test_equal_steps_are_handed_on(capsys):
    options = ["--task", "diabetes", "--num-gradients", "40", "--jobs", "1", "--methods", "base", "sam"]
    assert main(["suggest", *options, "--budget", "steps"]) == 0
    found = json.loads(Path("runs/suggest-diabetes/suggest.json").read_text())
    assert "--budget steps --num-gradients 40 " in found["command"]
    assert (found["budget"], found["num_gradients"]) == ("steps", 40)


def test_seconds_add_up_and_the_model_stays(monkeypatch):
    task = get_task("diabetes")
    splits, model = task.splits(0), task.build_model()
    before = [p.detach().clone() for p in model.parameters()]
    names = ("base", "sam", "looksam")
    made = {name: partial(standing, "diabetes", name, Settings(lr=0.1)) for name in names}
    monkeypatch.setattr(costs_module, "flatness_of", lambda *_: time.sleep(0.2))
    monkeypatch.setattr(costs_module, "scores_of", lambda *_: time.sleep(0.1))
    price = costs(task, splits, model, made, budget=Budget(600), num_seeds=10)
    for name, steps in zip(names, (600, 300, 500), strict=True):
        assert price[name].run == pytest.approx(steps * price[name].step)
        assert price[name].tuning - 95 * price[name].run == pytest.approx(95 * 0.1, rel=0.5)  # scores, once a trial
        assert price[name].comparison - 10 * price[name].run == pytest.approx(10 * (20 * 0.1 + 0.2), rel=0.5)
    assert price["sam"].step > price["base"].step > 0
    gradients = []
    monkeypatch.setattr(costs_module, "num_progress", lambda _, __, number: gradients.append(number) or 5)
    price = costs(task, splits, model, made, budget=Budget(600, "steps"), num_seeds=10)
    assert gradients == pytest.approx([600, 1200, 720])
    assert all(cost.run == pytest.approx(600 * cost.step) for cost in price.values())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


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


def test_a_control_that_is_no_better_than_untrained_is_said(capsys):
    options = ["--task", "diabetes", "--lr", "1e-9", "--num-gradients", "20", "--jobs", "1", "--methods", "base"]
    assert main(["suggest", *options]) == 0
    assert "An untrained model has" in " ".join(capsys.readouterr().out.split())


def test_a_control_that_diverges_everywhere_is_said(capsys):
    assert main(["suggest", "--task", "diabetes", "--lr", "1e9", "--num-gradients", "20", "--jobs", "1"]) == 2
    assert "base diverged at all rates near 1e+09" in capsys.readouterr().err
