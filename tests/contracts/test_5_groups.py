"""Contract 5: schedulers, hooks, `add_param_group` and clipping act on shared groups; radii are group options."""

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, StepLR

import flatmin
from tests.contracts.cases import Case, assert_same, build, each_base, each_method


def displacements(case: Case) -> list[dict[str, torch.Tensor]]:
    """How far each parameter is from its weight, at each probe of one step."""
    if case.method == "momentum-sam" and not case.optimizer.state:
        case.run(1)  # before that there is no momentum to follow
    before = {k: v.detach().clone() for k, v in case.model.named_parameters()}
    found = []
    for _ in case.optimizer.probes():
        found.append({k: v.detach() - before[k] for k, v in case.model.named_parameters()})
        case.loss().backward()
    return found


def two_groups(case: Case, **second) -> None:
    """Replaces the case's optimizer by one with the first layer and the rest in groups of their own."""
    layers = list(case.model.children())
    rest = [p for layer in layers[1:] for p in layer.parameters()]
    base = SGD([{"params": layers[0].parameters()}, {"params": rest, **second}], lr=0.1, momentum=0.9)
    case.optimizer = build(case.method, base)


@each_method
@each_base
def test_a_scheduler_drives_the_base_before_and_after_loading(method, base):
    case = Case(method, base)
    scheduler = StepLR(case.optimizer, step_size=1, gamma=0.5)
    start = case.optimizer.base.param_groups[0]["lr"]
    case.step()
    scheduler.step()
    assert case.optimizer.base.param_groups[0]["lr"] == start / 2
    case.optimizer.load_state_dict(case.optimizer.state_dict())
    case.loop_step()
    scheduler.step()  # torch warns if it believes that the optimizer has not stepped; warnings are errors here
    assert case.optimizer.base.param_groups[0]["lr"] == start / 4


@each_method
def test_the_radius_can_be_scheduled_and_survives_loading(method):
    if method == "bsam":
        pytest.skip("its first probe is a draw whose scale is the precision, not the radius")
    case = Case(method)
    name = case.radius_name
    size = max(d.abs().max() for found in displacements(case) for d in found.values())
    case.optimizer.zero_grad()
    case.optimizer.param_groups[0][name] *= 3
    scaled = max(d.abs().max() for found in displacements(case) for d in found.values())
    torch.testing.assert_close(scaled, 3 * size, rtol=1e-4, atol=0)
    other = Case(method)
    other.optimizer.load_state_dict(case.optimizer.state_dict())
    assert other.optimizer.param_groups[0][name] == case.optimizer.param_groups[0][name]


@each_method
def test_a_group_may_set_its_own_radius_and_zero_leaves_it_alone(method):
    case = Case(method)
    name = case.radius_name
    two_groups(case, **{name: 0.0})
    moved = displacements(case)
    assert all(d[k].abs().max() == 0 for d in moved for k in d if not k.startswith("0."))
    assert any(d["0.weight"].abs().max() > 0 for d in moved)


@each_method
def test_a_group_with_radius_zero_is_still_trained(method):
    case = Case(method)
    two_groups(case, **{case.radius_name: 0.0})
    before = case.snapshot()
    case.step()
    assert not torch.equal(case.model.state_dict()["2.weight"], before["2.weight"])


@each_method
def test_a_frozen_parameter_is_not_moved(method):
    case = Case(method)
    case.model.get_parameter("2.weight").requires_grad_(False)
    moved = displacements(case)
    assert all(d["2.weight"].abs().max() == 0 for d in moved)
    assert any(d["0.weight"].abs().max() > 0 for d in moved)


@each_method
def test_hooks_run_once_a_step(method):
    case = Case(method)
    calls = []
    case.optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    case.optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    case.optimizer.base.register_step_pre_hook(lambda *_: calls.append("base"))
    case.step()
    assert calls == ["pre", "base", "post"]
    case.optimizer.register_state_dict_post_hook(lambda _, state: {**state, "seen": True})
    assert case.optimizer.state_dict()["seen"]


@each_method
def test_a_group_added_later_gets_the_radius_and_is_trained(method):
    case = Case(method)
    extra = torch.nn.Parameter(torch.zeros(3))
    case.optimizer.add_param_group({"params": [extra]})
    group = case.optimizer.param_groups[-1]
    assert group[case.radius_name] == case.optimizer.param_groups[0][case.radius_name]
    inner = case.model.forward
    case.model.forward = lambda x: inner(x) + extra  # type: ignore[method-assign]
    case.step()
    assert extra.abs().min() > 0
    assert group["num_steps"] == 1


@each_method
def test_a_group_added_through_the_base_is_noticed(method):
    case = Case(method)
    case.optimizer.base.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    case.step()
    assert case.optimizer.param_groups[-1]["num_steps"] == 1


