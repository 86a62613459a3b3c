"""Contract 3 in somebody else's loop: micro-batches that come one at a time, scalers that step by themselves.

Accumulation has two meanings. A window evaluates all micro-batches at the same points and equals one batch; a share
perturbs each micro-batch by itself.
"""

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from flatmin.optim.engine.window import Window
from tests.contracts.cases import METHODS, OPTIONS, Case, assert_same, build, differs, each_method

WHOLE = [m for m in METHODS if m not in ("sap", "esam", "nso-split", "rwp")]
each_whole_method = pytest.mark.parametrize("method", WHOLE)
PIECES = [slice(i, i + 16) for i in range(0, 64, 16)]


def close(a: Case, b: Case) -> None:
    for (name, p), q in zip(a.model.named_parameters(), b.model.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], atol=2e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def window_step(case: Case, between=lambda: None, scaler: GradScaler | None = None) -> None:
    """As a framework drives it."""

    def evaluate(number: int) -> None:
        loss = case.loss(PIECES[number]) / len(PIECES)
        (loss if scaler is None else scaler.scale(loss)).backward()

    window = Window(case.optimizer, case.model, scaler)
    for number in range(len(PIECES)):
        window.away()
        case.optimizer.zero_grad()  # as Lightning does inside its closure; the window collects gradients itself
        evaluate(number)
        window.home()
        between()
    window.finish(evaluate)


@each_whole_method
def test_a_window_of_micro_batches_equals_one_batch(method):
    whole, parts = Case(method), Case(method)
    for _ in range(3):
        whole.step()
        window_step(parts)
        parts.optimizer.step()
    close(whole, parts)


@each_whole_method
def test_between_micro_batches_the_weights_are_at_home(method):
    case = Case(method, model_name="batchnorm")
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    window_step(case, lambda: assert_same(dict(case.model.named_parameters()), before))
    assert case.model.get_buffer("1.num_batches_tracked") == len(PIECES)  # as if it had not been perturbed
    case.optimizer.step()
    assert differs(dict(case.model.named_parameters()), before)


@pytest.mark.parametrize("method", ["sam", "nso"])
def test_each_micro_batch_has_one_dropout_mask_whatever_is_drawn_in_between(method):
    case, masks = Case(method, model_name="dropout"), []
    layer = case.model.get_submodule("1")
    layer.register_forward_hook(lambda _m, args, out: masks.append((out != 0) | (args[0] == 0)))
    window_step(case, lambda: torch.rand(3))
    assert len(masks) == 2 * len(PIECES)
    for first, later in zip(masks[:4], masks[4:], strict=True):
        assert torch.equal(first, later)
    assert not torch.equal(masks[0], masks[1])


@each_whole_method
def test_a_window_that_is_closed_leaves_no_trace(method):
    case = Case(method)
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    window = Window(case.optimizer, case.model)
    window.away()
    window.close()
    assert_same(dict(case.model.named_parameters()), before)
    case.step()


def framework_step(scaler: GradScaler, case: Case, clip: float | None = None) -> None:
    """What Accelerate, Lightning and the Trainer do in fp16."""
    if clip is not None:
        scaler.unscale_(case.optimizer)
        nn.utils.clip_grad_norm_(case.model.parameters(), clip)
    scaler.step(case.optimizer)
    scaler.update()


def new_scaler() -> GradScaler:
    return GradScaler("cpu", init_scale=65536.0, growth_interval=1000)


@each_whole_method
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_framework_may_own_the_scaler(method, clip):
    plain, case, scaler = Case(method), Case(method), new_scaler()
    for _ in range(3):
        for _ in plain.optimizer.probes():
            plain.loss().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(plain.model.parameters(), clip)
        plain.optimizer.step()
        for _ in case.optimizer.probes(scaler, rescale=True):
            scaler.scale(case.loss()).backward()
        framework_step(scaler, case, clip)
    close(plain, case)
    assert scaler.get_scale() == 65536.0
    window_step(case, scaler=scaler)
    framework_step(scaler, case)
    plain.step()
    close(plain, case)


@each_whole_method
@pytest.mark.parametrize("poison", [0, 1])
def test_an_overflow_in_any_probe_skips_a_step_that_the_framework_owns(method, poison):
    case, scaler = Case(method, "adamw", "batchnorm"), new_scaler()
    if poison >= case.optimizer.gradients_per_step:
        pytest.skip("the rule asks for one gradient only")
    before = case.snapshot()
    for number, _ in enumerate(case.optimizer.probes(scaler, rescale=True)):
        scaler.scale(case.loss()).backward()
        if number == poison:
            next(p.grad for p in case.model.parameters() if p.grad is not None).view(-1)[0] = torch.inf
    # The framework has to see it, since it asks for schedulers whether the step was skipped.
    assert not all(p.grad is None or p.grad.isfinite().all() for p in case.model.parameters())
    framework_step(scaler, case, 0.1)
    assert scaler.get_scale() == 32768.0
    case.optimizer.zero_grad()
    after = case.snapshot()
    assert_same({k: v for k, v in after.items() if k != "rng"}, {k: v for k, v in before.items() if k != "rng"})
    assert (case.optimizer.num_skipped, case.optimizer.num_steps) == (1, 1)
    case.step()
    assert (case.optimizer.num_skipped, case.optimizer.num_steps) == (1, 2)


