"""Escaping sharp minima (RSP, SAP) and Monge SAM: where each looks, what it returns, and where it ends."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD

import flatmin
from flatmin import problems
from flatmin.optim.escape import rsp, sap
from flatmin.optim.monge import monge_sam, monge_sam_in_metric
from flatmin.radii import Radii
from flatmin.vectors import Vector
from tests.optim.answers import Field, ask, close, cut, f64, flat, step, vec

G, V = f64(3, 4), f64(1, 1)
ADDED = f64(3.16, 3.88)  # (3, 4) + (1, 1) - 7/25 (3, 4)


def run(optimizer, model, steps):
    """Steps with a closure, and the point where they end."""

    def closure():
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return model.x.detach()


@pytest.mark.parametrize("threshold", [math.inf, 5.0])
def test_rsp_adds_what_is_orthogonal_to_g_of_the_gradient_on_the_sphere(threshold):
    direction, places = ask(rsp(Radii([0.5]), lambda: vec(6, -8), threshold), [G, V])
    close(torch.stack(places), torch.stack([f64(0, 0), f64(0.3, -0.4)]))
    close(direction, ADDED)


def test_rsp_is_the_plain_gradient_above_the_threshold():
    direction, places = ask(rsp(Radii([0.5]), lambda: vec(6, -8), 4.999), [G])
    close(direction, G)
    assert len(places) == 1


def test_rsp_at_a_stationary_point_projects_nothing_out():
    close(ask(rsp(Radii([0.5]), lambda: vec(6, -8), 1.0), [f64(0, 0), V])[0], V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_rsp_adds_is_orthogonal_to_g(dtype):
    model = Field().to(dtype)
    optimizer = flatmin.RSP(SGD(model.parameters(), lr=0.0), rho=0.5)
    gradient = flat(torch.autograd.grad(model(), list(model.parameters())))
    for _ in range(20):
        v = step(optimizer, model, model)[2] - gradient
        assert v.norm() > 0.1
        assert abs(v @ gradient) < 1e-6 * v.norm() * gradient.norm()


def test_rsp_looks_in_directions_uniform_on_the_circle():
    model, n = problems.hyperbola().module(), 2000
    optimizer = flatmin.RSP(SGD(model.parameters(), lr=0.0), rho=0.2)
    places = torch.stack([step(optimizer, model, model)[1][1] for _ in range(n)])
    close(places.norm(dim=1), torch.full((n,), 0.2, dtype=torch.float64), rtol=0, atol=1e-12)
    angle = torch.atan2(places[:, 1], places[:, 0])
    for k in (1, 2, 4):  # the moments of a square, an ellipse or half a circle are not zero
        assert (k * angle).cos().mean().abs() < 4 / math.sqrt(2 * n)
        assert (k * angle).sin().mean().abs() < 4 / math.sqrt(2 * n)


def test_rsp_walks_along_the_minima_of_the_hyperbola_to_the_flattest():
    problem = problems.hyperbola()
    model = problem.module(f64(4, 0.25))
    end = run(flatmin.RSP(SGD(model.parameters(), lr=0.05), rho=0.2, threshold=0.5), model, 2500)
    assert (problem.trace(end) / 2 - 2).abs() < 0.05
    assert problem.value(end) < 1e-6
    plain = problem.module(f64(4, 0.25))
    assert problem.trace(run(SGD(plain.parameters(), lr=0.05), plain, 200)) / 2 > 16  # gradient descent stays


def test_sap_adds_what_is_orthogonal_to_g_of_the_gradient_of_a_sample_up_or_down():
    for seed, sign in [(7, 1), (8, -1)]:
        direction, places = ask(sap(Radii([0.5]), math.inf, seed, 1, vec(0, 0)), [G, f64(0, 2), V])
        close(torch.stack(places), torch.stack([f64(0, 0), f64(0, 0), sign * f64(0, 0.5)]))
        close(direction, ADDED)


def test_sap_is_the_plain_gradient_above_the_threshold():
    close(ask(sap(Radii([0.5]), 4.999, 1, 1, vec(0, 0)), [G])[0], G)
    close(ask(sap(Radii([0.5]), 5.0, 1, 1, vec(0, 0)), [G, f64(0, 2), V])[0], ADDED)


def test_sap_looks_beside_the_point_where_the_gradient_of_the_sample_is_zero():
    answers = [G, f64(0, 0), f64(0, 2), V]
    direction, places = ask(sap(Radii([0.5]), math.inf, 1, 1, vec(1e-4, 0)), answers)
    close(torch.stack(places[1:]), torch.stack([f64(0, 0), f64(1e-4, 0), f64(0, 0.5)]))
    close(direction, ADDED)


class Samples(nn.Module):
    """Four samples with losses (x_i.z)^2 + (x_i.z)^4 / 4 - x_i[0] z[0]."""

    def __init__(self):
        super().__init__()
        self.z = nn.Parameter(f64(1, -0.5, 0.3))
        self.x = torch.stack([f64(1, 0.2, 0), f64(0, 1, -1), f64(-1, 1, 0.5), f64(0.3, 0, 2)])

    def gradients(self, z):
        p = (self.x @ z).unsqueeze(1)
        return (2 * p + p**3) * self.x - self.x * f64(1, 0, 0)

    def loss(self, rows):
        p = self.x[rows] @ self.z
        return (p**2 + p**4 / 4 - self.x[rows, 0] * self.z[0]).mean()


def test_sap_draws_a_sample_and_a_sign_evenly_and_keeps_the_gradient_of_the_batch():
    model, n, counts = Samples(), 800, torch.zeros(4, 2)
    optimizer = flatmin.SAP(SGD(model.parameters(), lr=0.0), rho=0.3)
    each = model.gradients(model.z.detach())
    g, units = each.mean(0), each / each.norm(dim=1, keepdim=True)
    for _ in range(n):
        rows = []

        def loss(rows=rows):
            rows.append(optimizer.take(torch.arange(4)).tolist())
            return model.loss(rows[-1])

        before, places, direction = step(optimizer, model, loss)
        (i,) = rows[1]
        assert rows == [[0, 1, 2, 3], [i], [i]]
        sign = 1 if places[2] @ units[i] > 0 else -1
        counts[i, (sign + 1) // 2] += 1
        close(places[2], 0.3 * sign * units[i])
        v = model.gradients(before + places[2])[i]
        close(direction, g + v - (v @ g) / (g @ g) * g)
    assert ((counts - n / 8).abs() < 4 * math.sqrt(n / 8 * 7 / 8)).all()


def test_sap_nudges_by_a_tiny_random_step_before_it_looks():
    model = Samples()
    model.x = model.x[:1] * f64(0, 1, 0)  # one sample, flat at z[1] = 0
    model.z.data[1] = 0.0
    optimizer = flatmin.SAP(SGD(model.parameters(), lr=0.0), rho=0.3)
    _, places, _ = step(optimizer, model, lambda: model.loss(optimizer.take(torch.arange(1))))
    assert 0 < places[2].norm() < 1e-3 * 0.3
    close(places[3].abs(), f64(0, 0.3, 0))


@pytest.mark.parametrize(
    ("n", "share"), [(1.0, 1 / math.sqrt(2)), (0.1, 0.9950371902), (10.0, 0.0995037190), (1e-6, 1.0), (0.0, 0.0)]
)
def test_monge_sam_divides_the_radius_by_the_root_of_one_plus_n_squared(n, share):
    u = f64(0.6, 0.8)
    for rule in (monge_sam(Radii([0.5])), monge_sam_in_metric(Radii([0.5]), lambda v: v)):
        direction, places = ask(rule, [n * u, V])
        close(torch.stack(places), torch.stack([f64(0, 0), 0.5 * share * u]), rtol=1e-9, atol=0)
        close(direction, V)


JACOBIAN = torch.stack([f64(2, 0.5, 0), f64(-1, 1.5, 0.3), f64(0, 1, -0.7)])
METRIC = JACOBIAN.T @ JACOBIAN


def transported(v):
    """v -> (A^T A)^-1 v on a vector in two pieces."""
    return Vector(cut(torch.linalg.solve(METRIC, flat(v.tensors)), v.present))


@pytest.mark.parametrize("theta", [f64(1, -0.5, 0.3), f64(0.1, 0.2, -0.1), f64(-3, 2, 4)])
def test_monge_sam_is_the_same_step_in_other_coordinates_with_their_metric_only(theta):
    def gradient(x):
        return f64(1, 2, -1) * x + x**3

    def in_psi(psi):
        return JACOBIAN.T @ gradient(JACOBIAN @ psi)

    g, psi, radii = gradient(theta), torch.linalg.solve(JACOBIAN, theta), Radii([0.4, 0.4])
    at = list(psi.split([2, 1]))
    expected = 0.4 * g / (g.norm() * (1 + g @ g).sqrt())
    close(ask(monge_sam(radii), gradient, list(theta.split([2, 1])))[1][1], expected)
    direction, (_, e) = ask(monge_sam_in_metric(radii, transported), in_psi, at)
    close(JACOBIAN @ e, expected)
    close(direction, in_psi(psi + e))
    without = JACOBIAN @ ask(monge_sam(radii), in_psi, at)[1][1]
    assert (without - expected).norm() > 0.1 * expected.norm()


def test_the_metric_is_what_the_optimizer_uses():
    model = Field()
    optimizer = flatmin.MongeSAM(SGD(model.parameters(), lr=0.1), rho=0.4, metric=lambda v: v * 0.25)
    before, places, _ = step(optimizer, model, model)
    g = model.gradient(before)  # M = 4 I: the length of e in the metric of the surface is rho
    e = places[1]
    close(4 * e @ e + (g @ e) ** 2, torch.tensor(0.16).double())
    close(e / e.norm(), g / g.norm())


def test_monge_sam_leaves_the_saddle_that_holds_sam():
    start, ends = f64(-1.5, 0.5), {}
    for name, steps in [("base", 200), ("sam", 200), ("monge-sam", 200)]:
        model = problems.hyperbola().module(start)
        options = {} if name == "base" else {"rho": 1.0}
        optimizer = flatmin.methods()[name].build(SGD(model.parameters(), lr=0.01), **options)
        ends[name, steps] = run(optimizer, model, steps)
    close(ends["base", 200], f64(-1.546, -0.647), rtol=0, atol=1e-3)
    assert ends["sam", 200].abs().max() < 0.02
    close(ends["monge-sam", 200], f64(-0.945, -0.941), rtol=0, atol=1e-3)
    x = start
    for _ in range(5000):
        x = x - 0.01 * ask(monge_sam(Radii([1.0])), problems.hyperbola().gradient, [x])[0]
    assert (x + 1).abs().max() < 0.1
