"""Contract 7: with a GradScaler the rule sees unscaled gradients, and an overflow in any probe changes nothing."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.amp.grad_scaler import GradScaler

from tests.contracts.cases import Case, assert_same, each_base, each_method

# Rules that only add gradients up: they may be unscaled afterwards, by the usual scaler.step(opt).
ADDING = ("nso", "nso-one-point", "nso-split", "rwp")


def scaler():
    return GradScaler("cpu", init_scale=65536.0, growth_interval=1000)


def scaled_step(case: Case, scale: GradScaler, form: str, poison: int | None = None) -> None:
    """One step with scaled losses; the gradient of probe number `poison` overflows."""
    calls = 0

    def evaluate():
        nonlocal calls
        loss = case.loss()
        scale.scale(loss).backward()
        if calls == poison:
            first = next(p for p in case.model.parameters() if p.grad is not None)
            assert first.grad is not None
            first.grad.view(-1)[0] = torch.inf
        calls += 1
        return loss

    def closure():
        case.optimizer.zero_grad()
        return evaluate()

    if form == "closure":
        case.optimizer.step(closure, scaler=scale)
    else:
        for _ in case.optimizer.probes(scale):
            evaluate()
        case.optimizer.step()


each_form = pytest.mark.parametrize("form", ["closure", "loop"])


@each_method
@each_base
@each_form
def test_a_scale_of_65536_gives_the_same_update(method, base, form):
    plain, scaled, scale = Case(method, base), Case(method, base), scaler()
    for _ in range(3):
        plain.step() if form == "closure" else plain.loop_step()
        scaled_step(scaled, scale, form)
    # The scale is a power of two: nothing is rounded. (A sum of scaled gradients may be rounded elsewhere.)
    for p, q in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert scale.get_scale() == 65536.0
    assert scaled.optimizer.num_skipped == 0


@each_method
@each_form
@pytest.mark.parametrize("poison", [0, 1])
def test_an_overflow_in_any_probe_changes_nothing_and_halves_the_scale(method, form, poison):
    case, scale = Case(method, "adamw", "batchnorm"), scaler()
    scaled_step(case, scale, form)
    if poison == 1 and case.optimizer.gradients_per_step < 2 and method not in ("nso-split", "rwp"):
        pytest.skip("the rule asks for one gradient only")
    if method == "looksam":
        scaled_step(case, scale, form)  # the step after next takes a second gradient again
    before = case.snapshot()
    state = [{k: v.clone() for k, v in s.items()} for s in case.optimizer.state.values()]
    scaled_step(case, scale, form, poison)
    after = case.snapshot()
    assert_same({k: v for k, v in after.items() if k != "rng"}, {k: v for k, v in before.items() if k != "rng"})
    for old, new in zip(state, case.optimizer.state.values(), strict=True):
        assert_same(old, new)
    assert case.optimizer.num_skipped == 1
    assert scale.get_scale() == 32768.0
    scaled_step(case, scale, form)
    assert case.optimizer.num_skipped == 1


@each_method
def test_a_closure_through_scaler_step_raises(method):
    case, scale = Case(method), scaler()

    def closure():
        case.optimizer.zero_grad()
        loss = case.loss()
        scale.scale(loss).backward()
        return loss

    scale.scale(case.loss()).backward()
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"Call opt.step\(\) \(or opt.step\(closure, scaler=scaler\)\) instead"):
        scale.step(case.optimizer, closure)  # positional: past the scaler's own check
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler().step(case.optimizer, closure=closure)
    assert_same(case.model.state_dict(), before)


@each_method
def test_scaler_step_after_a_loop(method):
    plain, case, scale = Case(method), Case(method), scaler()
    with pytest.warns(RuntimeWarning, match="gradient norm") if method == "monge-sam" else nullcontext():
        for _ in case.optimizer.probes():
            scale.scale(case.loss()).backward()
    if method not in ADDING:
        with pytest.raises(ValueError, match=r"Pass the scaler: for probe in opt.probes\(scaler\)"):
            scale.step(case.optimizer)
        return
    scale.step(case.optimizer)
    scale.update()
    plain.loop_step()
    for p, q in zip(plain.model.parameters(), case.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@each_method
def test_scaler_step_after_a_loop_that_had_the_scaler_raises(method):
    case, scale = Case(method), scaler()
    for _ in case.optimizer.probes(scale):
        scale.scale(case.loss()).backward()
    with pytest.raises(ValueError, match="the gradients would be unscaled twice"):
        scale.step(case.optimizer)


def test_unscale_clip_and_step_as_usual():
    plain, case, scale = Case("nso"), Case("nso"), scaler()
    for _ in case.optimizer.probes():
        scale.scale(case.loss()).backward()
    scale.unscale_(case.optimizer)
    torch.nn.utils.clip_grad_norm_(case.model.parameters(), 0.1)
    scale.step(case.optimizer)
    scale.update()
    for _ in plain.optimizer.probes():
        plain.loss().backward()
    torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 0.1)
    plain.optimizer.step()
    for p, q in zip(plain.model.parameters(), case.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@each_method
def test_a_scaler_that_is_switched_off_is_none(method):
    plain, case = Case(method), Case(method)
    scaled_step(case, GradScaler("cpu", enabled=False), "closure")
    plain.step()
    assert_same(plain.model.state_dict(), case.model.state_dict())


@each_method
def test_a_framework_finds_everything_as_before_as_soon_as_a_probe_has_overflowed(method):
    """Not only at the next call: it may evaluate, save or load in between."""
    case, scale = Case(method, model_name="batchnorm"), GradScaler("cpu", init_scale=16.0)

    def step(factor: float = 1.0) -> None:
        for _ in case.optimizer.probes(scale, rescale=True):
            scale.scale(case.loss() * factor).backward()
        scale.unscale_(case.optimizer)
        scale.step(case.optimizer)
        scale.update()

    step()
    saved = {k: v.clone() for k, v in case.model.state_dict().items()}
    optimizer_saved = copy.deepcopy(case.optimizer.state_dict())
    step()
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    step(torch.inf)
    assert_same(case.model.state_dict(), before)
    assert (case.optimizer.num_steps, case.optimizer.num_skipped) == (3, 1)
    case.model.load_state_dict(saved)
    case.optimizer.load_state_dict(optimizer_saved)
    case.optimizer.zero_grad()
    assert_same(case.model.state_dict(), saved)
    assert (case.optimizer.num_steps, case.optimizer.num_skipped) == (1, 0)
    step()
    assert_same(case.model.state_dict(), before)


@each_method
def test_loading_drops_a_direction_and_puts_no_buffers_back(method):
    case = Case(method, model_name="batchnorm")
    case.loop_step()
    saved, state = (
        {k: v.clone() for k, v in case.model.state_dict().items()},
        copy.deepcopy(case.optimizer.state_dict()),
    )
    for _ in case.optimizer.probes():
        case.loss().backward()
    case.model.load_state_dict(saved)
    case.optimizer.load_state_dict(state)
    case.loop_step()
    again = Case(method, model_name="batchnorm")
    again.loop_step()
    again.loop_step()
    assert_same(case.model.state_dict(), again.model.state_dict())


@pytest.mark.parametrize("how", ["load_state_dict", "zero_grad", "an exception"])
def test_a_direction_that_was_dropped_leaves_nothing_with_the_scaler(how):
    """The scaler knows gradients by an id, which the next ones may get."""
    case, scale = Case("sam"), scaler()
    for _ in range(50):
        for number, _ in enumerate(case.optimizer.probes(scale)):
            scale.scale(case.loss()).backward()
            if how == "an exception" and number == 1:
                break
        if how == "load_state_dict":
            case.optimizer.load_state_dict(case.optimizer.state_dict())
        else:
            case.optimizer.zero_grad()
    scaled_step(case, scale, "loop")
    assert case.optimizer.num_steps == 1
