"""The relatives of SAM: where each looks and what it returns, against vectors worked out by hand."""

import math

import pytest
import torch

from flatmin.optim.relatives.bsam import bsam
from flatmin.optim.relatives.eigen_sam import eigen_sam
from flatmin.optim.relatives.fisher_sam import fisher_sam
from flatmin.optim.relatives.friendly_sam import friendly_sam
from flatmin.optim.relatives.gsam import gsam
from flatmin.optim.relatives.looksam import looksam
from flatmin.optim.relatives.momentum_sam import momentum_sam
from flatmin.optim.relatives.random_sam import random_sam
from flatmin.optim.relatives.wsam import wsam
from flatmin.optim.rule import Update
from flatmin.optim.sam import asam, unnormalised_sam
from flatmin.radii import Radii
from flatmin.vectors import Vector
from tests.optim.answers import Field, ask, close, cut, f64, flat, vec

G, GP = f64(3, 4), f64(2, 0)  # the gradient at the weights, of norm 5, and the one at the perturbed point
U = G / 5


def test_usam_moves_by_rho_times_the_gradient():
    direction, places = ask(unnormalised_sam(Radii([0.1])), [G, GP])
    close(torch.stack(places), torch.stack([f64(0, 0), f64(0.3, 0.4)]))
    close(direction, GP)


@pytest.mark.parametrize(
    ("eta", "normalize", "expected"),
    [
        (0.0, True, f64(12, 4, 12) / 14),  # T = (2, 1, 1): T g = (6, 4, 12), of norm 14
        (1.0, True, f64(27, 16, 12) / 17),  # T = (3, 2, 1): T g = (9, 8, 12), of norm 17
        (1.0, False, f64(27, 16, 12)),
    ],
)
def test_asam_stretches_matrices_and_leaves_vectors(eta, normalize, expected):
    at = [f64(2, -1).view(1, 2), f64(7)]
    rule = asam(Radii([0.7, 0.7]), Vector(at), eta, normalize)
    direction, places = ask(rule, [f64(3, 4, 12), f64(1, 2, 3)], at)
    close(torch.stack(places), torch.stack([f64(0, 0, 0), 0.7 * expected]))
    close(direction, f64(1, 2, 3))


def test_gsam_takes_off_the_part_of_g_orthogonal_to_the_perturbed_gradient():
    direction, places = ask(gsam(Radii([0.5]), alpha=0.25), [G, GP])
    close(places[1], 0.5 * U)
    close(direction, f64(2, -1))  # g less its part along (1, 0) is (0, 4)


def test_looksam_remembers_the_unit_vector_of_what_is_orthogonal_to_g_and_adds_it_in_between():
    memory = {}
    direction, places = ask(looksam(Radii([0.5]), 0.7, True, memory), [G, GP])
    close(places[1], 0.5 * U)
    close(direction, GP)
    close(memory["ascent"].tensors[0], f64(0.8, -0.6))  # (2, 0) - 6/25 (3, 4) = 1.6 (0.8, -0.6)
    direction, places = ask(looksam(Radii([0.5]), 0.7, False, memory), [f64(6, 8)])
    assert len(places) == 1
    close(direction, f64(6, 8) + 0.7 * 10 * f64(0.8, -0.6))


def test_looksam_without_a_memory_and_with_nothing_orthogonal():
    memory = {}
    direction, places = ask(looksam(Radii([0.5]), 0.7, False, memory), [G, 2 * G])
    close(direction, 2 * G)
    assert len(places) == 2
    assert memory["ascent"].norm() < 1.0 + 1e-6  # rounding may leave a direction, never more than a unit vector
    direction, _ = ask(looksam(Radii([0.5]), 0.7, True, memory), [G, f64(0, 0)])
    assert memory["ascent"].norm() == 0


def test_friendly_sam_takes_the_mean_out_before_it_moves_the_mean():
    memory = {}
    ascents, means = [f64(0.6, 0.8), f64(1, 0), f64(0, -1)], [f64(3, 4), f64(3.5, 4), f64(3.5, 3.25)]
    for g, ascent, mean in zip([G, f64(5, 4), f64(3.5, 1)], ascents, means, strict=True):
        direction, places = ask(friendly_sam(Radii([0.5]), 1.0, 0.75, memory), [g, GP])
        close(torch.stack(places), torch.stack([f64(0, 0), 0.5 * ascent]))
        close(direction, GP)
        close(memory["mean"].tensors[0], mean)


def test_friendly_sam_takes_out_sigma_times_the_mean():
    _, places = ask(friendly_sam(Radii([0.5]), 0.5, 0.9, {"mean": vec(2, 2)}), [f64(4, 5), GP])
    close(places[1], 0.5 * U)


def test_wsam_coupled_weighs_the_two_gradients():
    direction, places = ask(wsam(Radii([0.5]), 0.75, decouple=False), [G, GP])
    close(places[1], 0.5 * U)
    close(direction, f64(0, -8))  # a = 3: -2 (3, 4) + 3 (2, 0)


