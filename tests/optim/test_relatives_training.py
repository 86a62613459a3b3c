"""The relatives of SAM inside an optimizer: buffers, groups, noise, chosen samples, and when each looks."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

import flatmin
from flatmin.optim.relatives.esam import Hardest
from tests.optim.answers import Field, close, cut, f64, flat, step


@pytest.mark.parametrize(("start", "expected"), [(0, [2, 1, 1, 2, 1]), (1, [1, 2, 1, 1, 2])])
def test_looksam_looks_at_every_kth_step(start, expected):
    model = Field()
    optimizer = flatmin.LookSAM(SGD(model.parameters(), lr=0.01), k=3, start=start)
    assert [len(step(optimizer, model, model)[1]) for _ in range(5)] == expected


def test_wsam_drifts_by_the_learning_rate_of_each_group_beside_what_adamw_does():
    model, other = Field(), Field()
    groups = [[{"params": [m.w], "lr": 0.1}, {"params": [m.b], "lr": 0.02}] for m in (model, other)]
    optimizer, adam = flatmin.WSAM(AdamW(groups[0]), rho=0.3, gamma=0.6), AdamW(groups[1])
    for _ in range(3):
        before, places, direction = step(optimizer, model, model)
        g = model.gradient(before)
        close(places[1], 0.3 * g / g.norm())
        close(direction, g)
        other.w.grad, other.b.grad = cut(g, [other.w, other.b])
        adam.step()
        drift = 1.5 * (model.gradient(before + places[1]) - g) * f64(0.1, 0.1, 0.1, 0.1, 0.02, 0.02)
        close(model.point(), other.point() - drift)
        other.load_state_dict(model.state_dict())


def test_wsam_skips_a_step_whose_drift_is_not_finite():
    model = Field()
    optimizer, calls = flatmin.WSAM(SGD(model.parameters(), lr=0.1)), []

    def loss():
        calls.append(1)
        return model() * (math.inf if len(calls) == 2 else 1.0)

    with pytest.warns(RuntimeWarning, match="direction is not finite"):
        before, _, _ = step(optimizer, model, loss)
    assert torch.equal(model.point(), before)


@pytest.mark.parametrize(
    ("base", "old", "new"),
    [(lambda p: SGD(p, lr=0.01, momentum=0.7), 0.7, 1.0), (lambda p: Adam(p, lr=0.01, betas=(0.8, 0.9)), 0.8, 0.2)],
)
def test_momentum_sam_reads_the_buffers_of_sgd_and_adam(base, old, new):
    model = Field()
    optimizer, velocity = flatmin.MomentumSAM(base(model.parameters()), rho=0.4), torch.zeros(6).double()
    for t in range(4):
        before, places, direction = step(optimizer, model, model)
        assert len(places) == 1
        close(places[0], -0.4 * velocity / velocity.norm() if t else velocity)
        close(direction, model.gradient(before + places[0]))
        velocity = old * velocity + new * direction


def test_momentum_sam_without_momentum_says_so():
    model = Field()
    optimizer = flatmin.MomentumSAM(SGD(model.parameters(), lr=0.01))
    step(optimizer, model, model)
    with pytest.raises(ValueError, match="needs momentum"):
        step(optimizer, model, model)


def test_random_sam_draws_noise_in_the_scale_of_each_filter():
    model, other = Field(), Field()
    optimizer = flatmin.RandomSAM(SGD(model.parameters(), lr=0.0), rho=0.5, sigma=0.2, weight=2.0, seed=3)
    plain = flatmin.NSO(SGD(other.parameters(), lr=0.0), sigma=0.2, antithetic=False, seed=3)
    (before, (noise, e), direction), (_, (z,), _) = step(optimizer, model, model), step(plain, other, other)
    norms = torch.cat([model.w.norm(dim=1).repeat_interleave(2), model.b.norm().repeat(2)]).detach()
    close(noise, z * norms)
    d = noise + 2.0 * model.gradient(before + noise)
    close(e, 0.5 * d / d.norm())
    close(direction, model.gradient(before + e))


def test_eigen_sam_searches_again_every_few_steps():
    model = Field()
    optimizer = flatmin.EigenSAM(SGD(model.parameters(), lr=0.001), frequency=2)
    assert [len(step(optimizer, model, model)[1]) for _ in range(4)] == [12, 2, 12, 2]


@pytest.mark.filterwarnings("ignore:BSAM has a momentum")
def test_bsam_in_an_optimizer_draws_unit_noise_and_decays_to_the_weights_not_the_perturbed_point():
    model, drawn = Field(), []
    options = {"num_data": 4, "prior": 4.0, "rho": 0.5, "betas": (0.0, 1.0), "initial": 2.0}
    optimizer = flatmin.BSAM(SGD(model.parameters(), lr=1e-3), **options)
    for _ in range(200):
        before, (noise, e), direction = step(optimizer, model, model)
        drawn.append(noise * (4 * 2.0) ** 0.5)
        close(e, 0.5 * model.gradient(before + noise) / 2.0)
        close(direction, (model.gradient(before + e) + 1.0 * before) / 2.0)
    z = torch.cat(drawn)
    assert z.mean().abs() < 4 / len(z) ** 0.5
    assert (z.var() - 1).abs() < 4 * (2 / len(z)) ** 0.5


def test_bsam_gives_a_layer_that_joins_later_its_first_precision():
    model = Field()
    optimizer = flatmin.BSAM(SGD(model.parameters(), lr=0.01), num_data=50, prior=0.0, betas=(0.5, 0.9), initial=4.0)
    step(optimizer, model, lambda: model.w.square().sum())
    _, (noise, e), direction = step(optimizer, model, lambda: 3 * model.b.sum() + model.w.square().sum())
    assert (noise[4:] != 0).all()
    close(e[4:], 0.01 * f64(3, 3) / 4)
    close(direction[4:], 0.5 * f64(3, 3) / 4)
    assert "flatmin_precision" in optimizer.state[model.b]


class Regression(nn.Module):
    """Three tensors of five weights, and the losses (x.z - y)^2 / 2 of eight samples."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(f64(*t)) for t in [(1, -1), (0.5,), (2, -0.5)])
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
        self.y = torch.randn(8, generator=generator, dtype=torch.float64)

    def losses(self, z):
        return (self.x @ z - self.y) ** 2 / 2

    def gradients(self, z):
        return (self.x @ z - self.y).unsqueeze(1) * self.x

    def forward(self):
        return self.losses(torch.cat([self.a, self.b, self.c]))


