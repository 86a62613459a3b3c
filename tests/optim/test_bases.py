"""Any rule around any base: adaptive, fused, foreach, orthogonalising, schedule-free and sign-based ones."""

import copy

import pytest
import schedulefree
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop

import flatmin
from flatmin.optim.registry import get_method
from tests.contracts.cases import build, each_method

BASES = {
    "sgd-foreach": lambda p: SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "sgd-fused": lambda p: SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam-amsgrad": lambda p: Adam(p, lr=0.01, amsgrad=True),
    "adamw-foreach": lambda p: AdamW(p, lr=0.01, foreach=True),
    "adagrad": lambda p: Adagrad(p, lr=0.05),
    "rmsprop": lambda p: RMSprop(p, lr=0.01),
    "nadam": lambda p: NAdam(p, lr=0.01),
    "radam": lambda p: RAdam(p, lr=0.05),
    "adamax": lambda p: Adamax(p, lr=0.02),
    "schedule-free": lambda p: schedulefree.SGDScheduleFree(p, lr=0.5),
}
if hasattr(torch.optim, "Muon"):  # torch 2.9
    BASES["muon"] = lambda p: torch.optim.Muon(p, lr=0.02)
WITHOUT_MOMENTUM = ("adagrad", "rmsprop", "schedule-free")
each_base = pytest.mark.parametrize("base", list(BASES))


def matrices():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 6, generator=generator)
    return x, (x @ torch.randn(6, 3, generator=generator)).argmax(1)


def train(model, optimizer, steps):
    x, y = data()

    def closure():
        optimizer.zero_grad()
        inputs, labels = getattr(optimizer, "take", lambda *batch: batch)(x, y)
        losses = nn.functional.cross_entropy(model(inputs), labels, reduction="none")
        loss = getattr(optimizer, "mean", torch.mean)(losses)
        loss.backward()
        return loss

    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(steps):
        optimizer.step(closure)
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(x), y))


def skip_without_momentum(method, base):
    if method == "momentum-sam" and base in WITHOUT_MOMENTUM:
        pytest.skip("it needs a momentum buffer, and says so: test_momentum_sam_without_momentum_says_so")


@each_method
@each_base
def test_it_trains_and_is_the_base_at_radius_zero(method, base):
    skip_without_momentum(method, base)
    radius = get_method(method).radius_name or ""
    ends = {}
    for name, value in (("base", None), ("zero", 0.0), ("some", 0.01)):
        model = matrices()
        before = train(model, SGD(model.parameters(), lr=0.1), 0)
        plain = BASES[base](model.parameters())
        optimizer = plain if value is None else build(method, plain, **{radius: value})
        assert train(model, optimizer, 20) < 0.9 * before
        ends[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(ends["base"], ends["zero"])
    assert not torch.equal(ends["base"], ends["some"])


def test_train_and_eval_are_the_bases_where_it_has_them():
    model = matrices()
    assert not hasattr(flatmin.SAM(SGD(model.parameters(), lr=0.1)), "train")
    optimizer = flatmin.SAM(schedulefree.SGDScheduleFree(model.parameters(), lr=0.5))
    train(model, optimizer, 5)
    averaged = [p.detach().clone() for p in model.parameters()]
    optimizer.train()  # the weights are those of the gradient again
    assert not any(torch.equal(a, p) for a, p in zip(averaged, model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["Lion", "SignSGD", "Rprop"])
def test_a_base_that_steps_by_signs_is_warned_of(name):
    base = type(name, (SGD,), {})(matrices().parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=f"SAM around {name}: an update by signs alone"):
        flatmin.SAM(base)


def test_lbfgs_is_refused():
    with pytest.raises(ValueError, match="cannot wrap LBFGS"):
        flatmin.SAM(LBFGS(matrices().parameters()))


def test_an_option_of_the_base_that_has_the_name_of_ours_is_refused():
    base = Adadelta(matrices().parameters(), rho=0.9)
    with pytest.raises(ValueError, match="SAM cannot wrap Adadelta, which has a group option 'rho' of its own"):
        flatmin.SAM(base)
    flatmin.NSO(base)  # its radius is sigma


@each_method
def test_only_some_of_the_time(method):
    """Steps 1, 4 and 7 are the method's, all others those of the base, bit for bit."""
    start, every, stop = 1, 3, 8
    model, control = matrices(), matrices()
    radius = get_method(method).radius_name or ""
    optimizer = build(
        method, SGD(model.parameters(), lr=0.05, momentum=0.9), **{radius: 0.05}, start=start, every=every, stop=stop
    )
    plain = SGD(control.parameters(), lr=0.05, momentum=0.9)
    perturbed = []
    for step in range(10):
        control.load_state_dict(model.state_dict())
        plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(model, optimizer, 1)
        train(control, plain, 1)
        same = all(torch.equal(p, q) for p, q in zip(model.parameters(), control.parameters(), strict=True))
        if not same:
            perturbed.append(step)
    assert perturbed == [1, 4, 7]
