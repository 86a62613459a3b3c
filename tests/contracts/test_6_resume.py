"""Contract 6: a resumed run equals an uninterrupted one, noise included; checkpoints stay small."""

import copy
import io

import torch

from tests.contracts.cases import Case, assert_same, differs, each_base, each_method, each_model


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


@each_method
def test_noise_continues_instead_of_starting_again(method):
    # The test above would not notice a rule that draws the same noise at every step.
    case = Case(method, options={"seed": 3} if method.startswith("nso") else {})
    if not method.startswith("nso"):
        return
    draws = []
    for _ in range(2):
        draw = case.optimizer.noise("normal").vector().tensors[0]
        assert draw is not None
        draws.append({"draw": draw})
        case.step()
    assert differs(*draws)


@each_method
@each_base
def test_a_checkpoint_is_as_large_as_the_bases(method, base):
    def size(case: Case) -> int:
        file = io.BytesIO()
        torch.save(case.optimizer.state_dict(), file)
        return file.tell()

    assert size(Case(method, base).run(2)) <= size(Case("base", base).run(2)) + 1024


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
