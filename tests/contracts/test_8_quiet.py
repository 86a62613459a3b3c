"""Contract 8: buffers move once a step, dropout masks are shared, the random state ends where one forward leaves it."""

import pytest
import torch
from torch import nn

from tests.contracts.cases import Case, assert_same, differs, each_method

with_buffers = pytest.mark.parametrize("model_name", ["batchnorm", "spectral-norm", "custom-norm"])


def buffers(case: Case) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in case.model.named_buffers()}


@each_method
@with_buffers
@pytest.mark.parametrize("named", [False, True])
def test_buffers_are_those_of_the_first_probe(method, model_name, named):
    case = Case(method, model_name=model_name)
    if named:
        case.optimizer._model = case.model
    seen = []
    for _ in case.optimizer.probes():
        before = buffers(case)
        case.loss().backward()
        seen.append(buffers(case))
        assert differs(seen[-1], before)  # else this test shows nothing
    assert_same(buffers(case), seen[0])


@each_method
def test_batches_are_counted_once_a_step(method):
    case = Case(method, model_name="batchnorm").run(5)
    case.loop_step()
    assert case.model.get_buffer("1.num_batches_tracked") == 6


@each_method
@with_buffers
def test_buffers_stay_the_same_tensors(method, model_name):
    case = Case(method, model_name=model_name)
    if model_name == "custom-norm":  # its own forward replaces one: only later probes must not
        return
    before = dict(case.model.named_buffers())
    case.run(3)
    assert all(case.model.get_buffer(name) is buffer for name, buffer in before.items())


@each_method
def test_all_probes_see_the_same_dropout_mask(method):
    case = Case(method, model_name="dropout")
    masks = []
    layer = case.model.get_submodule("1")
    layer.register_forward_hook(lambda _m, args, out: masks.append((out != 0) | (args[0] == 0)))
    for _ in range(2):
        first = len(masks)
        case.step()
        assert all(torch.equal(mask, masks[first]) for mask in masks[first:])
    assert not torch.equal(masks[0], masks[-1])  # and another one at the next step


@each_method
def test_the_random_state_ends_where_one_forward_leaves_it(method):
    ours, control = Case(method, model_name="dropout"), Case("base", model_name="dropout")
    torch.manual_seed(5)
    ours.step()
    state = torch.get_rng_state()
    torch.manual_seed(5)
    control.loss()
    assert torch.equal(state, torch.get_rng_state())


@each_method
def test_a_later_probe_that_draws_more_leaves_no_trace(method):
    case = Case(method)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for number, _ in enumerate(case.optimizer.probes()):
        torch.rand(7 * number)  # nothing in the first probe
        case.loss().backward()
    assert torch.equal(torch.get_rng_state(), state)


@each_method
def test_noise_has_its_own_generator(method):
    case = Case(method)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    case.run(2)
    assert torch.equal(torch.get_rng_state(), state)


@each_method
def test_hooks_live_only_inside_probes(method):
    hooks = nn.modules.module._global_forward_pre_hooks
    case, inside = Case(method), []
    for _ in case.optimizer.probes():
        inside.append(len(hooks))
        case.loss().backward()
    assert len(hooks) == 0
    assert inside == [0] + [1] * (len(inside) - 1)


@each_method
def test_a_module_called_in_parts_is_found(method):
    case = Case(method, model_name="batchnorm")
    first, *rest = case.model.children()

    def closure():
        case.optimizer.zero_grad()
        x = first(case.x)
        for layer in rest:
            x = layer(x)
        loss = nn.functional.cross_entropy(x, case.y)
        loss.backward()
        return loss

    for _ in range(3):
        case.optimizer.step(closure)
    assert case.model.get_buffer("1.num_batches_tracked") == 3
