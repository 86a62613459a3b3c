"""How many samples a batch holds, whatever kind of batch it is; and that one batch is gone before the next comes."""

import dataclasses
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import flatmin
from flatmin.curvature import HessianOperator
from tests.curvature.nets import criterion, make


@dataclasses.dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


def loss_of(model, x, y):
    return criterion(model(x), y)


# name -> (a batch, forward for it). Without targets the model's own loss is what forward returns.
KINDS = {
    "a tensor": (lambda x, y: torch.cat([x, y[:, None]], 1), lambda m, b: (loss_of(m, b[:, :5], b[:, 5].long()), None)),
    "dicts": (lambda x, y: ({"x": x}, {"y": y}), lambda m, b: (loss_of(m, b[0]["x"], b[1]["y"]), b[1])),
    "nested": (lambda x, y: {"in": [{"x": x}], "y": y}, lambda m, b: (loss_of(m, b["in"][0]["x"], b["y"]), None)),
    "a dataclass": (Pair, lambda m, b: (loss_of(m, b.x, b.y), None)),
    "a namespace": (lambda x, y: SimpleNamespace(y=y, x=x), lambda m, b: (loss_of(m, b.x, b.y), None)),
    "a target per image": (
        lambda x, y: (x, [{"label": label.expand(3)} for label in y]),
        lambda m, b: (loss_of(m, b[0], torch.stack([t["label"][0] for t in b[1]])), b[1]),
    ),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_samples_are_counted_in_batches_of_any_kind(kind):
    model, x, y = make("relu")
    build, forward = KINDS[kind]
    own = flatmin.Objective(model, None, [build(x[:20], y[:20]), build(x[20:], y[20:])], forward=forward)
    assert own.loss() == pytest.approx(criterion(model(x), y).item(), rel=1e-12)
    assert own.num_samples == 24


class Opaque:
    __slots__ = ()


@pytest.mark.parametrize("batch", [Opaque(), ["a", "b", "c"], {"path": "a"}, SimpleNamespace(name="a")])
def test_a_batch_that_cannot_be_counted_is_refused(batch):
    model, x, y = make("relu")
    objective = flatmin.Objective(model, None, [batch], forward=lambda m, b: (loss_of(m, x, y), None))
    with pytest.raises(ValueError, match=r"samples of a batch cannot be told.*targets with a batch dimension"):
        objective.loss()


def test_batches_without_samples_count_as_one_if_all_are():
    def objective(data):
        return flatmin.Objective(nn.Linear(1, 1), None, data, forward=lambda m, b: (next(m.parameters()).sum() ** 2, b))

    assert objective([torch.zeros(())]).num_samples == 1
    assert objective([None, None]).num_samples == 2
    for mixed in ([torch.zeros(()), torch.zeros(3)], [torch.zeros(3), None]):
        with pytest.raises(ValueError, match="number of samples of a batch cannot be told"):
            objective(mixed).loss()


@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: {"label": y}])
def test_a_dataset_in_place_of_a_loader_is_refused(wrap):
    model, x, y = make("relu")
    data = [(row, wrap(label)) for row, label in zip(x, y, strict=True)]
    objective = flatmin.Objective(model, None, data, forward=lambda m, b: (m(b[0]).sum(), b[1]))
    with pytest.raises(ValueError, match=r"no batch dimension. If data is a Dataset"):
        objective.loss()


@pytest.mark.parametrize(
    "work",
    [
        lambda o: o.loss(),
        lambda o: o.gradient(),
        lambda o: HessianOperator(o, graph_memory=0).product(o.zeros()),
        lambda o: flatmin.trace(o, max_products=2, graph_memory=0),
    ],
    ids=["loss", "gradient", "product", "trace"],
)
def test_a_batch_is_gone_before_the_next_is_evaluated(work):
    model, x, y = make("relu")
    alive: list[weakref.ref] = []

    def forward(m, batch):
        assert not any(output() is not None for output in alive), "the last batch's outputs are still there"
        hidden = m[:3](batch[0])  # kept by the graph alone
        outputs = m[3:](hidden)
        alive.extend([weakref.ref(hidden), weakref.ref(outputs)])
        return outputs, batch[1]

    work(flatmin.Objective(model, criterion, [(x[i::3], y[i::3]) for i in range(3)], forward=forward))
    assert len(alive) >= 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss_in_float", [False, True])
def test_a_shuffled_loader_is_accepted_in_half_precision(dtype, loss_in_float):
    model, x, y = make("relu")
    model.to(dtype)
    loader = DataLoader(TensorDataset(x.to(dtype), y), batch_size=5, shuffle=True)
    loss = (lambda out, y: F.cross_entropy(out.float(), y)) if loss_in_float else criterion
    for _ in range(20):
        flatmin.Objective(model, loss, loader).check()


def test_losses_that_cancel_are_accepted_in_any_order():
    # The mean is near zero and says nothing about the size of what was rounded.
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    x = torch.randn(64, 1) * 1e3
    x = torch.cat([x, -x])
    loader = DataLoader(TensorDataset(x, x), batch_size=3, shuffle=True)
    for _ in range(20):
        flatmin.Objective(model, lambda out, _: out.mean() + 1e-3, loader).check()
