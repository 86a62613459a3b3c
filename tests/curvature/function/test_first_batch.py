"""What the first batch says of a model and a loss is verified for the others; where it is wrong, H itself is probed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import flatmin


def truth_of(model, criterion, data):
    """tr H, reverse over reverse, batch by batch."""
    params, total, count = list(model.parameters()), 0.0, 0
    for x, y in data:
        grads = torch.autograd.grad(criterion(model(x), y), params, create_graph=True, allow_unused=True)
        for p, g in zip(params, grads, strict=True):
            for i in range(p.numel() if g is not None and g.requires_grad else 0):
                assert g is not None
                row = torch.autograd.grad(g.flatten()[i], p, retain_graph=True, allow_unused=True)[0]
                total += 0.0 if row is None else len(y) * float(row.flatten()[i])
        count += len(y)
    return total / count


class Model(nn.Module):
    """A linear layer from 4 to 5, `middle`, and one from 5 to 3."""

    def __init__(self, middle=torch.tanh):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.middle = nn.Linear(4, 5), nn.Linear(5, 3), middle
        self.double()

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


class Folded(Model):
    """Frames lie along the batch until they are averaged."""

    def forward(self, x):
        n, frames, features = x.shape
        hidden = self.middle(self.first(x.reshape(n * frames, features)) * self.gain)
        return self.last(hidden.view(n, frames, -1).mean(1))

    def __init__(self, middle):
        super().__init__(middle)
        self.gain = nn.Parameter(torch.rand(5).double())


class SequenceFirst(Model):
    """It gets (samples, positions, features), and works on (positions, samples, features)."""

    def forward(self, x):
        return self.last(self.middle(self.first(x.transpose(0, 1).contiguous())).mean(0))


class Scaled(Model):
    """A parameter without a dimension, and a product with a factor of its own."""

    def __init__(self, middle=torch.tanh):
        super().__init__(middle)
        self.scale = nn.Parameter(torch.tensor(1.5).double())

    def forward(self, x):
        hidden = torch.addmm(self.first.bias, x, self.first.weight.T, alpha=2.0)
        return self.last(self.middle(hidden)) * self.scale


class Add(torch.autograd.Function):
    """It squares, whatever it is called."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return 2 * ctx.saved_tensors[0] * grad


def hardest(z, y):
    losses = F.cross_entropy(z, y, reduction="none")
    return losses.topk(max(1, len(losses) // 2)).values.mean()


def flooded(z, y):
    return (F.cross_entropy(z, y) - 5.0).abs() + 5.0


def masked(z, y):
    return F.cross_entropy(z, y, ignore_index=-1, reduction="sum") / (y >= 0).sum().clamp(min=1)


def contrastive(z, y):
    z = F.normalize(z)
    return F.cross_entropy(z @ z.T.detach() * 5, torch.arange(len(z))) + z.square().sum() / len(z)


def batches(*shapes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator).double() for shape in shapes]
    return [(x, torch.randint(3, (len(x),), generator=generator)) for x in made]


def without_targets(data):
    return [(data[0][0], torch.full_like(data[0][1], -1)), *data[1:]]


def by_size(x):
    return torch.relu(x) if len(x) < 8 else torch.tanh(x)


PLAIN = batches((6, 4), (9, 4), (5, 4))
CASES = {
    "the loss of the hardest samples": (Model(torch.relu), hardest, PLAIN),
    "a loss that is turned over where it is small": (Model(), flooded, PLAIN),
    "a first batch without targets": (Model(torch.relu), masked, without_targets(PLAIN)),
    "a first batch of one, a loss of pairs": (Model(), contrastive, batches((1, 4), (7, 4), (6, 4))),
    "positions first, and one of them in the first batch": (
        SequenceFirst(torch.relu),
        F.cross_entropy,
        batches((4, 1, 4), (4, 8, 4)),
    ),
    "frames along a batch of one": (Folded(torch.relu), F.cross_entropy, batches((1, 6, 4), (5, 6, 4))),
    "only batches of one": (Folded(torch.tanh), F.cross_entropy, batches((1, 6, 4), (1, 6, 4))),
    "another activation in a later batch": (Model(by_size), F.cross_entropy, PLAIN),
    "a product with a factor, and a number": (Scaled(torch.relu), F.cross_entropy, PLAIN),
    "an operation by another's name": (Model(Add.apply), F.cross_entropy, PLAIN),
}


@pytest.mark.parametrize("name", list(CASES))
def test_the_trace_is_right(name):
    model, criterion, data = CASES[name]
    truth = truth_of(model, criterion, data)
    found = flatmin.trace(flatmin.Objective(model, criterion, data), max_products=200)
    assert abs(found.value - truth) <= 4 * found.stderr + 1e-8 * abs(truth), found.method
    assert found.stderr < 0.5 * abs(truth)


def test_a_batch_unlike_the_first_is_refused_by_the_split():
    model, criterion, data = CASES["another activation in a later batch"]
    with pytest.raises(ValueError, match=r"not piecewise linear(.|\n)*Use method='hutchinson'"):
        flatmin.trace(flatmin.Objective(model, criterion, data), method="gauss-newton")
    assert "not piecewise linear" in flatmin.trace(flatmin.Objective(model, criterion, data)).method


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_that_hides_parameters_is_refused(reentrant):
    class Checkpointed(Model):
        def forward(self, x):
            x = x.clone().requires_grad_()
            return self.last(checkpoint(lambda x: self.middle(self.first(x)), x, use_reentrant=reentrant))

    model = Checkpointed()
    objective = flatmin.Objective(model, F.cross_entropy, PLAIN)
    if reentrant:
        with pytest.raises(ValueError, match="use_reentrant=False"):
            flatmin.trace(objective)
        with pytest.raises(ValueError, match="use_reentrant=False"):
            flatmin.top_eigenvalues(objective)
    else:
        found = flatmin.trace(objective, max_products=200)
        assert abs(found.value - truth_of(model, F.cross_entropy, PLAIN)) <= 4 * found.stderr


def test_unknown_names_of_parameters():
    objective = flatmin.Objective(Model(), F.cross_entropy, PLAIN)
    with pytest.raises(ValueError, match="'frist'"):
        objective.only(["frist"])