def test_scaled_gradients_are_not_stepped_along():
    case, scaler = Case("sam"), new_scaler()
    for _ in case.optimizer.probes(scaler, rescale=True):
        scaler.scale(case.loss()).backward()
    with pytest.raises(ValueError, match=r"still scaled(.|\n)*scaler.step\(opt\)"):
        case.optimizer.step()


@each_method
def test_gradients_are_not_unscaled_twice(method):
    case, scaler = Case(method), new_scaler()
    for _ in case.optimizer.probes(scaler):
        scaler.scale(case.loss()).backward()
    scaler.unscale_(case.optimizer)
    with pytest.raises(ValueError, match="would be unscaled twice"):
        case.optimizer.step()


def shared_step(case: Case, scaler: GradScaler | None = None, poison: int | None = None) -> None:
    """Each micro-batch perturbed by itself."""
    for number, rows in enumerate(PIECES):
        for _ in case.optimizer.probes(scaler, share=1 / len(PIECES)):
            loss = case.loss(rows)
            (loss if scaler is None else scaler.scale(loss)).backward()
            if number == poison:
                next(p.grad for p in case.model.parameters() if p.grad is not None).view(-1)[0] = torch.inf
    case.optimizer.step()


@each_method
def test_shares_sum_the_directions_of_the_micro_batches(method):
    if method in ("sap", "esam", "momentum-sam", "bsam") or Case(method).optimizer.is_random:
        pytest.skip("its draws differ from micro-batch to micro-batch, or there is no momentum yet")
    case = Case(method)
    start = case.snapshot()
    total: dict[str, torch.Tensor] = {}
    for rows in PIECES:
        part = Case(method)
        for _ in part.optimizer.probes():
            part.loss(rows).backward()
        for name, p in part.model.named_parameters():
            assert p.grad is not None
            total[name] = total.get(name, 0) + p.grad / len(PIECES)
    for rows in PIECES:
        for _ in case.optimizer.probes(share=1 / len(PIECES)):
            case.loss(rows).backward()
    assert_same(
        {k: v for k, v in case.snapshot().items() if k != "rng"}, {k: v for k, v in start.items() if k != "rng"}
    )
    if method != "friendly-sam":  # it remembers the mean of the gradients that it has seen, so the order matters
        for name, p in case.model.named_parameters():
            torch.testing.assert_close(p.grad, total[name], atol=1e-6, rtol=1e-5)
    case.optimizer.step()
    assert case.optimizer.num_steps == 1
    assert differs(case.snapshot(), start)


def test_every_micro_batch_draws_noise_of_its_own():
    case, moves = Case("nso", options={"antithetic": False}), []
    weight = case.model.get_parameter("0.weight")
    before = weight.detach().clone()
    for rows in PIECES[:2]:
        for _ in case.optimizer.probes(share=0.5):
            moves.append(weight.detach() - before)
            case.loss(rows).backward()
    assert differs({"u": moves[0]}, {"u": moves[1]})
    case.optimizer.step()


@each_method
def test_an_overflow_in_an_earlier_micro_batch_skips_the_step(method):
    case, scaler = Case(method, model_name="batchnorm"), new_scaler()
    before = case.snapshot()
    shared_step(case, scaler, poison=0)
    after = case.snapshot()
    assert_same({k: v for k, v in after.items() if k != "rng"}, {k: v for k, v in before.items() if k != "rng"})
    assert (scaler.get_scale(), case.optimizer.num_skipped) == (32768.0, 1)
    shared_step(case, scaler)
    assert differs(case.snapshot(), before)


def test_a_share_is_not_continued_by_a_loop_without_one():
    case = Case("sam")
    for _ in case.optimizer.probes(share=0.5):
        case.loss().backward()
    with pytest.raises(ValueError, match="was not called"):
        next(iter(case.optimizer.probes()))


def test_the_shares_of_a_decoupled_rule_are_summed_too():
    options = {**OPTIONS.get("wsam", {}), "decouple": True}
    a, b = Case("wsam", options=options), Case("wsam", options=options)
    a.loop_step()
    for _ in range(2):
        for _ in b.optimizer.probes(share=0.5):
            b.loss().backward()
    b.optimizer.step()
    close(a, b)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, in its compiler
@pytest.mark.parametrize("method", ["sam", "nso", "monge-sam"])
def test_a_compiled_model_and_base_step_do_not_recompile(method):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    compiled = torch.compile(model, backend="aot_eager")
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    base.step = torch.compile(base.step, backend="eager")
    opt = build(method, base, model=model)
    x, y = torch.randn(16, 6), torch.randint(3, (16,))

    def step() -> None:
        for _ in opt.probes():
            nn.functional.cross_entropy(compiled(x), y).backward()
        opt.step()

    for _ in range(3):
        step()
    warm = {key: dict(counters[key]) for key in ("stats", "frames")}
    assert warm["frames"]["ok"] >= 2
    for _ in range(5):
        step()
    assert {key: dict(counters[key]) for key in ("stats", "frames")} == warm
    assert model[1].num_batches_tracked == 8
