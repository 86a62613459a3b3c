"""Contract 3: closure and loop give the same update; so do four micro-batches of 16 and one batch of 64."""

import pytest
import torch

from tests.contracts.cases import Case, assert_same, differs, each_base, each_method, each_model


def close(a: Case, b: Case) -> None:
    for (name, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@each_method
@each_base
@each_model
def test_closure_and_loop_agree(method, base, model_name):
    a = Case(method, base, model_name).run(5)
    b = Case(method, base, model_name)
    for _ in range(5):
        b.loop_step()
    close(a, b)
    assert differs(a.snapshot(), Case(method, base, model_name).snapshot())


@pytest.mark.parametrize("clean_weight", [0.3, 1.0])
@pytest.mark.parametrize("num_perturbations", [1, 3])
def test_they_agree_on_probes_of_unequal_weight(clean_weight, num_perturbations):
    options = {"clean_weight": clean_weight, "num_perturbations": num_perturbations, "sigma": 0.3}
    a, b = Case("nso", options=options), Case("nso", options=options)
    for _ in range(5):
        a.step()
        b.loop_step()
    close(a, b)


@each_method
@pytest.mark.parametrize("form", ["closure", "loop"])
def test_micro_batches_equal_one_batch(method, form):
    whole, parts = Case(method), Case(method)
    if whole.optimizer.needs_take or whole.optimizer.needs_losses:
        pytest.skip("it chooses samples within a micro-batch, so micro-batches are another method")

    def evaluate():
        losses = [parts.loss(slice(i, i + 16)) / 4 for i in range(0, 64, 16)]
        for loss in losses:
            loss.backward()
        return torch.stack(losses).detach().sum()

    def closure():
        parts.optimizer.zero_grad()
        return evaluate()

    for _ in range(5):
        whole.step()
        if form == "closure":
            parts.optimizer.step(closure)
        else:
            for _ in parts.optimizer.probes():
                evaluate()
            parts.optimizer.step()
    close(whole, parts)


@each_method
def test_a_closure_that_clears_in_place_gives_the_same(method):
    a, b = Case(method), Case(method)

    def closure():
        b.optimizer.zero_grad(set_to_none=False)
        loss = b.loss()
        loss.backward()
        return loss

    for _ in range(5):
        a.step()
        b.optimizer.step(closure)
    close(a, b)


@each_method
def test_low_memory_gives_the_same_bits(method):
    assert_same(Case(method, options={"low_memory": True}).run(5).snapshot(), Case(method).run(5).snapshot())


@each_method
def test_recompute_gives_the_same_up_to_rounding(method):
    plain = Case(method).run(5)
    close(plain, Case(method, options={"restore": "recompute"}).run(5))
    close(plain, Case(method, options={"low_memory": True, "restore": "recompute"}).run(5))


@each_method
def test_autocast_around_the_loop_sees_the_displaced_weights(method):
    # Autocast keeps low-precision copies of the weights for as long as it is open; they must not go stale.
    around, inside = Case(method), Case(method)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in around.optimizer.probes():
            around.loss().backward()
    for _ in inside.optimizer.probes():
        with torch.autocast("cpu", torch.bfloat16):
            inside.loss().backward()
    for p, q in zip(around.model.parameters(), inside.model.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)
