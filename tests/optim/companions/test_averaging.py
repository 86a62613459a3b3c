"""Averager: what it averages, how the average gets into the model and out, batch norm, resuming."""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import flatmin
from flatmin import problems
from tests.interrupts import InterruptAt

# Most of these are about weights, and evaluate nothing.
pytestmark = pytest.mark.filterwarnings("ignore:the statistics of batch norm are those of the weights in training")


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def batches(n=4, size=16, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 5, generator=g) + 1, torch.randint(3, (size,), generator=g)) for _ in range(n)]


def train(model, steps, averager=None, after=lambda: None, seed=0):
    """Noisy steps; `averager` is updated after each."""
    opt, data = SGD(model.parameters(), lr=0.1, momentum=0.5), itertools.cycle(batches())
    torch.manual_seed(seed)
    for _ in range(steps):
        opt.zero_grad()
        x, y = next(data)
        nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)).float(), y).backward()
        opt.step()
        if averager is not None:
            averager.update()
        after()


def state(model):
    return {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


def averages(averager):
    with averager.applied() as model:
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def path(steps, model=None):
    """The iterates of `train`."""
    model, found = model or net(), []
    train(model, steps, after=lambda: found.append({n: p.detach().clone() for n, p in model.named_parameters()}))
    return found


def mean_of(iterates):
    return {name: torch.stack([w[name].double() for w in iterates]).mean(0) for name in iterates[0]}


def assert_close(found, expected, atol=1e-6):
    for name in expected:
        torch.testing.assert_close(found[name].double(), expected[name].double(), rtol=0, atol=atol)


# -- which iterates count, and how much -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean", "ema"])
def test_it_equals_torch(kind):
    model = net()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8) if kind == "ema" else None)
    averager = flatmin.Averager(model, kind, decay=0.8)
    train(model, 30, averager, after=lambda: theirs.update_parameters(model))
    assert_close(averages(averager), dict(theirs.module.named_parameters()))
    assert averager.num_averaged == 30


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"kind": "mean"}, range(1, 21)),
        ({"kind": "mean", "every": 6}, [6, 12, 18]),
        ({"num_steps": 20}, range(16, 21)),
        ({"num_steps": 100, "start": 0.07}, range(8, 21)),  # 0.07 * 100 is a little more than 7
        ({"num_steps": 100, "start": 0.05}, range(6, 21)),
        ({"start": 9}, range(9, 21)),
        ({"start": 1}, range(1, 21)),
        ({"start": 7, "every": 3}, [9, 12, 15, 18]),
        ({"start": 20}, [20]),
    ],
)
def test_the_mean_is_over_these_steps(options, steps):
    averager = flatmin.Averager(net(), **options)
    train(averager._model, 20, averager)
    assert averager.num_averaged == len(steps)
    assert_close(averages(averager), mean_of([w for t, w in enumerate(path(20), 1) if t in steps]))


def test_the_ema_by_hand():
    w = nn.Parameter(torch.tensor([4.0]))
    model = nn.ParameterList([w])
    averager = flatmin.Averager(model, "ema", decay=0.75)
    for value in (8.0, 0.0, 4.0):  # 8; 0.75 * 8 = 6; 0.75 * 6 + 0.25 * 4 = 5.5
        w.data.fill_(value)
        averager.update()
    with averager.applied():
        assert w.item() == 5.5
    assert w.item() == 4.0


