"""Contract 9: quietly wrong use raises and names the fix; a non-finite loss changes nothing."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD

import flatmin
from tests.contracts.cases import Case, assert_same, build, each_method, each_whole_method


@each_method
def test_step_before_any_gradient(method):
    case = Case(method)
    with pytest.raises(ValueError, match=r"step\(\) before any gradient(.|\n)*for probe in opt.probes"):
        case.optimizer.step()
    case.loss().backward()  # a backward outside the loop is not a direction of this rule
    with pytest.raises(ValueError, match="before any gradient"):
        case.optimizer.step()


@each_method
def test_a_closure_without_backward(method):
    case = Case(method)
    before = case.snapshot()
    with pytest.raises(ValueError, match=r"must call loss.backward\(\)"):
        case.optimizer.step(lambda: case.loss())
    assert_same(case.snapshot(), before)


@each_method
def test_a_closure_without_return(method):
    case = Case(method)
    with pytest.raises(ValueError, match="return loss"):
        case.optimizer.step(lambda: case.loss().backward())


@each_method
def test_a_loop_left_half_way_then_step(method):
    case = Case(method)
    for _ in case.optimizer.probes():
        case.loss().backward()
        break
    with pytest.raises(ValueError, match="left half-way"):
        case.optimizer.step()
    case.optimizer.zero_grad()
    case.loop_step()


@each_method
def test_step_inside_the_loop(method):
    case = Case(method)

    def run():
        for _ in case.optimizer.probes():
            case.loss().backward()
            case.optimizer.step()

    with pytest.raises(ValueError, match="move it after the loop"):
        run()


@each_method
def test_a_loop_whose_direction_is_never_used(method):
    case = Case(method)
    for _ in case.optimizer.probes():
        case.loss().backward()
    with pytest.raises(ValueError, match="was not called"):
        next(iter(case.optimizer.probes()))
    with pytest.raises(ValueError, match="was not called"):
        case.step()
    case.optimizer.zero_grad()
    case.step()


@each_method
@pytest.mark.parametrize("which", ["optimizer", "model"])
def test_clearing_gradients_inside_the_loop(method, which):
    case = Case(method)

    def run():
        for number, _ in enumerate(case.optimizer.probes()):
            if which == "optimizer" or number:
                getattr(case, which).zero_grad()
            case.loss().backward()
        raise ValueError("gradients were cleared: nothing to lose for this rule")

    with pytest.raises(ValueError, match="gradients were cleared"):
        run()


@each_method
def test_a_step_inside_a_step(method):
    case = Case(method)

    def closure():
        return case.optimizer.step(case.closure)

    before = case.snapshot()
    with pytest.raises(ValueError, match="already under way"):
        case.optimizer.step(closure)
    assert_same(case.snapshot(), before)


@each_method
@pytest.mark.parametrize("bad_call", [1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted(method, bad_call, bad, base):
    case = Case(method, base).run(2)
    if bad_call > case.optimizer.gradients_per_step:
        pytest.skip("the rule asks for one gradient only")
    before, state = case.snapshot(), repr(case.optimizer.base.state_dict()["state"])
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        case.optimizer.zero_grad()
        loss = case.loss() * (bad if calls == bad_call else 1.0)
        loss.backward()
        return loss

    with pytest.warns(RuntimeWarning, match="loss is not finite. The weights are unchanged"):
        case.optimizer.step(closure)
    assert_same(case.snapshot(), before)
    assert repr(case.optimizer.base.state_dict()["state"]) == state
    assert case.optimizer.num_skipped == 1
    case.run(1)
    assert case.optimizer.num_steps == 4


@each_method
def test_a_gradient_that_is_not_finite_is_skipped_in_the_loop_too(method):
    case = Case(method)
    before = case.snapshot()
    for _ in case.optimizer.probes():
        (case.loss() * float("nan")).backward()
    with pytest.warns(RuntimeWarning, match="direction is not finite"):
        case.optimizer.step()
    assert_same(case.snapshot(), before)


@each_method
def test_without_the_guard_nothing_is_checked(method):
    case = Case(method, options={"guard": False})
    case.run(2)
    for _ in case.optimizer.probes():
        (case.loss() * float("nan")).backward()
    case.optimizer.step()
    assert case.optimizer.num_skipped == 0
    assert all(p.isnan().all() for p in case.model.parameters())


@each_method
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "0.1"])
def test_a_bad_radius(method, value):
    entry = flatmin.methods()[method]
    name = entry.radius_name
    assert name is not None
    with pytest.raises(ValueError, match=f"{name} must be a finite number >= 0"):
        Case(method, options={name: value})
    case = Case(method)
    with pytest.raises(ValueError, match=name):
        case.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], name: value})
    assert len(case.optimizer.param_groups) == 1
    case.optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=name):
        case.step()


@each_method
def test_a_base_that_is_no_optimizer_instance(method):
    params = [torch.nn.Parameter(torch.zeros(1))]
    with pytest.raises(ValueError, match=r"instance, got the class SGD. Write .*SGD\(model.parameters\(\), lr="):
        build(method, SGD)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got list"):
        build(method, params)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LBFGS, which evaluates"):
        build(method, LBFGS(params))
    with pytest.raises(ValueError, match="cannot wrap SAM"):
        build(method, flatmin.SAM(SGD(params, lr=0.1)))


@each_method
@pytest.mark.parametrize("options", [{"every": 0}, {"start": -1}, {"start": 5, "stop": 4}])
def test_a_bad_window(method, options):
    with pytest.raises(ValueError, match="every must be >= 1"):
        Case(method, options=options)


@each_whole_method
def test_a_zero_gradient_is_not_a_nan(method):
    case = Case(method)
    for p in case.model.parameters():
        torch.nn.init.zeros_(p)

    def closure():
        case.optimizer.zero_grad()
        loss = (case.model(case.x) ** 2).sum() * 0
        loss.backward()
        return loss

    case.optimizer.step(closure)
    assert all(torch.isfinite(p).all() for p in case.model.parameters())
    assert case.optimizer.num_skipped == 0


@each_method
def test_a_batch_that_is_not_finite_leaves_buffers_alone(method):
    case = Case(method, model_name="batchnorm").run(2)
    before = case.snapshot()
    case.x[0, 0] = torch.nan
    with pytest.warns(RuntimeWarning, match="skipped step 2"):
        case.step()
    assert_same(case.model.state_dict(), {k: v for k, v in before.items() if k != "rng"})


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recompute_survives_a_gradient_that_is_not_finite(method, dtype):
    case = Case(method, options={"restore": "recompute"}, dtype=dtype)
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    with pytest.warns(RuntimeWarning, match="skipped step"):
        case.optimizer.step(lambda: nan_loss(case))
    for name, value in case.model.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-6 if dtype == torch.float32 else 1e-2, rtol=0)


def nan_loss(case):
    case.optimizer.zero_grad()
    loss = case.loss() * torch.nan
    loss.backward()
    return loss


@each_whole_method
def test_a_later_probe_without_backward(method):
    case = Case(method)
    if case.optimizer.gradients_per_step < 2:
        return

    def run():
        for n, _ in enumerate(case.optimizer.probes()):
            if n == 0:
                case.loss().backward()

    with pytest.raises(ValueError, match=r"must call loss\.backward"):
        run()


def test_clearing_some_gradients_inside_the_loop():
    case = Case("nso")

    def run():
        for _ in case.optimizer.probes():
            case.model.get_submodule("2").zero_grad()
            case.loss().backward()

    with pytest.raises(ValueError, match="gradients were cleared inside the probes"):
        run()


@each_method
def test_clearing_gradients_between_the_loop_and_step(method):
    case = Case(method)
    for _ in case.optimizer.probes():
        case.loss().backward()
    case.model.zero_grad()
    with pytest.raises(ValueError, match=r"gradients were cleared between the probes\(\) loop and step"):
        case.optimizer.step()


@each_whole_method
def test_gradients_that_autograd_or_a_hook_replaces_are_not_cleared_ones(method):
    plain, graph, hooked = Case(method), Case(method), Case(method)
    plain.loop_step()
    for _ in graph.optimizer.probes():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch on create_graph and leaks
            graph.loss().backward(create_graph=True)
    for p in graph.model.parameters():
        assert p.grad is not None
        p.grad = p.grad.detach()
    graph.optimizer.step()
    for p in hooked.model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad.clamp(-100, 100)))
    hooked.loop_step()
    for case in (graph, hooked):
        for p, q in zip(plain.model.parameters(), case.model.parameters(), strict=True):
            torch.testing.assert_close(p, q)


@each_method
def test_an_iterator_that_is_left_with_a_name(method):
    case = Case(method)
    probes = case.optimizer.probes()
    next(probes)
    with pytest.raises(ValueError, match=r"the weights are displaced until it.close\(\)"):
        case.loop_step()
    probes.close()
    case.optimizer.zero_grad()
    case.loop_step()


def test_maximising_is_refused():
    base = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1, maximize=True)
    with pytest.raises(ValueError, match="SAM minimises: set maximize=False and change the sign of the loss"):
        flatmin.SAM(base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.1}, "SAM has no option 'sigma': its radius is rho"),
        ({"lr": 0.1}, "SAM has no option 'lr': that belongs to the base optimizer"),
        ({"rhoo": 0.1}, r"SAM has no option 'rhoo': did you mean 'rho'\? See help\(SAM\)"),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(ValueError, match=message):
        flatmin.SAM(torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1), **options)


def test_the_call_of_other_libraries_is_told_the_right_one():
    parameters = torch.nn.Linear(2, 2).parameters()
    with pytest.raises(ValueError, match=r"SAM\(torch\.optim\.SGD\(model\.parameters\(\), lr=0\.1, momentum=0\.9\)\)"):
        flatmin.SAM(parameters, torch.optim.SGD, lr=0.1, momentum=0.9)  # type: ignore[arg-type]


def test_a_large_but_finite_direction_is_not_skipped():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = flatmin.SAM(torch.optim.Adam([weight], lr=0.1), rho=0.0)

    def closure():
        optimizer.zero_grad()
        loss = (weight * 1e20).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.num_skipped == 0
    torch.testing.assert_close(weight.detach(), torch.full((2,), 0.9))


@pytest.mark.parametrize("name", ["every", "start", "stop"])
@pytest.mark.parametrize("value", [0.5, 2.5, "2", True])
def test_steps_are_counted_in_whole_numbers(name, value):
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        flatmin.SAM(SGD([p], lr=0.1), **{name: value})


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("looksam", {"k": 2.5}),
        ("looksam", {"alpha": float("nan")}),
        ("eigen-sam", {"frequency": 1.5}),
        ("eigen-sam", {"alpha": float("nan")}),
        ("sap", {"num_samples": 1.5}),
        ("friendly-sam", {"sigma": float("nan")}),
        ("asam", {"eta": float("nan")}),
        ("fisher-sam", {"eta": float("nan")}),
        ("gsam", {"alpha": float("nan")}),
        ("random-sam", {"sigma": float("nan")}),
        ("bsam", {"num_data": 10.5}),
        ("bsam", {"initial": 0.0}),
        ("bsam", {"betas": (1.5, 0.9)}),
        ("bsam", {"prior": -1.0}),
        ("bsam", {"damping": -5.0}),
    ],
)
def test_options_that_make_no_sense(method, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(method, SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1), **options)


@each_whole_method
def test_other_wrong_calls(method):
    case = Case(method)
    with pytest.raises(ValueError, match=r"returned a tensor of shape \(64,\)"):
        case.optimizer.step(lambda: (case.closure(), torch.ones(64))[1])
    for share in (-1.0, float("nan"), "a"):
        with pytest.raises(ValueError, match="share must be"):
            case.optimizer.probes(share=share)
    with pytest.raises(ValueError, match="model= takes the module"):
        build(method, SGD(case.model.parameters(), lr=0.1), model=3)


def test_a_loss_of_a_class_of_its_own_is_a_loss():
    class Own(torch.Tensor):
        pass

    case = Case("sam")
    plain = Case("sam")
    returned = case.optimizer.step(lambda: case.closure().as_subclass(Own))
    assert float(returned) == float(plain.step())


@pytest.mark.parametrize("shape", [(), (32, 10)])
def test_samples_are_chosen_by_one_loss_each(shape):
    weight = nn.Parameter(torch.ones(shape))
    optimizer: Any = flatmin.ESAM(torch.optim.SGD([weight], lr=0.1))
    with pytest.raises(ValueError, match=r"one loss for each sample, \(n,\), got"):
        optimizer.step(lambda: optimizer.mean(weight * 2))


@pytest.mark.parametrize(("method", "wrong"), [(flatmin.SAM, "sigma"), (flatmin.NSO, "rho"), (flatmin.NSO, "Radius")])
def test_a_radius_by_another_name_is_refused(method, wrong):
    group = {"params": [nn.Parameter(torch.ones(2))], wrong: 0.0}
    message = f"a group has {wrong!r}, which {method.__name__} does not read: its radius is {method.radius_name!r}"
    with pytest.raises(ValueError, match=message):
        method(torch.optim.SGD([group], lr=0.1))
    optimizer = method(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)


def test_what_another_method_left_is_no_wrong_name():
    base = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    flatmin.SAM(base)
    assert flatmin.NSO(base).param_groups[0]["rho"] == 0.05
    assert flatmin.NSO(torch.optim.Adadelta([nn.Parameter(torch.ones(2))])).param_groups[0]["rho"] == 0.9  # its own


def test_parameters_that_were_replaced_are_not_silently_left_alone():
    old, new = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = flatmin.SAM(torch.optim.SGD([old], lr=0.1), perturb=[old])
    optimizer.param_groups[0]["params"] = [new]

    def closure():
        optimizer.zero_grad()
        loss = new.square().sum()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="none of the parameters of perturb= is in the optimizer any more"):
        optimizer.step(closure)
