"""A product is always found, and says how: double backward, differences of gradients, differences of losses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flatmin
from flatmin.curvature.products.operators import HessianOperator
from flatmin.curvature.products.ways import Way, choose_way
from flatmin.vectors import Vector
from tests.curvature.nets import Attention, criterion, dense_hessian, make


def flat(v: Vector) -> torch.Tensor:
    return torch.cat([t.flatten() for t in v.present])


def relative_error(product: Vector, truth: torch.Tensor) -> float:
    return float((flat(product).double() - truth).norm() / truth.norm())


def checked(way: Way) -> float:
    """The cross-check, which must be there."""
    assert way.cross_check is not None
    return way.cross_check


def random_signs(objective) -> Vector:
    torch.manual_seed(1)
    return Vector(torch.randint(2, p.shape).to(p.dtype) * 2 - 1 for p in objective.params)


class Once(torch.autograd.Function):
    """tanh, written as users write it: its backward cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, *grads):
        return Once._first(ctx, *grads)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def _first(ctx, *grads):
        (y,) = ctx.saved_tensors
        return grads[0] * (1 - y**2)


class Never(torch.autograd.Function):
    """tanh without any backward."""

    @staticmethod
    def forward(ctx, x):
        return x.tanh()

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError("no backward here")


class Custom(nn.Module):
    """The tanh net, with its activation replaced."""

    def __init__(self, net: nn.Module, activation):
        super().__init__()
        self.net, self.activation = net, activation

    def forward(self, x):
        first, _, norm, last = self.net.children()
        return last(norm(self.activation(first(x))))


def custom(activation):
    """An objective with this activation, and the dense Hessian of the same function."""
    model, x, y = make("tanh")
    objective = flatmin.Objective(Custom(model, activation), criterion, [(x[:16], y[:16]), (x[16:], y[16:])])
    return objective, dense_hessian(model, lambda: criterion(model(x), y))


def test_single_precision_with_attention_and_layer_norm_against_double_precision():
    torch.manual_seed(0)
    model = Attention().double()
    x, y = torch.randint(7, (16, 5)), torch.randint(3, (16,))
    truth = dense_hessian(model, lambda: criterion(model(x), y))
    objective = flatmin.Objective(model.float(), criterion, [(x, y)])
    v = random_signs(objective)
    operator = HessianOperator(objective)
    assert relative_error(operator.product(v), truth @ flat(v).double()) < 1e-5
    assert "double backward" in operator.method


def test_without_a_second_derivative_gradients_are_subtracted():
    objective, hessian = custom(Once.apply)
    operator = HessianOperator(objective)
    assert "differences of gradients (double backward failed: " in operator.method
    assert checked(operator.way) < 1e-6
    v = random_signs(objective)
    for scale in (1.0, 1e-6, 1e6):  # the step follows the length of the vector
        assert relative_error(operator.product(v * scale), hessian @ flat(v) * scale) < 1e-7


def test_differences_in_single_precision():
    objective, hessian = custom(torch.tanh)
    for data in objective.data:
        assert data[0].dtype == torch.float64
    model, x, y = make("tanh")
    single = flatmin.Objective(model.float(), criterion, [(x.float(), y)])
    operator = HessianOperator(single, "difference")
    v = random_signs(single)
    error = relative_error(operator.product(v), hessian @ flat(v).double())
    assert error < 3e-3
    assert checked(operator.way) < 1e-2


def test_without_any_backward_losses_are_subtracted():
    objective, hessian = custom(Never.apply)
    way = choose_way(objective)
    assert way.name == "loss"
    assert "differences of gradients failed: no backward here" in way.text
    assert checked(way) < 1e-3
    v = random_signs(objective)
    total = count = 0.0
    for curvature, batch in HessianOperator(objective, way).batches():
        total, count = total + batch.size * curvature.forms(v.present), count + batch.size
    assert float(total / count) == pytest.approx(float(flat(v) @ hessian @ flat(v)), rel=1e-5)
    with pytest.raises(ValueError, match="products with vectors need a backward pass"):
        HessianOperator(objective, way).product(v)


