"""Choosing settings: as many trials for every method, checked before anything is trained, nothing done twice."""

import json
from dataclasses import replace

import pytest

import flatmin.lab.pool as pool
from flatmin.lab.folder import unfinished
from flatmin.lab.records import read_run
from flatmin.lab.tasks import Settings
from flatmin.lab.train import RunSpec, train
from flatmin.lab.tuning.further import further
from flatmin.lab.tuning.tune import Tune


def tune(tmp_path, **options):
    options = {"methods": ("base", "sam"), "lr": (0.1,), "weight_decay": (0.0,), "rho": (0.05,), **options}
    return Tune(out=tmp_path / "tuning", **{"num_seeds": 1, "jobs": 1, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("base", "gsma")}, "unknown method 'gsma'. Did you mean 'gsam'"),
        ({"methods": ("sam", "base")}, "the first of --methods is the control and has no radius, got sam"),
        ({"methods": ("sam",)}, "the first of --methods is the control"),
        ({"methods": ()}, "--methods names at least one method"),
        ({"methods": ("base", "sam", "sam")}, "none twice, got 'base sam sam'"),
        ({"rho": (0.1, 0.2)}, r"same number of trials.*base 1 \(--lr x --weight-decay\), sam 2 \(--lr x --rho\)"),
        ({"lr": ()}, "same number of trials, and at least one"),
        ({"task": "digit"}, "unknown task 'digit'"),
        ({"rho": (-1.0,)}, "radius must be at least 0, got -1"),
        ({"lr": (0.1, -0.1)}, "lr must be positive, got -0.1"),
        ({"weight_decay": (float("nan"),)}, "weight_decay must be a finite number, got nan"),
        ({"rho": (0.1, 0.1), "weight_decay": (0.0, 0.1)}, "the grid of sam has a setting twice: .*radius0.1"),
        ({"radii": ("sam=0.1,0.2",)}, r"base 1 \(--lr x --weight-decay\), sam 2 \(--lr x --radii\)"),
        ({"radii": ("sam=0.1,x",)}, "--radii is to be like sam=0.05,0.1,0.2,0.4, got 'sam=0.1,x'"),
        ({"radii": ("sam",)}, "--radii is to be like"),
        ({"radii": ("asam=0.1",)}, "--radii names asam, which is none of the --methods"),
        ({"radii": ("base=0.1",)}, "--radii names base, which is none of the --methods that have a radius"),
        ({"num_seeds": 0}, "--num-seeds must be at least 1, got 0"),
        ({"jobs": 0}, "--jobs must be at least 1, got 0"),
        ({"num_gradients": 1}, "a budget of 1 gradients does not pay for one step of sam, which costs 2"),
    ],
)
def test_everything_is_checked_before_anything_is_trained(tmp_path, options, message, monkeypatch):
    monkeypatch.setattr(pool, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        tune(tmp_path, **options).run()
    assert not (tmp_path / "tuning").exists()


def test_finished_runs_are_used_again_and_never_overwritten(tmp_path, monkeypatch):
    tune(tmp_path).run()
    before = json.loads((tmp_path / "tuning" / "tuning.json").read_text())
    assert set(before["best"]) == {"base", "sam"}
    monkeypatch.setattr(pool, "train", lambda *_: pytest.fail("trained again"))
    tune(tmp_path).run()
    assert json.loads((tmp_path / "tuning" / "tuning.json").read_text()) == before


def test_methods_may_have_radii_of_their_own(tmp_path, capsys):
    own = {"methods": ("base", "sam", "asam"), "weight_decay": (0.0, 0.01), "rho": (0.05, 0.1), "num_gradients": 4}
    tune(tmp_path, **own, radii=("asam=0.5,2",)).run()
    trials = json.loads((tmp_path / "tuning" / "tuning.json").read_text())["trials"]
    assert {name: [trial["radius"] for trial in trials[name]] for name in trials} == {
        "base": [None, None],
        "sam": [0.05, 0.1],
        "asam": [0.5, 2.0],
    }
    assert "est --radii asam that was tried" in capsys.readouterr().out


def test_after_the_grid_every_method_has_as_many_trials_more_in_what_its_grid_did_not_vary(tmp_path):
    methods = ("base", "sam", "base+ema", "bsam")  # bSAM has a prior in place of a weight decay
    options = {"methods": methods, "lr": (0.05, 0.1, 0.2), "weight_decay": (0.0, 1e-3, 1e-2)}
    tune(tmp_path, **options, rho=(0.05, 0.1, 0.2), num_gradients=20).run()
    found = json.loads((tmp_path / "tuning" / "tuning.json").read_text())
    for name, trials in found["trials"].items():
        grid, more = trials[:9], trials[9:]
        assert len(more) == 2
        best = min(grid, key=lambda trial: trial["validation_loss"])
        key = "weight_decay" if name == "sam" else "lr"
        assert all(trial[k] == best[k] for trial in more for k in ("lr", "weight_decay", "radius") if k != key)
        others = {0.0, 1e-3, 1e-2} - {best["weight_decay"]} if name == "sam" else {0.0707, 0.141}
        assert {trial[key] for trial in more} == others
        assert found["best"][name] == min(trials, key=lambda trial: trial["validation_loss"])
    (decay,) = {trial["weight_decay"] for trial in found["trials"]["sam"][:9]}
    assert decay == found["best"]["base"]["weight_decay"]


@pytest.mark.parametrize(
    ("best", "borrowed", "expected"),
    [
        (Settings(lr=0.1, weight_decay=1e-3), False, [0.141, 0.0548]),
        (Settings(lr=0.03, weight_decay=1e-3), False, [0.0548, 0.141]),
        (Settings(lr=0.2, weight_decay=1e-3, radius=0.1), True, [1e-4, 1e-2]),
        (Settings(lr=0.2, weight_decay=1e-2, radius=0.1), True, [1e-3, 1e-4]),
        (Settings(lr=0.2, weight_decay=0.0, radius=0.1), True, [1e-4, 1e-3]),
    ],
)
def test_what_is_near_is_tried_first(best, borrowed, expected):
    found = further(best, (0.03, 0.1, 0.2), (0.0, 1e-4, 1e-3, 1e-2), borrowed=borrowed)
    assert [s.weight_decay if borrowed else s.lr for s in found] == expected
    assert {s.radius for s in found} == {best.radius}


def test_a_grid_is_extended_without_doing_its_runs_again(tmp_path, monkeypatch):
    tune(tmp_path).run()
    trained = []
    monkeypatch.setattr(pool, "train", lambda spec, *rest: (trained.append(spec), train(spec, *rest)))
    tune(tmp_path, lr=(0.03, 0.1)).run()
    assert [(spec.method, spec.settings.lr) for spec in trained] == [("base", 0.03), ("sam", 0.03)]
    trials = json.loads((tmp_path / "tuning" / "tuning.json").read_text())["trials"]
    assert [[trial["lr"] for trial in rows] for rows in trials.values()] == [[0.03, 0.1]] * 2
    mend = r"is a run with another num_steps .* It is left as it is: choose another --out\.$"
    with pytest.raises(ValueError, match=mend):
        tune(tmp_path, num_gradients=20).run()


def test_what_a_method_does_not_use_is_not_in_its_settings(tmp_path, capsys):
    tune(tmp_path, methods=("base", "sam", "bsam"), weight_decay=(0.01,), num_gradients=20).run()
    lines = {line.split('"')[1]: line for line in capsys.readouterr().out.splitlines() if ": Settings(" in line}
    assert "weight_decay=0.01" in lines["base"]
    assert "weight_decay=0.01" in lines["sam"]
    assert "weight_decay" not in lines["bsam"]
    best = json.loads((tmp_path / "tuning" / "tuning.json").read_text())["best"]
    assert [best[name]["weight_decay"] for name in ("base", "sam", "bsam")] == [0.01, 0.01, 0.0]


def test_flatness_is_not_measured_in_trials_and_a_comparison_does_not_take_them_for_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("flatmin.lab.train.flatness_of", lambda *_: pytest.fail("measured"))
    tune(tmp_path, methods=("base",)).run()
    (record,) = (tmp_path / "tuning").glob("*/*.jsonl")
    trial = read_run(record)
    assert trial.finished
    assert not trial.measured
    spec = RunSpec(**{**trial.header["spec"], "settings": Settings(**trial.header["spec"]["settings"])})
    with pytest.raises(ValueError, match=r"whose flatness was not measured \(a trial of flatmin tune\)"):
        unfinished([(spec, record.parent)])


def test_a_trial_of_before_whose_flatness_was_measured_is_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "train", lambda spec, *rest: train(replace(spec, measured=True), *rest))
    tune(tmp_path, methods=("base",)).run()
    (record,) = (tmp_path / "tuning").glob("*/*.jsonl")
    assert "flatness" in read_run(record).result
    monkeypatch.setattr(pool, "train", lambda *_: pytest.fail("trained again"))
    tune(tmp_path, methods=("base",)).run()


def test_a_trial_that_diverges_is_null_in_the_file(tmp_path):
    tune(tmp_path, methods=("base",), lr=(0.1, 1e8)).run()
    text = (tmp_path / "tuning" / "tuning.json").read_text()
    trials = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["trials"]["base"]
    assert [trial["validation_loss"] is None for trial in trials] == [False, True]