def test_before_the_first_averaged_step_the_weights_are_the_current_ones():
    averager = flatmin.Averager(net(), start=10)
    train(averager._model, 9, averager)
    assert averager.num_averaged == 0
    assert_same(averages(averager), path(9)[-1])
    before = state(averager._model)
    with averager.applied() as model, torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)  # what the body does is undone here too
    assert_same(state(averager._model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"start=0.75 is a fraction of the run.*pass num_steps="),
        ({"kind": "swa"}, "kind must be 'tail', 'mean' or 'ema', got 'swa'"),
        ({"start": 0}, "start must be a step"),
        ({"start": 1.5}, "start must be a step"),
        ({"start": -3}, "start must be a step"),
        ({"start": float("nan")}, "start must be a step"),
        ({"start": 11, "num_steps": 10}, "no step would be averaged: the first is 11"),
        ({"num_steps": 100, "every": 60}, "no step would be averaged.*every=60"),
        ({"kind": "mean", "every": 0}, "every, the steps between two averaged iterates, must be at least 1"),
        ({"kind": "mean", "every": 1.5}, "every, .* must be a whole number"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"kind": "mean", "num_steps": -1}, "num_steps must be at least 1"),
        ({"kind": "ema", "decay": 1.0}, r"decay, .*, must be in \[0, 1\), got 1.0"),
        ({"kind": "ema", "decay": float("nan")}, "decay, .*, must be a finite number, got nan"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        flatmin.Averager(net(), **options)


def test_a_model_without_weights_is_refused():
    with pytest.raises(ValueError, match="ReLU has no floating-point parameters"):
        flatmin.Averager(nn.ReLU(), "mean")


# -- the theory: SGD with a constant step on a cubic -------------------------------------------------------------------

M, NOISE = 0.3, 0.5


class Chains(nn.Module):
    """Many independent runs of SGD with additive noise, in one parameter."""

    def __init__(self, eta, num=50_000):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(num, dtype=torch.float64))
        self.problem, self.generator = problems.cubic(M), torch.Generator().manual_seed(3)
        self.opt = SGD(self.parameters(), lr=eta)

    @torch.no_grad()
    def step(self):
        noise = NOISE * torch.randn(self.w.shape, generator=self.generator, dtype=torch.float64)
        self.w.grad = self.problem.gradient(self.w) + noise
        self.opt.step()


def second_moment(eta):
    """E w^2 up to the order of M^2: eta noise^2 / (2 - eta) for a Gaussian w, then once more with its third moment."""
    a, b, tau = 1 - eta, eta * M / 2, eta * NOISE  # w' = a w - b w^2 - tau z
    gaussian = tau**2 / (1 - a**2)
    mean = -M / 2 * gaussian
    third = 3 * (a * tau**2 * mean - b * (3 * a**2 * gaussian**2 + tau**2 * gaussian)) / (1 - a**3)
    return (tau**2 - 2 * a * b * third + 3 * b**2 * gaussian**2) / (1 - a**2)


def stationary_moments(eta):
    """E w and E w^2 of w' = w - eta (w + M w^2 / 2 + noise), from the transition kernel on a grid."""
    reach = 8 * eta * NOISE / (eta * (2 - eta)) ** 0.5
    w = torch.linspace(-reach, reach, 801, dtype=torch.float64)
    kernel = torch.exp(-0.5 * ((w - (w - eta * (w + 0.5 * M * w**2))[:, None]) / (eta * NOISE)) ** 2)
    kernel /= kernel.sum(1, keepdim=True)
    density = torch.full_like(w, 1 / len(w))
    for _ in range(12):  # 4096 steps
        kernel = kernel @ kernel
    density = density @ kernel
    return (density @ w).item(), (density @ w**2).item()


