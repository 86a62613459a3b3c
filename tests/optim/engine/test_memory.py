"""What methods remember: in steps of several micro-batches, of layers that come and go, and after skipped steps."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

import flatmin
from flatmin.optim.engine.memory import Memory
from flatmin.vectors import Vector
from tests.contracts.cases import METHODS, Case, build

REMEMBERING = [m for m in METHODS if flatmin.methods()[m].factory.remembers]  # type: ignore[union-attr]
# The noise of bSAM would differ between micro-batches: with so much data and so small a rho there is none.
WITHOUT_NOISE = {"bsam": {"num_data": 10**14, "prior": 1e8, "rho": 1e-12}}


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("method", REMEMBERING)
def test_equal_micro_batches_are_one_batch(method, base):
    options = WITHOUT_NOISE.get(method, {})
    whole, parts = (Case(method, base, options=options, dtype=torch.float64) for _ in range(2))
    for _ in range(5):
        whole.loop_step()
        for share in (0.25, 0.25, 0.5):
            for _ in parts.optimizer.probes(share=share):
                parts.loss().backward()
        parts.optimizer.step()
    for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
        for name in whole.optimizer.remembers:
            kept = [case.optimizer.state[r]["flatmin_" + name] for case, r in ((whole, p), (parts, q))]
            torch.testing.assert_close(*kept, rtol=1e-6, atol=1e-8)


def test_a_micro_batch_that_fails_writes_nothing():
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = flatmin.FriendlySAM(SGD([p], lr=0.0))
    for factor in (1.0, 100.0):
        with pytest.raises(RuntimeError, match="no memory") if factor > 1 else warnings.catch_warnings():
            for number, _ in enumerate(optimizer.probes(share=1.0)):
                (factor * p.square().sum() / 2).backward()
                if factor > 1 and number == 1:
                    raise RuntimeError("no memory")
    optimizer.step()
    assert optimizer.state[p]["flatmin_mean"].tolist() == [3.0, 4.0]


def test_what_is_found_once_a_step_stands_at_once_and_the_rest_when_the_base_has_stepped():
    p, state = nn.Parameter(torch.zeros(1)), {}
    state[p] = {}
    p.grad = torch.zeros(1)
    memory = Memory([p], state, ("mean", "found"), found_once=("found",))
    for value in (1.0, 3.0):
        memory.begin()
        if not memory.is_found("found"):
            memory["found"] = Vector([torch.tensor([value])])
        memory["mean"] = Vector([torch.tensor([value])])
        memory.keep(0.5)
        assert memory.get("mean") is None
        assert memory.get("found").tensors[0].item() == 1.0  # type: ignore[union-attr]
    assert memory.commit()
    assert state[p]["flatmin_mean"].item() == 2.0
    assert state[p]["flatmin_found"].item() == 1.0


def evaluations(optimizer, loss, steps):
    """How many gradients each step took."""
    counts = []
    for step in range(steps):
        counts.append(0)
        for _ in optimizer.probes():
            counts[-1] += 1
            loss(step).backward()
        optimizer.step()
    return counts


@pytest.mark.filterwarnings("ignore:EigenSAM skipped step 0")
def test_eigen_sam_searches_until_a_search_has_counted():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 2), torch.randn(16, 4), torch.randint(2, (16,))
    optimizer = flatmin.EigenSAM(SGD(model.parameters(), lr=0.1), frequency=3)
    counts = evaluations(optimizer, lambda t: F.cross_entropy(model(x), y) * (float("nan") if t == 0 else 1.0), 5)
    assert counts == [12, 12, 2, 12, 2]
    later = flatmin.EigenSAM(SGD(model.parameters(), lr=0.1), rho=0.0)  # a radius that is warmed up
    counts = evaluations(later, lambda _: F.cross_entropy(model(x), y), 1)
    later.param_groups[0]["rho"] = 0.1
    assert counts + evaluations(later, lambda _: F.cross_entropy(model(x), y), 2) == [1, 12, 2]


def test_eigen_sam_finds_its_vector_in_layers_that_were_not_perturbed_before():
    head, body = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    curvatures = torch.tensor([1.0, 2.0, 30.0], dtype=torch.float64)
    base = SGD([{"params": [head], "rho": 0.1}, {"params": [body], "rho": 0.0}], lr=1e-4)
    optimizer = flatmin.EigenSAM(base, frequency=1)

    def loss(_):
        return (curvatures * head.square()).sum() / 2 + (curvatures * body.square()).sum() / 2

    evaluations(optimizer, loss, 2)
    assert "flatmin_eigenvector" not in optimizer.state[body]
    base.param_groups[0]["rho"], base.param_groups[1]["rho"] = 0.0, 0.1
    evaluations(optimizer, loss, 1)
    torch.testing.assert_close(optimizer.state[body]["flatmin_eigenvector"].abs()[2].item(), 1.0, rtol=1e-3, atol=0)


@pytest.mark.parametrize("pause", ["frozen", "radius 0"])
def test_bsam_keeps_the_precision_of_a_layer_that_pauses(pause):
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(16, 4), torch.randint(2, (16,))
    base = SGD([{"params": layer.parameters()} for layer in model], lr=0.01)
    optimizer = build("bsam", base, num_data=16)
    for step in range(6):
        model[0].requires_grad_(pause != "frozen" or step != 3)
        base.param_groups[0]["rho"] = 0.0 if pause == "radius 0" and step == 3 else 0.01
        for _ in optimizer.probes():
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert optimizer.state[model[0].weight]["flatmin_precision"].min() >= 1.0
    assert optimizer.num_skipped == 0


def test_friendly_sam_begins_with_the_first_gradient_of_each_layer():
    early, late = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([3.0]), requires_grad=False)
    optimizer = flatmin.FriendlySAM(SGD([early, late], lr=0.0), decay=0.9)
    for step in range(2):
        late.requires_grad_(step == 1)
        for _ in optimizer.probes():
            (early.square().sum() + late.square().sum()).backward()
        optimizer.step()
    assert optimizer.state[early]["flatmin_mean"].tolist() == [2.0]
    assert optimizer.state[late]["flatmin_mean"].tolist() == [6.0]


@pytest.mark.parametrize("shares", [(0.25, 0.25), (1.0, 1.0), (0.25, 0.0)])
@pytest.mark.parametrize("method", REMEMBERING)
def test_what_is_remembered_does_not_depend_on_the_sum_of_the_shares(method, shares):
    """A window may be short, and a micro-batch may have been left out."""
    options = WITHOUT_NOISE.get(method, {})
    whole, parts = (Case(method, "sgd", options=options, dtype=torch.float64) for _ in range(2))
    for case in (whole, parts):
        for group in case.optimizer.param_groups:
            group["lr"] = 0.0
    for _ in range(4):
        whole.loop_step()
        for share in shares:
            for _ in parts.optimizer.probes(share=share):
                parts.loss().backward()
        parts.optimizer.step()
    for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        for name in whole.optimizer.remembers:
            kept = [case.optimizer.state[r]["flatmin_" + name] for case, r in ((whole, p), (parts, q))]
            torch.testing.assert_close(*kept, rtol=1e-6, atol=1e-8)
