"""What stands beside a step: frozen layers, other optimizers, micro-batches that fail, groups and choices that lie."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW

import flatmin
from tests.contracts.cases import METHODS, Case, build, each_method, each_whole_method


@each_method
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_a_layer_that_is_frozen_on_the_way_stays_where_it_is(method, base):
    case = Case(method, base, options={"k": 5} if method == "looksam" else {}).run(1)
    first, last = case.model.get_submodule("0"), case.model.get_parameter("2.weight")
    first.requires_grad_(False)
    weight = first.get_parameter("weight")
    before, free = weight.clone(), last.clone()
    for p in first.parameters():
        p.grad = None
    case.run(4)
    assert torch.equal(weight, before)
    assert not torch.equal(last, free)


def gradients(module):
    """Copies."""
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@each_whole_method
def test_a_micro_batch_that_fails_takes_nothing_from_the_others(method):
    def loop(case, rows, error=None):
        for _ in case.optimizer.probes(share=1 / 2):
            case.loss(rows).backward()
            if error:
                raise error

    case, other = Case(method).run(1), Case(method).run(1)
    first, last = slice(0, 20), slice(40, 64)
    loop(case, first)
    before = gradients(case.model)
    with pytest.raises(MemoryError):
        loop(case, slice(20, 40), MemoryError())
    assert same(gradients(case.model), before)
    for rows in (first, last):
        loop(other, rows)
    loop(case, last)
    assert not same(gradients(case.model), before)
    if not getattr(case.optimizer, "is_random", False):  # else the one that failed has used a draw
        assert same(gradients(case.model), gradients(other.model))
    case.optimizer.step()


def pair(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    both = [build(method, SGD(model[i].parameters(), lr=0.1, momentum=0.9)) for i in (0, 2)]
    x, y = torch.randn(32, 6), torch.randint(3, (32,))

    def loop(optimizer):
        for _ in optimizer.probes():
            inputs, labels = optimizer.take(x, y)
            optimizer.mean(F.cross_entropy(model(inputs), labels, reduction="none")).backward()

    return model, both, loop


@each_method
def test_the_loop_of_another_optimizer_adds_nothing_to_a_direction_that_stands(method):
    model, (first, second), loop = pair(method)
    loop(first)
    direction = gradients(model[0])
    loop(second)
    assert same(gradients(model[0]), direction)
    first.step()
    assert all(p.grad is not None for p in model[2].parameters())
    second.step()


def test_a_direction_comes_back_when_the_other_loop_is_left():
    model, (first, second), loop = pair("sam")
    loop(first)
    direction = gradients(model[0])
    probes = second.probes()
    next(probes)
    assert all(p.grad is None for p in model[0].parameters())
    probes.close()
    assert same(gradients(model[0]), direction)
    first.step()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (lambda model: model.named_parameters(), "perturb= takes parameters, got tuple"),
        (lambda model: ["0.weight"], "perturb= takes parameters, got str"),
        (lambda model: [], "names no parameter of the base optimizer.*It is empty"),
        (lambda model: nn.Linear(2, 2).parameters(), "Are they those of another model"),
    ],
)
def test_a_choice_that_matches_nothing_is_refused(chosen, message):
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=message):
        flatmin.SAM(SGD(model.parameters(), lr=0.1), perturb=chosen(model))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "base"])
@pytest.mark.parametrize("before", ["sam", "nso"])
def test_a_base_that_was_wrapped_before_has_all_that_a_method_needs(method, before):
    case = Case(before).run(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case.method, case.optimizer = method, build(method, case.optimizer.base)
    case.run(2)
    assert case.optimizer.num_steps == 3


def test_options_that_an_earlier_wrapper_left_are_announced():
    base = SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    flatmin.SAM(base, rho=0.01)
    with pytest.warns(UserWarning, match=r"have rho=0.01 from an earlier wrapper.*not with rho=0.1"):
        again = flatmin.SAM(base, rho=0.1)
    assert again.radii().values == (0.01, 0.01)
    base = SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    flatmin.NSO(base, seed=0)
    with pytest.warns(UserWarning, match="have seed=0"):
        flatmin.NSO(base, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flatmin.NSO(base, seed=0)
        flatmin.SAM(SGD([{"params": nn.Linear(2, 2).parameters(), "rho": 0.3}], lr=0.1), rho=0.1)


def test_a_group_that_maximises_is_refused_whenever_it_comes():
    optimizer = flatmin.SAM(SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    with pytest.raises(ValueError, match="SAM minimises"):
        optimizer.add_param_group({"params": nn.Linear(2, 2).parameters(), "maximize": True})
    assert len(optimizer.param_groups) == 1
    optimizer.base.add_param_group({"params": nn.Linear(2, 2).parameters(), "maximize": True})
    with pytest.raises(ValueError, match="SAM minimises"):
        next(optimizer.probes())


def test_a_forgotten_loop_is_noticed_at_learning_rate_zero_too():
    model = nn.Linear(2, 1)
    optimizer = flatmin.SAM(AdamW(model.parameters(), lr=0.0))  # the first step of a warm-up
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match="before any gradient"):
        optimizer.step()
    assert not optimizer.state


def test_a_group_that_the_base_gets_during_a_step_is_there_in_the_next():
    case = Case("sam")
    new = nn.Linear(2, 1)
    for _ in case.optimizer.probes():
        case.loss().backward()
    case.optimizer.base.add_param_group({"params": new.parameters()})
    case.optimizer.step()
    case.run(1)
    assert {group["num_steps"] for group in case.optimizer.param_groups} == {2}


@pytest.mark.parametrize("method", ["gsam", "looksam", "wsam", "friendly-sam", "eigen-sam", "sam", "nso"])
def test_a_complex_parameter_is_two_real_ones(method):
    def run(is_complex):
        torch.manual_seed(0)
        start = torch.randn(5, 2, dtype=torch.float64)
        weight = nn.Parameter(torch.view_as_complex(start) if is_complex else start)
        slope = torch.randn(5, 2, dtype=torch.float64)
        options = {"alpha": 0.0} if method == "eigen-sam" else {}  # its first vector is drawn in another order
        optimizer = build(method, SGD([weight], lr=0.1), **options)
        if method in ("nso", "friendly-sam"):
            for group in optimizer.param_groups:
                group[optimizer.radius_name] = 0.0 if method == "nso" else group[optimizer.radius_name]

        def closure():
            optimizer.zero_grad()
            pairs = torch.view_as_real(weight) if is_complex else weight
            loss = (pairs * slope).sum().sin() + (pairs**4).sum()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return torch.view_as_real(weight.detach()) if is_complex else weight.detach()

    torch.testing.assert_close(run(True), run(False), rtol=1e-12, atol=1e-14)


def test_rows_of_a_named_tuple_are_taken_by_field():
    from collections import namedtuple

    Batch = namedtuple("Batch", ["x", "y"])
    optimizer = flatmin.NSO(SGD([nn.Parameter(torch.zeros(1))], lr=0.1), split_batch=True)
    for _ in optimizer.probes():
        batch = optimizer.take(Batch(torch.arange(4.0), torch.arange(4)))
        assert isinstance(batch, Batch)
        assert len(batch.x) == 2
        optimizer.params[0].sum().backward()
    optimizer.step()


def test_the_second_gradient_is_every_k_th_perturbed_step():
    case = Case("looksam", options={"k": 2, "every": 2})
    counts = []
    for _ in range(8):
        count = 0
        for _ in case.optimizer.probes():
            case.loss().backward()
            count += 1
        case.optimizer.step()
        counts.append(count)
    assert counts == [2, 1, 1, 1, 2, 1, 1, 1]


@pytest.mark.parametrize("returned", [lambda loss: (loss, 0), lambda loss: {"loss": loss}])
def test_a_closure_that_returns_more_than_a_loss(returned):
    case = Case("sam")

    def closure():
        return returned(case.closure())

    before = case.snapshot()
    with pytest.raises(ValueError, match="let it return the loss alone"):
        case.optimizer.step(closure)
    assert all(torch.equal(v, before[k]) for k, v in case.snapshot().items() if k != "rng")


@pytest.mark.parametrize("scale", ["absolute", "filter"])
def test_frozen_parameters_may_be_of_any_type(scale):
    weight, table = nn.Parameter(torch.ones(3)), nn.Parameter(torch.arange(3), requires_grad=False)
    optimizer = flatmin.NSO(SGD([weight, table], lr=0.1), sigma=0.01, scale=scale)
    for _ in optimizer.probes():
        (weight * table).square().sum().backward()
    optimizer.step()
    assert torch.equal(table, torch.arange(3))


def test_numbers_of_numpy_are_radii_and_truth_values_are_none():
    import numpy as np

    base = SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    assert flatmin.SAM(base, rho=np.float32(0.5)).radii().values == (0.5, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rho must be a finite number >= 0, got True"):
        flatmin.SAM(SGD(nn.Linear(2, 2).parameters(), lr=0.1), rho=True)
