"""Second derivatives of our own: right by differences, where torch's own graphs are, and used only where they hold."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradgradcheck
from torch.utils.checkpoint import checkpoint

import flatmin
from flatmin.curvature.products.graph import kind, nodes
from flatmin.curvature.products.operators import HessianOperator, ResidualOperator
from flatmin.curvature.products.second import SECOND, BatchNorm, Convolution, LayerNorm, Pointwise
from flatmin.curvature.products.swapped import Swapped, worthwhile
from flatmin.curvature.products.ways import choose_way
from flatmin.vectors import Vector
from tests.curvature.nets import criterion, dense_hessian


def draw(*shape, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


MEAN, VARIANCE = torch.tensor([0.3, -1.0, 2.0]).double(), torch.tensor([0.5, 2.0, 1.0]).double()
STRIDED = ([2, 1], [1, 2], [1, 2], False, [0, 0], 2)
PLAIN = ([1], [0], [1], False, [0], 1)
FUNCTIONS = {
    "convolution, strided": (lambda x, w, b: Convolution.apply(x, w, b, STRIDED), [(3, 4, 6, 7), (6, 2, 3, 2), (6,)]),
    "convolution, one dimension": (lambda x, w, b: Convolution.apply(x, w, b, PLAIN), [(2, 3, 5), (4, 3, 2), (4,)]),
    "convolution, no bias": (lambda x, w: Convolution.apply(x, w, None, PLAIN), [(2, 3, 5), (4, 3, 2)]),
    "batch norm": (lambda x, w, b: BatchNorm.apply(x, w, b, MEAN, VARIANCE, 1e-3), [(4, 3, 2, 2), (3,), (3,)]),
    "batch norm, flat": (lambda x, w, b: BatchNorm.apply(x, w, b, MEAN, VARIANCE, 1e-3), [(4, 3), (3,), (3,)]),
    "batch norm, not affine": (lambda x: BatchNorm.apply(x, None, None, MEAN, VARIANCE, 1e-3), [(4, 3, 2)]),
    "layer norm": (lambda x, w, b: LayerNorm.apply(x, w, b, 1e-3), [(4, 5), (5,), (5,)]),
    "layer norm, no bias": (lambda x, w: LayerNorm.apply(x, w, None, 1e-3), [(4, 5), (5,)]),
    "layer norm, not affine": (lambda x: LayerNorm.apply(x, None, None, 1e-3), [(4, 5)]),
    **{name: (lambda x, name=name: Pointwise.apply(x, name), [(3, 4)]) for name in SECOND},
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_second_derivative_is_that_of_differences(name):
    function, shapes = FUNCTIONS[name]
    torch.manual_seed(0)
    assert gradgradcheck(function, [draw(*shape) for shape in shapes])


@pytest.mark.parametrize("name", [name for name, (_, shapes) in FUNCTIONS.items() if len(shapes) == 3])
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_frozen_parts_have_no_share_in_it(name, frozen):
    function, shapes = FUNCTIONS[name]
    torch.manual_seed(0)
    assert gradgradcheck(function, [draw(*shape).requires_grad_(i not in frozen) for i, shape in enumerate(shapes)])


CALLS = {
    "conv1d": lambda x: F.conv1d(x.flatten(2), WEIGHT.flatten(2), stride=2),
    "conv2d": lambda x: F.conv2d(x, WEIGHT, padding=(1, 0)),
    "conv3d": lambda x: F.conv3d(x.unsqueeze(2), WEIGHT.unsqueeze(2), dilation=1),
    "batch_norm": lambda x: F.batch_norm(x, MEAN.float(), VARIANCE.float(), WEIGHT[:, 0, 0, 0], eps=1e-3),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[2:], bias=torch.ones(x.shape[2:])),
    "gelu": F.gelu,
    "silu": F.silu,
}
WEIGHT = torch.linspace(-1, 1, 3 * 3 * 2 * 2).view(3, 3, 2, 2).requires_grad_()


@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients_are_those_of_torch_bit_for_bit(name):
    torch.manual_seed(0)
    x = draw(4, 3, 6, 5, dtype=torch.float32)

    def gradient(create_graph):
        y = CALLS[name](x)
        return y, torch.autograd.grad(y.square().sum(), [x, WEIGHT], create_graph=create_graph, allow_unused=True)

    y, grads = gradient(False)  # with create_graph torch has another formula for SiLU
    assert worthwhile([CALLS[name](x)])
    with Swapped():
        same, ours = gradient(True)
    assert any(kind(node) == "custom" for node in nodes([same]))
    assert torch.equal(y, same)
    for a, b in zip(grads, ours, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


class Own(torch.Tensor):
    """Somebody's tensor, which may mean something else."""


NOT_COVERED = {
    "autocast": lambda x: torch.autocast("cpu", torch.bfloat16)(lambda: F.conv2d(x, WEIGHT))(),
    "half precision": lambda x: F.gelu(x.bfloat16()),
    "vmap": lambda x: torch.func.vmap(F.silu)(x),
    "training": lambda x: F.batch_norm(x, MEAN.float(), VARIANCE.float(), training=True),
    "statistics of the batch": lambda x: F.batch_norm(x, None, None, training=True),
    "padding by name": lambda x: F.conv2d(x, WEIGHT, padding="valid"),
    "one sample": lambda x: F.conv2d(x[0], WEIGHT),
    "another function": lambda x: F.gelu(x, approximate="tanh"),
    "in place": lambda x: F.silu(x * 1, inplace=True),
    "a tensor of another kind": lambda x: F.gelu(x.as_subclass(Own)).as_subclass(torch.Tensor),
    "nothing recorded": lambda x: torch.no_grad()(F.gelu)(x),
}