@each_method
def test_clipping_in_the_loop_acts_on_the_final_direction(method):
    options = {"decouple": False} if method == "wsam" else {}  # else a part of the step is not in .grad
    a, b = Case(method, options=options), Case(method, options=options)
    a.optimizer.param_groups[0].update(momentum=0.0, weight_decay=0.0)
    b.optimizer.param_groups[0].update(momentum=0.0, weight_decay=0.0)
    before = a.snapshot()
    for _ in a.optimizer.probes():
        a.loss().backward()
    norm = torch.nn.utils.clip_grad_norm_(a.model.parameters(), 0.01)
    assert norm > 0.02
    a.optimizer.step()
    b.step()
    for name, p in a.model.named_parameters():
        whole = b.model.state_dict()[name] - before[name]
        torch.testing.assert_close(p - before[name], whole * 0.01 / norm, atol=1e-7, rtol=1e-3)


@each_method
def test_a_hook_clips_the_direction_of_a_closure(method):
    hooked, loop = Case(method), Case(method)
    hooked.optimizer.register_step_pre_hook(lambda *_: clip(hooked))
    for _ in range(2):
        hooked.step()
        for _ in loop.optimizer.probes():
            loop.loss().backward()
        clip(loop)
        loop.optimizer.step()
    for name, p in loop.model.state_dict().items():
        torch.testing.assert_close(hooked.model.state_dict()[name], p, atol=1e-6, rtol=1e-5)


def test_clipping_inside_a_closure_clips_each_probe():
    w = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = flatmin.NSO(SGD([w], lr=1.0), sigma=0.5)

    def closure():
        optimizer.zero_grad()
        loss = w.square().square().sum()
        loss.backward()
        assert w.grad is not None
        seen.append(w.grad.item())
        torch.nn.utils.clip_grad_norm_([w], 1.0)
        return loss

    seen: list[float] = []
    optimizer.step(closure)
    clipped = [min(g, 1.0) for g in seen]
    assert clipped != seen
    assert w.item() == pytest.approx(1.0 - sum(clipped) / 2, rel=1e-5)
    assert sum(clipped) / 2 < min(sum(seen) / 2, 1.0)  # the clipped mean is another one


def clip(case: Case) -> None:
    torch.nn.utils.clip_grad_norm_(case.model.parameters(), 0.01)


@each_method
def test_a_warm_up_scheduler_with_a_radius_of_its_own(method):
    case = Case(method)
    scheduler = LambdaLR(case.optimizer, lambda t: min(1.0, (t + 1) / 10))
    for _ in range(3):
        case.step()
        scheduler.step()
    assert case.optimizer.base.param_groups[0]["lr"] == pytest.approx(0.1 * 0.4)


@each_method
def test_a_checkpoint_of_the_bare_base_can_be_loaded(method):
    base, ours = Case("base").run(3), Case(method)
    ours.optimizer.load_state_dict(base.optimizer.state_dict())
    ours.model.load_state_dict(base.model.state_dict())
    ours.optimizer.param_groups[0][ours.radius_name] = 0.0
    assert_same(dict(ours.run(3).model.state_dict()), Case("base").run(6).model.state_dict())


@each_method
def test_a_checkpoint_of_the_bare_base_keeps_each_groups_radius(method):
    case, plain = Case(method), Case("base")
    case.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], case.radius_name: 0.0})
    plain.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    radii = [group[case.radius_name] for group in case.optimizer.param_groups]
    case.optimizer.load_state_dict(plain.optimizer.state_dict())
    assert [group[case.radius_name] for group in case.optimizer.param_groups] == radii
    assert radii[0] > 0 == radii[1]


@each_method
def test_perturb_chooses_what_is_moved(method):
    case = Case(method)
    chosen = case.model.get_parameter("2.weight")
    other = build(method, case.optimizer.base, perturb=[chosen])
    case.optimizer = other
    moved = displacements(case)
    assert any(d["2.weight"].abs().max() > 0 for d in moved)
    assert all(d["0.weight"].abs().max() == 0 for d in moved)


@each_method
def test_global_hooks_run_once_a_step(method):
    from torch.optim.optimizer import register_optimizer_step_post_hook

    seen = []
    handle = register_optimizer_step_post_hook(lambda opt, *_: seen.append(type(opt).__name__))
    try:
        Case(method).run(2)
    finally:
        handle.remove()
    assert seen == ["SGD", "SGD"]


def test_norm_layers_only():
    case = Case("sam", model_name="batchnorm")
    case.optimizer = flatmin.SAM(case.optimizer.base, perturb=flatmin.norm_parameters(case.model))
    *_, moved = displacements(case)
    assert {name for name, d in moved.items() if d.abs().max() > 0} == {"1.weight", "1.bias"}
    size = torch.cat([d.flatten() for d in moved.values()]).norm()
    torch.testing.assert_close(size, torch.tensor(0.05))  # the norm is over what is moved
    with pytest.raises(ValueError, match="Linear has no normalisation layer"):
        flatmin.norm_parameters(torch.nn.Linear(2, 2))
