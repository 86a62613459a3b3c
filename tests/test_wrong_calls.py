"""Calls that a new user makes, and what they are told."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flatmin
from flatmin.optim.registry import get_method
from tests.curvature.nets import criterion, make


@pytest.mark.parametrize(
    "name",
    ["trace", "top_eigenvalues", "spectral_density", "noise_stability", "average_sharpness", "ascent_sharpness",
     "loss_slice", "random_direction", "block_eigenvalues", "layerwise_rayleigh_sum", "flat_minimum_estimate",
     "HessianOperator", "GaussNewtonOperator", "FisherOperator", "Tracker"],
)  # fmt: skip
def test_a_model_where_an_objective_should_be(name):
    model, x, y = make("tanh")
    message = rf"{name} measures an Objective, got the model Sequential.*flatmin\.{name}\(objective"
    for arguments in ((model,), (model, criterion, [(x, y)])):
        with pytest.raises(ValueError, match=message):
            getattr(flatmin, name)(*arguments)
    with pytest.raises(ValueError, match=message):
        getattr(flatmin, name)(objective=model)
    with pytest.raises(ValueError, match=r"pass model\.state_dict\(\)"):
        flatmin.direction_to(flatmin.Objective(model, criterion, [(x, y)]), model)  # type: ignore[arg-type]


def test_directions_that_are_none():
    model, x, y = make("tanh")
    objective = flatmin.Objective(model, criterion, [(x, y)])
    found = flatmin.top_eigenvalues(objective, 2, vectors=True)
    with pytest.raises(ValueError, match=r"loss_slice\(objective, \*result\.vectors\)"):
        flatmin.loss_slice(objective, found.vectors)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a direction must be a Vector.*got Tensor"):
        flatmin.loss_slice(objective, torch.ones(5))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got 0.*vectors=True"):
        flatmin.loss_slice(objective, *flatmin.top_eigenvalues(objective, 2).vectors)


def test_vectors_that_are_none():
    model, x, y = make("tanh")
    objective = flatmin.Objective(model, criterion, [(x, y)])
    operator = flatmin.HessianOperator(objective)
    part = objective.only(objective.names[:1])
    for act, name in [
        (lambda v: flatmin.top_eigenvalues(operator, start=v), "start"),
        (operator.product, "v"),
    ]:
        for wrong in (torch.ones(objective.num_params), list(objective.params), None):
            with pytest.raises(ValueError, match=rf"^{name} must be a Vector.*got {type(wrong).__name__}\."):
                act(wrong)
        for wrong in (part.gradient(), flatmin.Vector([*objective.params[:-1], torch.ones(7)])):
            with pytest.raises(ValueError, match=rf"^{name} has another shape than the parameters"):
                act(wrong)


def test_a_start_may_lack_entries_which_are_zero():
    model, x, y = make("tanh")
    objective = flatmin.Objective(model, criterion, [(x, y)])
    first, *others = objective.gradient().present
    zeros = [torch.zeros_like(t) for t in others]
    with_zeros, without = (
        flatmin.top_eigenvalues(objective, start=flatmin.Vector([first, *rest]))
        for rest in (zeros, [None] * len(others))
    )
    assert with_zeros == without


def test_a_part_of_no_parameters():
    model, x, y = make("tanh")
    objective = flatmin.Objective(model, criterion, [(x, y)])
    with pytest.raises(ValueError, match=r"was given no names\. The objective has: 0\.weight, 0\.bias"):
        objective.only([])
    assert objective.only("0.weight").names == ("0.weight",)


@pytest.mark.parametrize("measure", [flatmin.Objective.loss, flatmin.Objective.gradient, flatmin.trace])
@pytest.mark.parametrize(
    ("wrong", "note"),
    [
        (
            {"targets": lambda y: y + 100},
            r"a tensor \(24, 3\) of float64 and a tensor \(24,\) of int64 from 100 to 102",
        ),
        ({"targets": lambda y: y.int()}, r"of int32 from 0 to 2.*targets\.long\(\)"),
        ({"targets": lambda y: y.to(torch.uint16)}, r"of uint16, in this order.*targets\.long\(\)"),
        ({"targets": lambda y: y.float()}, r"of float32, in this order.*targets\.long\(\)"),
        ({"targets": lambda y: y.numpy()}, r"a value of type ndarray.*torch\.from_numpy"),
        ({"criterion": lambda y, z: criterion(z, y)}, r"criterion\(outputs, targets\).*in this order"),
        ({"criterion": lambda z, y: z.logits}, r"a tensor \(24, 3\) of float64"),
        ({"inputs": lambda x: x.numpy()}, r"The inputs are a numpy array.*torch\.from_numpy"),
    ],
)
def test_errors_of_torch_say_what_the_criterion_or_the_model_was_given(wrong, note, measure):
    model, x, y = make("tanh")
    data = [(wrong.get("inputs", lambda x: x)(x), wrong.get("targets", lambda y: y)(y))]
    objective = flatmin.Objective(model, wrong.get("criterion", criterion), data)
    with pytest.raises((AttributeError, IndexError, RuntimeError, TypeError)) as caught:
        measure(objective)
    assert re.search(note, "".join(getattr(caught.value, "__notes__", [])))


def test_a_criterion_that_cannot_be_differentiated():
    model, x, y = make("tanh")
    with pytest.raises(ValueError, match=r"got float\. Leave out \.item\(\)"):
        flatmin.trace(flatmin.Objective(model, lambda z, y: criterion(z, y).item(), [(x, y)]))
    detached = flatmin.Objective(model, lambda z, y: criterion(z, y).detach(), [(x, y)])
    for act in (lambda: detached.gradient(), lambda: flatmin.ascent_sharpness(detached, 0.1)):
        with pytest.raises(RuntimeError, match=r"the loss has no graph.*detach\(\)"):
            act()


def test_tensors_where_names_should_be():
    model, x, y = make("tanh")
    with pytest.raises(ValueError, match=r"params takes names.*got Parameter"):
        flatmin.Objective(model, criterion, [(x, y)], params=model.parameters())  # type: ignore[arg-type]


def test_a_module_where_names_should_be():
    model, x, y = make("tanh")
    with pytest.raises(ValueError, match=r"params takes names.*got the module Sequential.*params=lambda name, p"):
        flatmin.Objective(model, criterion, [(x, y)], params=model)


def test_an_operator_where_an_objective_should_be():
    model, x, y = make("tanh")
    operator = flatmin.GaussNewtonOperator(flatmin.Objective(model, criterion, [(x, y)]))
    for name, act in [
        ("trace", lambda: flatmin.trace(operator)),  # type: ignore[arg-type]
        ("noise_stability", lambda: flatmin.noise_stability(operator, 0.1)),  # type: ignore[arg-type]
        ("Tracker", lambda: flatmin.Tracker(operator)),  # type: ignore[arg-type]
        ("HessianOperator", lambda: flatmin.HessianOperator(operator)),  # type: ignore[arg-type]
    ]:
        with pytest.raises(ValueError, match=rf"^{name} measures an Objective, got the operator Gauss.*top_eigen"):
            act()
    assert flatmin.top_eigenvalues(operator).converged
    assert flatmin.spectral_density(operator, num_probes=2, num_steps=4).value > 0


def test_trackers_are_compared_as_they_are():
    model, x, y = make("tanh")
    tracker = flatmin.Tracker(flatmin.Objective(model, criterion, [(x, y)]), max_overhead=1)
    tracker.update()
    tracker.update()
    assert flatmin.compare_at_matched_loss(tracker, tracker).ratio.value == 1


@pytest.mark.parametrize(
    ("what", "act"),
    [
        ("measuring", lambda model, x, y: flatmin.trace(flatmin.Objective(model, criterion, [(x, y)]), max_products=2)),
        ("an average is updated", lambda model, x, y: flatmin.Averager(model, "mean").update()),
    ],
)
def test_what_is_done_inside_a_loop_to_displaced_weights_is_announced(what, act):
    model, x, y = make("tanh")
    optimizer = flatmin.NSO(torch.optim.SGD(model.parameters(), lr=0.1))
    other = make("tanh")[0]
    for _ in optimizer.probes():
        F.cross_entropy(model(x), y).backward()
        act(other, x, y)  # of another model: nothing is said, and warnings are errors here
        with pytest.warns(RuntimeWarning, match=rf"{what} inside the body of a probes\(\) loop"):
            act(model, x, y)
    optimizer.step()
    act(model, x, y)


def test_a_direction_that_zero_grad_dropped():
    model, x, y = make("tanh")
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in optimizer.probes():
        F.cross_entropy(model(x), y).backward()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="cleared between the probes"):
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="before any gradient"):
        optimizer.step()


def test_names_of_methods_that_are_options_of_a_class():
    for name, call in [
        ("ASAM", r"flatmin\.SAM\(base, adaptive=True\)"),
        ("nso", r"flatmin\.NSO\(base\)"),
        ("Looksam", r"flatmin\.LookSAM\(base\)"),
        ("monge_sam", r"flatmin\.MongeSAM\(base\)"),
    ]:
        with pytest.raises(AttributeError, match=call):
            getattr(flatmin, name)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        flatmin.nonsense  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ValueError, match="Several are separated by spaces: sam nso"):
        get_method("sam,nso")


def test_an_optimizer_says_what_it_is_around():
    text = repr(flatmin.NSO(torch.optim.AdamW(nn.Linear(2, 2).parameters())))
    assert text.startswith("NSO around AdamW (")
    assert "sigma" in text


def test_the_nearest_option_is_named():
    with pytest.raises(ValueError, match=r"NSO has no option 'sigm': did you mean 'sigma'\? See help\(NSO\)"):
        flatmin.NSO(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), sigm=0.1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="did you mean 'low_memory'"):
        flatmin.NSO(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), lowmemory=True)  # type: ignore[call-arg]