@pytest.mark.parametrize(
    ("eta", "mean", "second"), [(0.1, -0.00198, 0.0132), (0.3, -0.00664, 0.0443), (0.5, -0.0126, 0.0839)]
)
def test_averaged_sgd_on_a_cubic(eta, mean, second):
    burn_in, steps = round(12 / eta), 600
    model = Chains(eta)
    averager = flatmin.Averager(model, start=burn_in + 1)
    square, shifted = torch.zeros_like(model.w.detach()), torch.zeros_like(model.w.detach())
    v_star = ((1 - (M * eta * NOISE) ** 2) ** 0.5 - 1) / M
    for step in range(burn_in + steps):
        if step >= burn_in:
            v = model.w.detach() - eta * model.problem.gradient(model.w.detach())
            shifted += (v - v_star) ** 2 / steps
        model.step()
        averager.update()
        if step >= burn_in:
            square += model.w.detach() ** 2 / steps
    average = averages(averager)["w"]

    def judged(values, expected, slack=0.0):
        error = values.std().item() / len(values) ** 0.5  # chains are independent
        assert abs(values.mean().item() - expected) < 4 * error + slack, (values.mean().item(), expected, error)

    # To three digits, and to what a computation without random numbers gives.
    judged(average, mean, slack=0.5 * 10 ** (-4 if eta == 0.5 else -5))
    judged(square, second, slack=0.5e-4)
    exact_mean, exact_second = stationary_moments(eta)
    judged(average, exact_mean)
    judged(square, exact_second)
    # E grad f = 0 at stationarity: E w = -(M / 2) E w^2, for any step.
    judged(average + 0.5 * M * square, 0.0)
    assert exact_mean == pytest.approx(-M / 2 * exact_second, rel=1e-9)
    assert exact_second == pytest.approx(second_moment(eta), rel=3e-4)
    # The average is off by (M / 2 mu) D_inf, mu = F''(v*), and not by sqrt(D_inf) as the iterates are.
    judged(average - v_star + M / (2 * (1 + M * v_star)) * shifted, 0.0)
    assert abs(average.mean() - v_star) < 0.15 * shifted.mean().sqrt()