class Wrong(torch.autograd.Function):
    """tanh whose backward hides its dependence on the input: double backward is wrong, and nothing raises."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y.detach().clone())
        return y

    @staticmethod
    def backward(ctx, *grads):
        (y,) = ctx.saved_tensors
        return grads[0] * (1 - y.detach() ** 2)


@pytest.mark.parametrize("seed", range(20))
def test_a_vector_that_is_tried_is_not_in_the_null_space(seed):
    # With equal signs for all classes H v would be 0, and two ways to compute it would agree about nothing.
    torch.manual_seed(1)
    model = nn.Linear(2, 2, bias=False)
    data = [(torch.randn(8, 2), torch.randint(2, (8,)))]
    objective = flatmin.Objective(model, nn.CrossEntropyLoss(), data)
    check = flatmin.HessianOperator(objective, seed=seed).way.cross_check
    assert check is not None
    assert check < 0.05


def test_the_cross_check_shows_a_second_derivative_that_is_silently_wrong():
    assert checked(choose_way(custom(torch.tanh)[0])) < 1e-6
    with pytest.warns(RuntimeWarning, match="the second derivative of a custom autograd function may be wrong"):
        assert checked(choose_way(custom(Wrong.apply)[0])) > 0.05


def test_a_way_can_be_asked_for_and_is_refused_where_impossible():
    objective, hessian = custom(torch.tanh)
    v = random_signs(objective)
    product = HessianOperator(objective, "difference").product(v)
    assert relative_error(product, hessian @ flat(v)) < 1e-7
    with pytest.raises(ValueError, match=r"products='autograd' is not possible here; double backward failed"):
        choose_way(custom(Once.apply)[0], "autograd")
    with pytest.raises(ValueError, match=r"unknown products 'hessian'. Known: auto, autograd, difference, loss"):
        choose_way(objective, "hessian")


@pytest.mark.parametrize("products", ["autograd", "difference"])
def test_unused_and_frozen_parameters_and_a_linear_loss(products):
    used, unused, frozen = nn.Linear(2, 1), nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    model = nn.ModuleList([used, unused, frozen])
    objective = flatmin.Objective(model, None, [torch.ones(4, 2)], forward=lambda m, b: (used(frozen(b)).mean(), b))
    product = HessianOperator(objective, products).product(random_signs(objective))
    assert len(product) == 4
    assert float(product.norm()) == pytest.approx(0, abs=1e-3 if products == "difference" else 0)


@pytest.mark.parametrize("products", ["autograd", "difference", "loss"])
def test_nothing_is_changed(products):
    model, x, y = make("conv")
    model.train().zero_grad()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    objective = flatmin.Objective(model, criterion, [(x, y)])
    operator = HessianOperator(objective, products)
    for curvature, _ in operator.batches():
        curvature.forms(random_signs(objective).present)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(torch.get_rng_state(), rng)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on importing its compiler
def test_a_compiled_model_is_measured_on_what_it_wraps():
    model, x, y = make("relu")
    objective = flatmin.Objective(torch.compile(model), criterion, [(x, y)])  # type: ignore[arg-type]
    hessian = dense_hessian(model, lambda: F.cross_entropy(model(x), y))
    v = random_signs(objective)
    assert relative_error(HessianOperator(objective).product(v), hessian @ flat(v)) < 1e-12


class _Once(torch.autograd.Function):
    """x^2 whose backward pass cannot be differentiated, and does not say so when it is the last operation."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[override]
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def test_a_last_operation_without_a_second_derivative_is_seen():
    model = torch.nn.Linear(3, 1, bias=False).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)

    def objective(square):
        return flatmin.Objective(model, lambda out, y: square((out - y).square().mean().sqrt()), [(x, y)])

    way = choose_way(objective(_Once.apply))
    assert way.name == "difference"
    assert "an operation is once_differentiable" in way.text
    exact = flatmin.trace(objective(torch.square), max_products=8, method="hutchinson")
    for method in ("hutchinson", "auto"):
        found = flatmin.trace(objective(_Once.apply), max_products=8, method=method)
        assert found.value == pytest.approx(exact.value, rel=1e-6)
    with pytest.raises(RuntimeError, match="an operation is once_differentiable"):
        flatmin.trace(objective(_Once.apply), method="gauss-newton")