TENSORS = torch.tensor([0, 0, 1, 2, 2])  # which tensor each weight is in


def test_esam_moves_each_tensor_with_probability_beta_and_learns_from_the_samples_hurt_most():
    model, steps, rho, beta = Regression(), 400, 0.6, 0.4
    optimizer = flatmin.ESAM(SGD(model.parameters(), lr=0.0), rho=rho, beta=beta, gamma=0.375)
    g = model.gradients(flat(model.parameters())).mean(0)
    moved = torch.zeros(steps, 3)
    for t in range(steps):
        z, places, direction = step(optimizer, model, lambda: optimizer.mean(model()))
        moved[t, TENSORS[places[1] != 0]] = 1
        close(places[1], torch.where(moved[t, TENSORS] > 0, rho / beta * g / g.norm(), 0.0))
        rise = model.losses(z + places[1]) - model.losses(z)
        hurt = rise.argsort(descending=True, stable=True)[:3]
        if moved[t].any():  # else no loss rises, and any choice is right
            close(direction, model.gradients(z + places[1])[hurt].mean(0))
    assert ((moved.mean(0) - beta).abs() < 4 * math.sqrt(beta * (1 - beta) / steps)).all()
    both = (moved[:, 0] * moved[:, 1]).mean()  # and independently of each other
    assert (both - beta**2).abs() < 4 * math.sqrt(beta**2 * (1 - beta**2) / steps)


def test_esam_takes_the_norm_over_what_may_be_moved():
    model = Regression()
    optimizer = flatmin.ESAM(SGD(model.parameters(), lr=0.0), rho=0.6, beta=1.0, perturb=[model.a, model.b])
    z, places, _ = step(optimizer, model, lambda: optimizer.mean(model()))
    g = model.gradients(z).mean(0) * f64(1, 1, 1, 0, 0)
    close(places[1], 0.6 * g / g.norm())


@pytest.mark.parametrize(("gamma", "n", "kept"), [(0.55, 100, 55), (0.5, 5, 3), (0.01, 8, 1), (1.0, 7, 7)])
def test_esam_keeps_the_share_gamma_of_the_samples_and_at_least_one(gamma, n, kept):
    hardest = Hardest(gamma)
    rises = torch.randperm(n).double()
    hardest.remember(torch.ones(n))
    assert sorted(hardest.choose(1 + rises).tolist()) == [1.0 + r for r in range(n - kept, n)]


def test_esam_draws_the_same_tensors_whatever_the_default_dtype():
    def chosen(dtype: torch.dtype) -> list[tuple[float, ...]]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            params = [torch.nn.Parameter(torch.ones(1)) for _ in range(8)]
            optimizer = flatmin.ESAM(SGD(params, lr=0.0), beta=0.5)
            rules: Any = [optimizer.rule() for _ in range(3)]
            return [rule.gi_frame.f_locals["chosen"].values for rule in rules]
        finally:
            torch.set_default_dtype(before)

    assert chosen(torch.float32) == chosen(torch.float64)
