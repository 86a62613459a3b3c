"""Contract 2: weights are restored, always: in place, exact bits, whatever happens in between."""

import signal
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.nn.modules.module import _global_forward_pre_hooks

from tests.contracts.cases import MODELS, Case, Sometimes, assert_same, each_base, each_method, each_model
from tests.interrupts import InterruptAtANewPlace, Places

MODELS_HERE = {**MODELS, "sometimes": Sometimes}


class Boom(Exception):
    pass


@pytest.fixture
def sigint():
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background with the signal ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@each_method
@each_model
def test_at_learning_rate_zero_nothing_moves(method, model_name):
    case = Case(method, model_name=model_name)
    case.optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
    before = {k: v.detach().clone() for k, v in case.model.named_parameters()}
    case.run(10)
    assert_same(dict(case.model.named_parameters()), before)


@each_method
@pytest.mark.filterwarnings("ignore:EigenSAM. weights are stored in bfloat16, and")  # most of its displacement is small
def test_not_one_of_a_hundred_thousand_moves_makes_a_bf16_weight_drift(method, monkeypatch):
    monkeypatch.setitem(MODELS, "wide", lambda: nn.Sequential(nn.Linear(6, 256), nn.Tanh(), nn.Linear(256, 3)))
    case = Case(method, model_name="wide", dtype=torch.bfloat16, batch_size=4)
    case.optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    case.run(40)  # of 2,563 weights
    assert_same(case.model.state_dict(), before)


@each_method
@each_base
def test_parameters_stay_in_place(method, base):
    case = Case(method, base)
    pointers = [p.data_ptr() for p in case.model.parameters()]
    case.run(3)
    case.loop_step()
    assert [p.data_ptr() for p in case.model.parameters()] == pointers


@each_method
def test_a_parameter_without_a_gradient_in_a_later_probe_is_restored(method, monkeypatch):
    monkeypatch.setitem(MODELS, "sometimes", Sometimes)
    case = Case(method, model_name="sometimes")
    case.optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
    before = {k: v.detach().clone() for k, v in case.model.named_parameters()}
    case.run(4)
    assert_same(dict(case.model.named_parameters()), before)


def failing(case, form, failing_call, fail):
    """A step whose body calls `fail` at its n-th evaluation."""
    calls = 0

    def body():
        nonlocal calls
        calls += 1
        assert calls <= failing_call, "the body is evaluated after it has raised"
        loss = case.closure() if form == "closure" else case.loss()
        if calls == failing_call:
            fail()
        if form == "loop":
            loss.backward()
        return loss

    if form == "closure":
        case.optimizer.step(body)
    for _ in case.optimizer.probes():
        body()


@each_method
@pytest.mark.parametrize("failing_call", [1, 2])
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("form", ["closure", "loop"])
def test_weights_are_restored_when_the_body_raises(method, failing_call, error, form):
    case = Case(method)
    if failing_call > case.optimizer.gradients_per_step:
        pytest.skip("the rule asks for one gradient only")
    before = {k: v.detach().clone() for k, v in case.model.named_parameters()}

    def fail():
        raise error

    with pytest.raises(error):
        failing(case, form, failing_call, fail)
    assert_same(dict(case.model.named_parameters()), before)
    case.step()  # and the optimizer is usable again
    assert case.optimizer.num_steps == 1


@each_method
def test_weights_are_restored_when_the_loop_is_left(method):
    case = Case(method)
    before = {k: v.detach().clone() for k, v in case.model.named_parameters()}
    for _ in case.optimizer.probes():
        break
    assert_same(dict(case.model.named_parameters()), before)


@each_method
@pytest.mark.usefixtures("sigint")
def test_a_real_interrupt_signal_leaves_whole_weights(method):
    case = Case(method)
    before = {k: v.detach().clone() for k, v in case.model.named_parameters()}

    def closure():
        loss = case.closure()
        signal.raise_signal(signal.SIGINT)
        return loss

    with pytest.raises(KeyboardInterrupt):
        case.optimizer.step(closure)
    assert_same(dict(case.model.named_parameters()), before)


@each_method
@pytest.mark.parametrize("form", ["closure", "loop"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_while_an_error_is_handled_leaves_whole_weights(method, form, places_on_the_way_home):
    places = places_on_the_way_home[form]  # one of them is in the end of a generator, where python says "ignored"
    last = min(2, int(Case(method).optimizer.gradients_per_step))
    interrupted = True
    while interrupted:
        case = Case(method, batch_size=4)
        before = {k: v.detach().clone() for k, v in case.model.named_parameters()}
        interrupt = InterruptAtANewPlace(case.model, places, waits=True)

        def fail(interrupt=interrupt):
            interrupt.waits = False
            raise Boom

        with suppress(KeyboardInterrupt, Boom), interrupt:
            failing(case, form, last, fail)
        interrupted = interrupt.raised
        assert_same(dict(case.model.named_parameters()), before)
    assert len(places.met) > 10


@pytest.fixture(scope="module")
def places_on_the_way_home():
    """As `places`, after an error in the body."""
    return {"closure": Places(), "loop": Places()}


@pytest.fixture(scope="module")
def places():
    """Those of all methods together: nine of ten lines are the engine's. In each form of a step, which drive it."""
    return {"closure": Places(), "loop": Places()}


@each_method
@pytest.mark.parametrize("form", ["closure", "loop"])
def test_an_interrupt_at_any_line_leaves_whole_weights(method, form, places):
    hooks = len(_global_forward_pre_hooks)
    # WSAM applies a part of its step after the base optimizer; between the two the weights are the base's.
    ends = [Case(method, batch_size=4), *([Case("base", batch_size=4)] if method == "wsam" else [])]
    after = [dict(end.run(1).model.named_parameters()) for end in ends]
    while True:
        case = Case(method, batch_size=4)
        before = {k: v.detach().clone() for k, v in case.model.named_parameters()}
        with suppress(KeyboardInterrupt), InterruptAtANewPlace(case.model, places[form]) as interrupt:
            (case.step if form == "closure" else case.loop_step)()
        assert len(_global_forward_pre_hooks) == hooks, "a forward hook is left behind"
        allowed = after if case.optimizer.base.state else [before]  # whether the base optimizer had stepped
        found = dict(case.model.named_parameters())
        whole = [all(torch.allclose(found[k], end[k], rtol=0, atol=1e-7) for k in found) for end in allowed]
        assert any(whole), "the weights are displaced"
        if not case.optimizer.base.state:
            assert_same({k: v.detach() for k, v in found.items()}, before)
        if not interrupt.raised:
            break  # the whole step: there is no new place in it
    assert len(places[form].met) > 400


@each_method
def test_recompute_restores_to_rounding_when_the_body_raises(method):
    case = Case(method, options={"restore": "recompute"})
    before = {k: v.detach().clone() for k, v in case.model.named_parameters()}
    for probe in case.optimizer.probes():
        if not probe.at_weights:
            break
        case.loss().backward()
    for name, value in case.model.named_parameters():
        assert (value - before[name]).abs().max() < 1e-7  # an ulp of W + U; the displacement is 0.01 and more