# -- into the model and out again --------------------------------------------------------------------------------------


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [None, Boom, KeyboardInterrupt])
def test_weights_and_buffers_come_back_exactly(error):
    model = net()
    averager = flatmin.Averager(model, "mean")
    train(model, 5, averager)
    averager.refresh(batches())
    before, pointers = state(model), [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    try:
        with averager.applied():
            assert any(not torch.equal(a, b) for a, b in zip(state(model).values(), before.values(), strict=True))
            assert pointers == [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
            train(model, 2)  # changes weights and running statistics
            if error:
                raise error
    except (Boom, KeyboardInterrupt):
        assert error
    assert_same(state(model), before)
    assert pointers == [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    averager.update()  # and it works as before
    with averager.applied():
        pass
    assert_same(state(model), before)


def test_training_does_not_notice():
    plain, watched = net(), net()
    train(plain, 12)
    averager = flatmin.Averager(watched, start=3)

    def look():
        averager.refresh(batches(seed=9))
        with averager.applied():
            watched.eval()(batches()[0][0])
            watched.train()

    train(watched, 12, averager, after=look)
    assert_same(state(watched), state(plain))


def test_an_interrupt_at_any_line_leaves_whole_weights():
    model = net()
    averager = flatmin.Averager(model, "mean")
    train(model, 3, averager)
    averager.refresh(batches())
    before = state(model)
    line = 0
    for line in range(1, 500):
        trace = InterruptAt(line)
        try:
            with trace, averager.applied():
                pass
        except KeyboardInterrupt:
            pass
        if trace.remaining > 0:
            break
        assert_same(state(model), before)
        with averager.applied():  # nothing is stuck
            pass
    assert 20 < line < 499


@pytest.mark.parametrize("call", ["applied", "update", "refresh", "load_state_dict"])
def test_what_cannot_be_done_inside(call):
    model = net()
    averager = flatmin.Averager(model, "mean")
    train(model, 3, averager)
    before, saved = state(model), averager.state_dict()
    calls = {
        "applied": lambda: averager.applied().__enter__(),
        "update": averager.update,
        "refresh": lambda: averager.refresh(batches()),
        "load_state_dict": lambda: averager.load_state_dict(saved),
    }
    with averager.applied():
        inside = state(model)
        with pytest.raises(ValueError, match=rf"{call}\(\) inside `with averager.applied\(\):`"):
            calls[call]()
        assert_same(state(model), inside)
    assert_same(state(model), before)
    assert averager.num_averaged == 3
    averager.update()


def test_it_goes_around_a_flat_optimizer():
    model = net()
    opt = flatmin.SAM(SGD(model.parameters(), lr=0.1))
    averager, seen = flatmin.Averager(model, "mean"), []
    for x, y in batches():
        for _probe in opt.probes():
            nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        averager.update()
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert_close(averages(averager), mean_of(seen))


# -- which parameters --------------------------------------------------------------------------------------------------


def test_tied_and_frozen_parameters():
    torch.manual_seed(0)
    embed, middle, head = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
    model = nn.ModuleDict({"embed": embed, "middle": middle, "head": head})
    head.weight = embed.weight
    middle.weight.requires_grad_(False)
    averager, frozen, seen = flatmin.Averager(model, "mean"), middle.weight.detach().clone(), []
    for _ in range(3):
        with torch.no_grad():
            embed.weight.add_(torch.randn(6, 4))
        averager.update()
        seen.append(embed.weight.detach().clone())
    with averager.applied():
        assert head.weight is embed.weight
        torch.testing.assert_close(head.weight.detach(), torch.stack(seen).mean(0))
        assert torch.equal(middle.weight, frozen)
    assert [k for k in averager.state_dict()["averages"] if "weight" in k] == ["embed.weight", "middle.weight"]


def test_a_parameter_that_is_thawed_later_is_averaged():
    model = nn.Linear(2, 1, bias=False)
    model.weight.requires_grad_(False).fill_(1.0)
    averager = flatmin.Averager(model, "mean")
    averager.update()
    model.weight.requires_grad_(True).data.fill_(3.0)
    averager.update()
    with averager.applied():
        assert model.weight.tolist() == [[2.0, 2.0]]


@pytest.mark.parametrize("change", ["added", "removed", "replaced"])
@pytest.mark.parametrize("call", ["update", "applied", "refresh"])
def test_other_parameters_are_refused(change, call):
    model = net()
    averager = flatmin.Averager(model, "mean")
    train(model, 2, averager)
    if change == "added":
        model.append(nn.Linear(3, 3, bias=False))
    elif change == "removed":
        del model[4].weight
    else:
        model[4].weight = nn.Parameter(torch.zeros(3, 8))
    name = "5.weight" if change == "added" else "4.weight"
    calls = {
        "update": averager.update,
        "applied": lambda: averager.applied().__enter__(),
        "refresh": lambda: averager.refresh(batches()),
    }
    with pytest.raises(ValueError, match=rf"not those that it had.*\({change}: {name}\).*make the Averager"):
        calls[call]()
    assert averager.num_averaged == 2


def test_modules_without_parameters_may_come_and_go():
    model = net()
    averager = flatmin.Averager(model, "mean")
    averager.update()
    model[2] = nn.Tanh()
    model.append(nn.Sequential())
    averager.update()
    model[5].append(nn.Linear(3, 3, bias=False))  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"\(added: 5.0.weight\)"):
        averager.update()


def test_integers_and_other_buffers_are_left_alone():
    model = nn.Linear(2, 1)
    model.codes = nn.Parameter(torch.tensor([3, 4], dtype=torch.int8), requires_grad=False)
    model.register_buffer("count", torch.tensor(0))
    model.register_buffer("scale", torch.tensor(1.0))
    averager = flatmin.Averager(model, "mean")
    for k in range(1, 4):
        model.codes.data.fill_(k)
        model.count.fill_(k)  # type: ignore[operator]
        model.scale.fill_(k)  # type: ignore[operator]
        averager.update()
    with averager.applied():
        assert model.codes.tolist() == [3, 3]
        assert (model.count, model.scale) == (3, 3)
    assert set(averager.state_dict()["averages"]) == {"weight", "bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_accumulated_in_fp32(dtype):
    model = nn.Linear(4, 4, dtype=dtype)
    theirs = AveragedModel(model)
    averager, seen = flatmin.Averager(model, "mean"), []
    for _ in range(400):
        with torch.no_grad():
            model.weight.copy_(1 + 0.1 * torch.randn(4, 4))
        averager.update()
        theirs.update_parameters(model)
        seen.append(model.weight.detach().clone())
    exact = torch.stack(seen).double().mean(0)
    kept = averager.state_dict()["averages"]["weight"]
    assert kept.dtype == torch.float32
    assert (kept.double() - exact).abs().max() < 1e-6
    before = model.weight.detach().clone()
    with averager.applied():
        assert torch.equal(model.weight, kept.to(dtype))
    assert torch.equal(model.weight, before)
    error = (averages(averager)["weight"].double() - exact).abs().max()
    assert error < torch.finfo(dtype).eps  # rounded once, at 1
    assert error < (theirs.module.weight.double() - exact).abs().max()  # type: ignore[operator, union-attr]


def test_double_stays_double_and_a_model_may_change_its_precision():
    model = nn.Linear(1, 1, bias=False).double()
    averager = flatmin.Averager(model, "mean")
    for value in (1.0, 2.0):
        model.weight.data.fill_(value)
        averager.update()
        model.float()
    assert averager.state_dict()["averages"]["weight"].dtype == torch.float64
    with averager.applied():
        assert model.weight.item() == 1.5


# -- batch norm --------------------------------------------------------------------------------------------------------


def direct_statistics(weights, data):
    """Mean and unbiased variance of the first layer's outputs, averaged over batches."""
    outputs = [nn.functional.linear(x.double(), weights["0.weight"].double(), weights["0.bias"].double()) for x in data]
    mean = torch.stack([h.mean(0) for h in outputs]).mean(0)
    return mean, torch.stack([h.var(0) for h in outputs]).mean(0), torch.cat(outputs)


@pytest.mark.parametrize("form", ["tuple", "list", "tensor", "dict", "object"])
def test_refresh_against_a_direct_computation(form):
    model = net()
    averager = flatmin.Averager(model, "mean")
    train(model, 8, averager)
    model.eval()
    before, momentum, data = state(model), model[1].momentum, batches(5, 200, seed=7)
    made = {
        "tuple": data,
        "list": [list(b) for b in data],
        "tensor": iter([x for x, _ in data]),  # one pass is enough
        "dict": [{"input": x} for x, _ in data],
        "object": [{"x": x, "labels": y} for x, y in data],
    }
    forward = (lambda model, batch: (model(batch["x"]), batch["labels"])) if form == "object" else None
    random_state = torch.get_rng_state()
    averager.refresh(made[form], forward)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same(state(model), before)
    assert model[1].momentum == momentum
    assert not any(part.training for part in model.modules())
    mean, var, outputs = direct_statistics(averages(averager), [x for x, _ in data])
    with averager.applied():
        torch.testing.assert_close(model[1].running_mean.double(), mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(model[1].running_var.double(), var, rtol=0, atol=1e-5)
        assert model[1].num_batches_tracked == 5
        # of the whole data: the mean as well (batches are equal), the variance up to that of the batch means
        torch.testing.assert_close(model[1].running_mean.double(), outputs.mean(0), rtol=0, atol=1e-6)
        torch.testing.assert_close(model[1].running_var.double(), outputs.var(0), rtol=0.02, atol=0)
    assert_same(state(model), before)


def test_refresh_equals_torch_where_torch_can():
    model = net()
    averager, theirs = flatmin.Averager(model, "mean"), AveragedModel(model)
    train(model, 8, averager, after=lambda: theirs.update_parameters(model))
    update_bn(batches(), theirs)
    averager.refresh(batches())
    with averager.applied():
        assert_close(state(model), dict(theirs.module.state_dict()), atol=1e-5)


def test_statistics_hold_until_the_average_moves():
    model = net()
    averager = flatmin.Averager(model, "mean", every=2)
    train(model, 4, averager)
    averager.refresh(batches())

    def shown():
        with averager.applied():
            return state(model)["1.running_mean"]

    fresh = shown()
    assert not torch.equal(fresh, state(model)["1.running_mean"])
    averager.update()  # not due: the average stays
    assert torch.equal(shown(), fresh)
    averager.update()
    assert torch.equal(shown(), state(model)["1.running_mean"])


def test_before_the_first_average_statistics_are_those_of_the_current_weights():
    model = net()
    averager = flatmin.Averager(model, start=10)
    train(model, 2, averager)
    averager.refresh(batches(seed=7))
    mean, *_ = direct_statistics(state(model), [x for x, _ in batches(seed=7)])
    with averager.applied():
        torch.testing.assert_close(model[1].running_mean.double(), mean, rtol=0, atol=1e-6)
    averager.update()
    with averager.applied():
        assert not torch.allclose(state(model)["1.running_mean"].double(), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("data", "message"), [([], "the data has no batches"), ([object()], "a batch holds a object.*forward=lambda")]
)
def test_a_refresh_that_fails_changes_nothing(data, message):
    model = net()
    averager = flatmin.Averager(model, "mean")
    train(model, 3, averager)
    averager.refresh(batches())
    with averager.applied():
        shown = state(model)
    before, momentum = state(model), model[1].momentum
    with pytest.raises(ValueError, match=message):
        averager.refresh(data)
    assert_same(state(model), before)
    assert model[1].momentum == momentum
    assert all(part.training for part in model.modules())
    with averager.applied():
        assert_same(state(model), shown)


def test_stale_statistics_are_announced_once():
    model = net()
    averager = flatmin.Averager(model, "mean")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with averager.applied():  # no average yet: the statistics are those of the weights
            pass
        train(model, 3, averager)
        averager.refresh(batches())
        with averager.applied():
            pass
    train(model, 1, averager)
    with (
        pytest.warns(RuntimeWarning, match=r"statistics of batch norm.*Call averager\.refresh\(loader\)") as caught,
        averager.applied(),
    ):
        pass
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with averager.applied():
            pass


def test_frozen_statistics_are_not_stale():
    model = net().eval()  # as in fine-tuning with batch norm as it was
    averager = flatmin.Averager(model, "mean")
    train(model, 3, averager)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with averager.applied():
            pass


def fine_tuned():
    """A model with batch norm as it was before, and statistics that are loaded after the averager is made."""
    model = net()
    averager = flatmin.Averager(model, "mean")
    norms: list[Any] = [part for part in model.modules() if isinstance(part, nn.BatchNorm1d)]
    for norm in norms:
        norm.eval().running_mean.fill_(0.5)
    train(model, 3, averager)
    return averager, norms


def test_frozen_statistics_that_were_loaded_are_not_stale():
    averager, _ = fine_tuned()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with averager.applied():
            pass


def test_refresh_leaves_frozen_statistics():
    averager, norms = fine_tuned()
    averager.refresh(batches())
    with averager.applied():
        assert norms
        for norm in norms:
            assert norm.running_mean.eq(0.5).all()
            assert norm.running_var.eq(1).all()


@pytest.mark.parametrize(
    ("options", "length"),
    [({"num_steps": 8}, 8), ({"start": 3, "num_steps": 8}, None), ({"kind": "mean", "num_steps": 8}, None)],
)
def test_a_run_longer_than_its_tail_was_told_is_announced_once(options, length):
    model = nn.Linear(2, 1)
    averager = flatmin.Averager(model, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            averager.update()
    if length is not None:
        with pytest.warns(RuntimeWarning, match=r"more often than num_steps=8 says: the tail began at step 7"):
            averager.update()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        averager.update()
    assert averager.num_averaged == len(range(7, 11)) if length else averager.num_averaged > 6


def test_a_longer_run_that_is_loaded_is_announced_too():
    whole, short = (flatmin.Averager(nn.Linear(2, 1), num_steps=steps) for steps in (20, 8))
    for _ in range(10):
        whole.update()
    short.load_state_dict(whole.state_dict())
    with pytest.warns(RuntimeWarning, match="more often than num_steps=8 says"):
        short.update()


def test_refresh_without_batch_norm_reads_no_data():
    averager = flatmin.Averager(nn.Linear(2, 1), "mean")
    averager.refresh(iter(lambda: pytest.fail("read"), None))


# -- resuming ----------------------------------------------------------------------------------------------------------


def stored(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("options", [{"kind": "mean"}, {"kind": "ema", "decay": 0.9}, {"start": 6}, {"start": 12}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_equals_an_uninterrupted_one(options, dtype):
    whole = net().to(dtype)
    averager = flatmin.Averager(whole, every=2, **options)
    train(whole, 8, averager)
    averager.refresh([x.to(dtype) for x, _ in batches()])
    checkpoint = stored({"model": whole.state_dict(), "averager": averager.state_dict()})

    again = net(seed=5).to(dtype)
    resumed = flatmin.Averager(again, every=2, **options)
    train(again, 3, resumed)  # what it saw before is forgotten
    again.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["averager"])
    for steps in (0, 9):
        train(whole, steps, averager, seed=2)
        train(again, steps, resumed, seed=2)
        assert resumed.num_averaged == averager.num_averaged
        assert_same(resumed.state_dict()["averages"], averager.state_dict()["averages"])
        with averager.applied(), resumed.applied():
            assert_same(state(again), state(whole))


@pytest.mark.parametrize(("saved", "average"), [(6, 6), (8, 7.5), (12, 9.5)])
@pytest.mark.filterwarnings("ignore:.*more often than num_steps")
def test_a_run_resumed_as_a_longer_one_averages_the_tail_of_the_longer_one(saved, average):
    model = nn.Linear(1, 1, bias=False)

    def go(averager, *steps):  # the weight after each step is the number of the step
        for step in steps:
            nn.init.constant_(model.weight, step)
            averager.update()

    shorter, longer = (flatmin.Averager(model, num_steps=n) for n in (8, 16))  # tails from steps 7 and 13 on
    go(shorter, *range(1, saved + 1))
    longer.load_state_dict(stored(shorter.state_dict()))
    assert float(averages(longer)["weight"]) == average  # as it was saved, for who only evaluates
    go(longer, *range(saved + 1, 13))
    go(longer, 13, 14, 15, 16)
    assert longer.num_averaged == 4
    assert float(averages(longer)["weight"]) == 14.5


def test_the_state_is_tensors_and_numbers():
    averager = flatmin.Averager(net(), "mean")
    assert averager.state_dict() == {"num_updates": 0, "num_averaged": 0, "averages": {}, "statistics": {}}
    train(averager._model, 2, averager)
    averager.refresh(batches())

    def leaves(value):
        return [x for v in value.values() for x in leaves(v)] if isinstance(value, dict) else [value]

    assert {type(leaf) for leaf in leaves(averager.state_dict())} == {int, torch.Tensor}
    assert len(leaves(averager.state_dict())) == 2 + 6 + 3


def test_the_state_of_another_model_is_refused():
    other = flatmin.Averager(nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(8)), "mean")
    other.update()
    averager = flatmin.Averager(net(), "mean")
    train(averager._model, 2, averager)
    before = copy.deepcopy(averager.state_dict())
    with pytest.raises(ValueError, match=r"another model: 0.bias, 0.weight, 4.bias, 4.weight differ"):
        averager.load_state_dict(other.state_dict())
    assert_same(averager.state_dict()["averages"], before["averages"])


@pytest.mark.parametrize("form", ["loop", "closure"])
def test_a_training_step_inside_is_refused(form):
    model = nn.Linear(2, 1)
    optimizer = flatmin.SAM(SGD(model.parameters(), lr=0.1))
    averager = flatmin.Averager(model, kind="mean")

    def step():
        if form == "closure":
            return optimizer.step(lambda: model(torch.ones(1, 2)).sum())
        return next(iter(optimizer.probes()))

    with averager.applied(), pytest.raises(ValueError, match=r"inside averager.applied\(\)"):
        step()
    other = nn.Linear(2, 1)
    with averager.applied():  # another model may train
        for _ in (aside := flatmin.SAM(SGD(other.parameters(), lr=0.1))).probes():
            other(torch.ones(1, 2)).sum().backward()
        aside.step()
    for _ in optimizer.probes():
        model(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def test_an_average_of_a_compiled_model_is_that_of_the_model():
    model = nn.Linear(2, 1)
    compiled: Any = torch.compile(model, backend="eager")
    averager = flatmin.Averager(compiled, kind="mean")
    averager.update()
    flatmin.Averager(model, kind="mean").load_state_dict(averager.state_dict())
    with averager.applied() as shown:
        assert shown is compiled
