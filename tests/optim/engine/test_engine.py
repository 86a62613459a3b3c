"""The engine run by rules made for the test: mixed probes, parts of a batch, memory, drift."""

import pytest
import torch
from torch.optim import SGD, Adam

from flatmin.optim import HERE, FlatOptimizer, Probe
from flatmin.optim.parts import half, some, take_rows
from flatmin.optim.rule import Update, drive
from flatmin.radii import Radii
from flatmin.vectors import Vector
from tests.contracts.cases import write_into


def optimizer_of(make_rule, gradients, random=False, remembers=()):
    class Made(FlatOptimizer):
        radius_name = "rho"
        is_random = random

        def __init__(self, base, rho=1.0, **options):
            super().__init__(base, rho, **options)

        def rule(self):
            return make_rule(self)

        @property
        def gradients_per_step(self):
            return gradients

    Made.remembers = remembers
    return Made


def run(optimizer, weight, form, loss=lambda w: w.square().sum() / 2):
    def closure():
        optimizer.zero_grad()
        value = loss(weight)
        value.backward()
        return value

    if form == "closure":
        optimizer.step(closure)
    else:
        for _ in optimizer.probes():
            loss(weight).backward()
        optimizer.step()
    return weight.grad


ORDERS = {
    "weighted first": lambda o: mixed_first(o.radii()),
    "handed out last": lambda o: handed_out_last(o.radii()),
    "a weight of zero": lambda o: with_zero(o.radii()),
}


def mixed_first(rho):
    yield Probe(weight=0.5)
    g = yield HERE
    yield Probe(rho.along(g), weight=0.5)


def handed_out_last(rho):
    yield Probe(weight=0.5)
    yield Probe(weight=0.25)
    yield HERE


def with_zero(rho):
    yield Probe(weight=0.5)
    yield Probe(weight=0.0)
    yield Probe(weight=0.25)


@pytest.mark.parametrize("form", ["closure", "loop"])
@pytest.mark.parametrize("name", list(ORDERS))
def test_weighted_and_handed_out_probes_mix_in_any_order(name, form):
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = optimizer_of(ORDERS[name], 3)(SGD([weight], lr=0.0))
    # On |w|^2 / 2 the gradient is w, and at w + w / |w| it is w (1 + 1/5).
    factor = {"weighted first": 0.5 + 0.5 * 1.2}.get(name, 0.75)
    torch.testing.assert_close(run(optimizer, weight, form), factor * torch.tensor([3.0, 4.0]))


def test_a_rule_receives_the_same_when_driven_and_when_run():
    received = []

    def rule(_=None):
        received.append((yield Probe(weight=1.0)))

    drive(rule(), [torch.ones(2)], Vector)
    weight = torch.nn.Parameter(torch.ones(2))
    run(optimizer_of(rule, 1)(SGD([weight], lr=0.0)), weight, "loop")
    assert [len(v) for v in received] == [0, 0]


def test_noise_that_is_drawn_before_the_rule_starts_is_part_of_the_stream():
    seen = []

    def make(o):
        u = o.noise("normal", Radii([1.0]))

        def rule():
            yield Probe(u, weight=0.5)
            v = o.noise("normal", Radii([1.0]))
            seen.append((u.vector().present[0], v.vector().present[0]))
            yield Probe(v, weight=0.5)

        return rule()

    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = optimizer_of(make, 2, random=True)(SGD([weight], lr=0.1), seed=0)
    run(optimizer, weight, "closure")
    run(optimizer, weight, "closure")
    draws = [d for pair in seen for d in pair]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_a_gradient_buffer_of_the_callers_own():
    weight, buffer, seen = torch.nn.Parameter(torch.tensor([3.0])), torch.zeros(1), []

    def closure():
        value = (weight**4).sum()
        buffer.copy_(torch.autograd.grad(value, weight)[0])
        weight.grad = buffer
        seen.append(buffer.item())
        return value.detach()

    import flatmin

    optimizer = flatmin.NSO(SGD([weight], lr=0.0), sigma=1.0)
    optimizer.step(closure)
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(sum(seen) / 2)