@pytest.mark.parametrize("name", NOT_COVERED)
def test_what_is_not_covered_is_left_to_torch(name):
    x = draw(4, 3, 6, 5, dtype=torch.float32)
    with Swapped():
        y = NOT_COVERED[name](x)
    assert torch.equal(y, NOT_COVERED[name](x))
    assert all(kind(node) != "custom" for node in nodes([y]))


def test_mistakes_are_refused_as_torch_refuses_them():
    with Swapped(), pytest.raises(RuntimeError, match="normalized_shape"):
        F.layer_norm(draw(4, 3), (6,))


def test_there_is_no_third_derivative():
    x = draw(3)
    (first,) = torch.autograd.grad(Pointwise.apply(x, "gelu").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(first.sum(), x, create_graph=True)


class Mixed(nn.Module):
    """All of them, with a convolution whose weight is frozen and a norm whose bias is."""

    def __init__(self, recompute: bool = False):
        super().__init__()
        self.recompute = recompute
        self.first = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.SiLU(inplace=True), nn.Dropout(0.5)
        )
        self.second = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2), nn.LayerNorm([2, 2, 2]), nn.GELU(), nn.Flatten())
        self.head = nn.Linear(8, 3)
        self.second[0].weight.requires_grad_(False)
        self.second[1].bias.requires_grad_(False)

    def forward(self, x):
        x = checkpoint(self.first, x, use_reentrant=False) if self.recompute else self.first(x)
        return self.head(self.second(x))


def make(recompute: bool = False) -> tuple[Mixed, list]:
    torch.manual_seed(2)
    model = Mixed(recompute).double()
    x, y = torch.randn(12, 2, 5, 5, dtype=torch.float64), torch.randint(3, (12,))
    model(x)  # running statistics that are not 0 and 1
    return model.eval(), [(x[:7], y[:7]), (x[7:], y[7:])]


def vector(objective, seed: int = 0) -> Vector:
    torch.manual_seed(seed)
    return Vector([torch.randn_like(p) for p in objective.params])


def flat(v: Vector) -> torch.Tensor:
    return torch.cat([t.flatten() for t in v.present])


@pytest.mark.parametrize("graph_memory", [0, 2**31])
def test_products_equal_the_dense_hessian(graph_memory):
    model, batches = make()
    objective = flatmin.Objective(model, criterion, batches)
    operator = HessianOperator(objective, graph_memory=graph_memory)
    assert operator.way.swaps
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    hessian = dense_hessian(model, lambda: criterion(model(x), y))
    for seed in range(2):
        v = vector(objective, seed)
        torch.testing.assert_close(flat(operator.product(v)), hessian @ flat(v), rtol=1e-10, atol=1e-12)


def test_a_graph_that_is_not_kept_is_gone_after_its_product():
    model, batches = make()
    objective = flatmin.Objective(model, criterion, batches)
    for operator, kept in ((HessianOperator(objective), True), (HessianOperator(objective, graph_memory=0), False)):
        opened = []
        original = operator._open

        def noting(batch, index, original=original, opened=opened):
            opened.append(original(batch, index))
            return opened[-1]

        operator._open = noting  # type: ignore[method-assign]
        v = vector(objective)
        operator.product(v)
        if kept:
            opened[0].product(v.present)
        else:
            with pytest.raises(RuntimeError, match="second time"):
                opened[0].product(v.present)


def test_our_operations_are_recorded_for_hessian_and_residual_alone():
    model, batches = make()
    objective = flatmin.Objective(model, criterion, batches)
    recorded = []

    def note(module, args, output):
        if torch.is_grad_enabled():
            recorded.append(kind(args[0].grad_fn.next_functions[0][0]))  # below the flattening

    model.head.register_forward_hook(note)
    v = vector(objective)
    for operator in (HessianOperator(objective), ResidualOperator(objective)):
        recorded.clear()
        operator.product(v)
        assert recorded == ["custom", "custom"]
    recorded.clear()
    flatmin.GaussNewtonOperator(objective).product(v)
    assert recorded[-1] == "Gelu"


def test_a_network_without_them_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    objective = flatmin.Objective(model, criterion, [(torch.randn(6, 4), torch.randint(3, (6,)))])
    assert not choose_way(objective).swaps


class Attending(nn.Module):
    def __init__(self, recompute: bool):
        super().__init__()
        self.recompute, self.qkv, self.head = recompute, nn.Linear(4, 12), nn.Linear(4, 3)

    def attend(self, x):
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return F.dropout(F.scaled_dot_product_attention(q, k, v).squeeze(1), 0.5, self.training)

    def forward(self, x):
        return self.head(
            (checkpoint(self.attend, x, use_reentrant=False) if self.recompute else self.attend(x)).mean(1)
        )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind_of_model", ["convolutions", "attention"])
def test_checkpointing_evaluates_again_what_was_evaluated_first(kind_of_model, training):
    """Also with kept graphs, in products that come later, and if the caller left the model in training mode."""
    products = []
    for recompute in (False, True):
        torch.manual_seed(5)
        if kind_of_model == "convolutions":
            model, batches = make(recompute)
        else:
            model, batches = Attending(recompute).double(), [(torch.randn(6, 5, 4).double(), torch.randint(3, (6,)))]
        objective = flatmin.Objective(model.train(training), criterion, batches)
        operator = HessianOperator(objective)
        assert operator.way.name == "autograd"
        assert "kept" in operator.method
        v = vector(objective)
        products += [flat(operator.product(v)) for _ in range(3)]
    for product in products[1:]:
        torch.testing.assert_close(product, products[0], rtol=1e-10, atol=1e-12)