def test_wsam_decoupled_hands_over_g_and_the_rest_as_a_drift():
    rule = wsam(Radii([0.5]), 0.75, decouple=True)
    next(rule)
    rule.send(Vector([G]))
    with pytest.raises(StopIteration) as stop:
        rule.send(Vector([GP]))
    update = stop.value.value
    assert isinstance(update, Update)
    close(flat(update.direction.tensors), G)
    close(flat(update.drift.tensors), f64(-3, -12))  # a = 3: 3 ((2, 0) - (3, 4))


def test_momentum_sam_moves_against_the_buffer_and_not_at_all_without_one():
    direction, places = ask(momentum_sam(Radii([0.5]), Vector([G])), [GP])
    close(places, [-0.5 * U])
    close(direction, GP)
    assert ask(momentum_sam(Radii([0.5]), None), [GP])[1][0].norm() == 0


def test_fisher_sam_divides_by_one_plus_eta_g_squared():
    # g = (1, 2), eta = 2: F^-1 g = (1/3, 2/9), g^T F^-1 g = 1/3 + 4/9 = 7/9
    direction, places = ask(fisher_sam(Radii([0.5]), 2.0), [f64(1, 2), GP])
    close(places[1], 0.5 * f64(1 / 3, 2 / 9) / math.sqrt(7 / 9))
    close(direction, GP)
    close(ask(fisher_sam(Radii([0.5]), 0.0), [G, GP])[1][1], 0.5 * U)


def test_random_sam_ascends_along_the_noise_and_the_gradient_found_there():
    direction, places = ask(random_sam(Radii([0.5]), vec(1, 0), weight=0.5), [f64(4, 8), GP])
    close(torch.stack(places), torch.stack([f64(1, 0), 0.5 * U]))  # d = (1, 0) + (2, 4)
    close(direction, GP)


@pytest.mark.parametrize("v", [vec(1, 0), vec(-1, 0)])
def test_eigen_sam_bends_to_the_side_of_the_eigenvector_that_goes_up(v):
    direction, places = ask(eigen_sam(Radii([0.5]), 0.25, None, {"eigenvector": v}), [G, GP])
    close(places[1], 0.5 * (U + 0.25 * f64(0.64, -0.48)))  # v less 0.6 (0.6, 0.8)
    close(direction, GP)


def test_eigen_sam_without_an_eigenvector_is_sam():
    close(ask(eigen_sam(Radii([0.5]), 0.25, None, {}), [G, GP])[1][1], 0.5 * U)


def test_eigen_sam_searches_on_from_the_eigenvector_that_it_remembers():
    _, places = ask(eigen_sam(Radii([0.5]), 0.2, vec(1, 0), {"eigenvector": vec(0.6, 0.8)}), lambda x: x, [G])
    close(places[1], 0.01 * f64(0.6, 0.8))


def test_eigen_sam_finds_the_top_eigenvector_of_a_quadratic():
    c, s, memory = 0.8, 0.6, {}
    basis = torch.stack([f64(c, s, 0), f64(-s, c, 0), f64(0, 0, 1)], 1)
    a, at = basis @ torch.diag(f64(-5, 0.5, 0.1)) @ basis.T, f64(1, -2, 1.5)
    _, places = ask(eigen_sam(Radii([0.5]), 0.2, vec(1, 1, 1), memory), lambda x: a @ x, [at])
    v, u = memory["eigenvector"].tensors[0], a @ at / (a @ at).norm()
    assert (v.abs() - basis[:, 0]).abs().max() < 1e-5  # (0.5 / 5)^5, and the sign is free
    assert len(places) == 12
    close(torch.stack(places[1:11:2]), -torch.stack(places[2:11:2]))
    ascent = u + 0.2 * torch.sign(u @ v) * (v - (u @ v) * u)
    close(places[11], 0.5 * ascent)


def test_bsam_steps_with_the_old_precision_and_without_bias_correction():
    field, memory, lr, num_data, prior, damping, rho, b1, b2 = Field(), {}, 0.1, 50, 4.0, 0.3, 0.2, 0.8, 0.6
    w, m, s = f64(1, -2, 0.5, 1.5, -1, 2), torch.zeros(6).double(), torch.full((6,), 2.0).double()
    for t in range(3):
        n = torch.randn(6, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        like = cut(w, [field.w, field.b])
        options = {"num_data": num_data, "prior": prior, "damping": damping, "betas": (b1, b2), "initial": 2.0}
        rule = bsam(Radii([rho, rho]), Vector(like), Vector(cut(n, like)), memory, **options)
        direction, places = ask(rule, field.gradient, like)
        noise = n / (num_data * s) ** 0.5
        g = field.gradient(w + noise)
        m = b1 * m + (1 - b1) * (field.gradient(w + rho * g / s) + prior / num_data * w)
        close(torch.stack(places), torch.stack([noise, rho * g / s]))
        close(direction, m / s)
        w = w - lr * m / s
        s = b2 * s + (1 - b2) * (s**0.5 * g.abs() + prior / num_data + damping)
        close(flat(memory["precision"].tensors), s)
