"""Contract 6: a resumed run equals an uninterrupted one, noise included; checkpoints stay small."""

import copy
import io

import pytest
import torch

import flatmin
from tests.contracts.cases import Case, assert_same, each_base, each_method, each_model


@each_method
@each_base
@each_model
def test_resume_equals_uninterrupted(method, base, model_name):
    whole = Case(method, base, model_name).run(3)
    saved = copy.deepcopy(
        {"model": whole.model.state_dict(), "optimizer": whole.optimizer.state_dict(), "rng": torch.get_rng_state()}
    )
    whole.run(3)
    expected = whole.snapshot()

    resumed = Case(method, base, model_name)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    assert_same(resumed.run(3).snapshot(), expected)


def displacements(case: Case) -> list[torch.Tensor]:
    """The displacement of the first weight at each probe of one step."""
    weight = next(case.model.parameters())
    before, found = weight.detach().clone(), []
    for _ in case.optimizer.probes():
        found.append(weight.detach() - before)
        case.loss().backward()
    case.optimizer.step()
    return found


@pytest.mark.parametrize("antithetic", [True, False])
def test_every_draw_is_a_new_one_within_a_step_and_between_steps(antithetic):
    # Resuming equals going on also for a rule that draws the same noise every time; this tells them apart.
    case = Case("nso", options={"num_perturbations": 3, "antithetic": antithetic})
    drawn = [d for _ in range(3) for d in displacements(case)]
    assert len(drawn) == (18 if antithetic else 9)
    forward = drawn[::2] if antithetic else drawn
    for i, a in enumerate(forward):
        for b in forward[:i]:
            assert (a - b).abs().max() > 1e-3
    if antithetic:
        for there, back in zip(drawn[::2], drawn[1::2], strict=True):
            torch.testing.assert_close(there, -back, atol=1e-7, rtol=0)


@each_method
@each_base
def test_a_checkpoint_is_as_large_as_the_bases(method, base):
    def size(case: Case) -> int:
        file = io.BytesIO()
        torch.save(case.optimizer.state_dict(), file)
        return file.tell()

    # A method that remembers vectors says so; a tensor in a file has about a kilobyte around it.
    case = Case(method, base)
    params = case.optimizer.params
    kept = len(case.optimizer.remembers) * sum(p.numel() * p.element_size() + 1024 for p in params)
    assert size(case.run(2)) <= size(Case("base", base).run(2)) + 1024 + kept


@each_method
def test_the_layout_is_torchs(method):
    state = Case(method).run(1).optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    for group in state["param_groups"]:
        assert all(isinstance(value, (bool, int, float, list, type(None))) for value in group.values())


@each_method
def test_a_copy_of_the_optimizer_works_on_its_own(method):
    case = Case(method).run(1)
    model, optimizer = copy.deepcopy((case.model, case.optimizer))
    before = case.snapshot()
    twin = Case(method)
    twin.model, twin.optimizer = model, optimizer
    twin.step()
    assert_same(case.model.state_dict(), {k: v for k, v in before.items() if k != "rng"})
    assert_same(twin.model.state_dict(), case.run(1).model.state_dict())


@each_method
def test_a_checkpoint_of_the_bare_base_is_accepted(method):
    case = Case(method)
    case.optimizer.load_state_dict(Case("base").run(2).optimizer.state_dict())
    assert case.optimizer.num_steps == 0
    assert case.radius_name in case.optimizer.param_groups[0]
    case.step()


@each_method
def test_a_copy_has_hooks_of_its_own(method):
    case = Case(method).run(1)
    case.optimizer.register_step_post_hook(lambda *_: pytest.fail("the copy ran the original's hook"))
    model, optimizer = copy.deepcopy((case.model, case.optimizer))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "seen": 1})
    assert "seen" in optimizer.state_dict()
    assert "seen" not in case.optimizer.state_dict()
    case.model, case.optimizer = model, optimizer
    case.step()


@each_method
def test_torchs_checkpoint_helpers_set_up_the_state(method):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    case = Case(method, "adamw")
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    state = get_optimizer_state_dict(case.model, case.optimizer)
    assert state["state"]
    assert_same(case.model.state_dict(), before)


def test_a_checkpoint_of_another_method_is_announced():
    saved = flatmin.NSO(torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1), sigma=0.3).state_dict()
    optimizer = flatmin.SAM(torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1), rho=0.2)
    with pytest.warns(UserWarning, match=r"has no rho, so SAM goes on with its own, rho=0\.2"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["rho"] == 0.2