def test_memory_is_kept_after_the_step_and_saved():
    def make(o):
        def rule():
            g = yield HERE
            old = o.memory.get("mean")
            o.memory["mean"] = g if old is None else old * 0.5 + g * 0.5
            return g

        return rule()

    weight, unused = torch.nn.Parameter(torch.tensor([3.0, 4.0])), torch.nn.Parameter(torch.ones(1))
    forgetful = optimizer_of(make, 1)(Adam([weight, unused], lr=0.0))
    with pytest.raises(ValueError, match=r"the rule remembers 'mean': let its class say so, remembers = \('mean',\)"):
        run(forgetful, weight, "closure")
    optimizer = optimizer_of(make, 1, remembers=("mean",))(Adam([weight, unused], lr=0.0))
    for _ in range(2):
        run(optimizer, weight, "closure")
    state = optimizer.state_dict()["state"]
    torch.testing.assert_close(state[0]["flatmin_mean"], torch.tensor([3.0, 4.0]))
    assert state[0]["step"] == 2
    assert 1 not in state
    with pytest.warns(RuntimeWarning, match="skipped"):
        run(optimizer, weight, "closure", lambda w: w.sum() * torch.nan)
    kept = optimizer.memory.get("mean")
    assert kept is not None
    torch.testing.assert_close(kept.present[0], torch.tensor([3.0, 4.0]))


@pytest.mark.parametrize("factor", [None, 2.0])
def test_what_is_remembered_is_not_what_the_caller_clips_or_writes_over(factor):
    def make(o):
        def rule():
            g = yield HERE
            o.memory["last"] = g
            return g if factor is None else g * factor

        return rule()

    weight, memory = torch.nn.Parameter(torch.tensor([3.0, 4.0])), torch.zeros(2)
    write_into(weight, memory)
    optimizer = optimizer_of(make, 1, remembers=("last",))(SGD([weight], lr=0.0))
    for _ in optimizer.probes():
        (weight.square().sum() / 2).backward()
    torch.nn.utils.clip_grad_norm_([weight], 1.0)
    optimizer.step()
    memory.zero_()
    assert torch.equal(optimizer.state[weight]["flatmin_last"], torch.tensor([3.0, 4.0]))


@pytest.mark.parametrize("form", ["closure", "loop"])
def test_drift_is_subtracted_after_the_base_step_at_the_groups_rate(form):
    def make(o):
        def rule():
            g = yield HERE
            return Update(g, g * 10.0)

        return rule()

    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    run(optimizer_of(make, 1)(SGD([weight], lr=0.01, momentum=0.9)), weight, form)
    torch.testing.assert_close(weight.detach(), torch.tensor([1.0, 2.0]) * (1 - 0.01 - 0.1))


def test_parts_of_a_batch():
    x, y = torch.arange(10).view(5, 2), torch.arange(5)
    first, second = Probe(part=half(0)), Probe(part=half(1))
    assert torch.equal(first.take(y), y[:2])
    assert torch.equal(second.take(y), y[2:])
    a, b = second.take(x, {"labels": y, "names": ["a"]})
    assert torch.equal(a, x[2:])
    assert torch.equal(b["labels"], y[2:])
    one = some(1, seed=3)
    assert one(100) == one(100) != some(1, seed=4)(100)
    assert torch.equal(take_rows((x,), one(5))[0], x[one(5)])
    with pytest.raises(ValueError, match="a batch of 1 cannot be split in two"):
        first.take(y[:1])
    assert Probe().take(x) is x


def part_rule(_):
    def rule():
        yield Probe(part=half(0), weight=1.0)

    return rule()


def test_a_rule_on_parts_says_when_take_is_forgotten():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = optimizer_of(part_rule, 1)(SGD([weight], lr=0.1))
    for form in ("closure", "loop"):
        with pytest.raises(ValueError, match=r"take\(\) was not called"):
            run(optimizer, weight, form)
        optimizer.zero_grad()
    run(optimizer, weight, "closure", lambda w: (optimizer.take(torch.ones(4, 2)) @ w).mean())
    assert optimizer.num_steps == 1


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_parameters_of_several_dtypes(dtypes):
    import flatmin

    weights = [torch.nn.Parameter(torch.full((2,), 3.0, dtype=d)) for d in dtypes]
    optimizer = flatmin.SAM(SGD(weights, lr=0.0), rho=1.0)

    def closure():
        optimizer.zero_grad()
        loss = sum((w.double().square().sum() / 2 for w in weights), torch.zeros((), dtype=torch.float64))
        loss.backward()
        return loss

    optimizer.step(closure)
    for w in weights:  # norm 6: each entry 3 + 3 / 6
        assert w.grad is not None
        torch.testing.assert_close(w.grad.double(), torch.full((2,), 3.5).double())
