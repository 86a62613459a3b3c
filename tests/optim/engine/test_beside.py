"""What else goes on beside a step: other threads, other optimizers, hooks on gradients, modules that nobody named."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import flatmin


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(16, 6), torch.randint(3, (16,))


def elsewhere(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.parametrize("form", ["loop", "closure"])
def test_what_another_thread_evaluates_meanwhile_is_its_own(form, batch):
    x, y = batch
    ours, theirs = normed(), normed()
    optimizer = flatmin.SAM(torch.optim.SGD(ours.parameters(), lr=0.1))

    def evaluate():
        elsewhere(lambda: theirs(x))
        F.cross_entropy(ours(x), y).backward()

    def closure():
        optimizer.zero_grad()
        evaluate()
        return torch.zeros(())

    for _ in range(3):
        if form == "closure":
            optimizer.step(closure)
        else:
            for _probe in optimizer.probes():
                evaluate()
            optimizer.step()
    assert [int(model.state_dict()["1.num_batches_tracked"]) for model in (theirs, ours)] == [6, 3]


def test_a_loop_in_another_thread_leaves_a_direction_that_stands(batch):
    x, y = batch
    model, other = normed(), normed()
    optimizer, beside = (flatmin.SAM(torch.optim.SGD(m.parameters(), lr=0.1)) for m in (model, other))
    for _probe in optimizer.probes():
        F.cross_entropy(model(x), y).backward()
    standing = [p.grad for p in model.parameters()]

    def work():
        for _probe in beside.probes():
            assert all(p.grad is g for p, g in zip(model.parameters(), standing, strict=True))
            F.cross_entropy(other(x), y).backward()
        beside.step()

    seen = []
    elsewhere(lambda: seen.append(work()))
    assert seen == [None]
    optimizer.step()


def test_two_optimizers_of_shared_parameters_cannot_both_wait_for_their_step(batch):
    x, y = batch
    trunk, heads = nn.Linear(6, 8), (nn.Linear(8, 3), nn.Linear(8, 3))
    first, second = (flatmin.SAM(torch.optim.SGD([*trunk.parameters(), *head.parameters()], lr=0.1)) for head in heads)

    def loop(optimizer, head):
        for _probe in optimizer.probes():
            F.cross_entropy(head(trunk(x)), y).backward()

    loop(first, heads[0])
    before = [p.grad for p in trunk.parameters()]
    with pytest.raises(
        ValueError, match=r"another optimizer \(SAM\) of some of the same parameters has had its probes"
    ):
        loop(second, heads[1])
    assert all(p.grad is g for p, g in zip(trunk.parameters(), before, strict=True))
    first.step()
    loop(second, heads[1])
    second.step()
    loop(first, heads[0])
    first.zero_grad()  # drops it
    loop(second, heads[1])
    second.step()


@pytest.mark.parametrize("number", [1, 3])
def test_a_hook_that_clips_what_has_accumulated_clips_each_evaluation_in_both_forms(number, batch):
    x, y = batch

    def clip(p):
        p.grad.clamp_(-0.01, 0.01)

    def step(form):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        for p in model[0].parameters():  # not of all
            p.register_post_accumulate_grad_hook(clip)
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = flatmin.NSO(base, num_perturbations=number)

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        if form == "closure":
            optimizer.step(closure)
        else:
            for _probe in optimizer.probes():
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(step("loop"), step("closure"))


def test_a_loss_with_buffers_is_named_beside_the_model(batch):
    class Counting(nn.CrossEntropyLoss):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, input, target):
            self.count += 1
            return super().forward(input, target)

    x, y = batch
    for named in (False, True):
        model, criterion = normed(), Counting()
        both = nn.ModuleList([model, criterion]) if named else None
        optimizer = flatmin.NSO(torch.optim.SGD(model.parameters(), lr=0.1), model=both)
        for _ in range(3):
            for _probe in optimizer.probes():
                criterion(model(x), y).backward()
            optimizer.step()
        assert criterion.state_dict()["count"] == 3


def test_cached_parametrizations_are_refused(batch):
    x, y = batch
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 6)), nn.Linear(6, 3))
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    with parametrize.cached(), pytest.raises(ValueError, match=r"inside torch.nn.utils.parametrize.cached\(\)"):
        next(optimizer.probes())
    with parametrize.cached(), pytest.raises(ValueError, match="moving their originals changes nothing"):
        flatmin.measure(model, nn.CrossEntropyLoss(), [batch])
    for _probe in optimizer.probes():
        F.cross_entropy(model(x), y).backward()
    optimizer.step()
    flatmin.measure(model, nn.CrossEntropyLoss(), [batch])
