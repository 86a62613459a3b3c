"""Noise in the scale of the filters, and noise on parts of the batch: NSO's variants and RWP."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

import flatmin
from tests.optim.answers import Field, close, f64, flat, step


class Power(nn.Module):
    """Samples with losses (x_i.z - y_i)^power / power in a weight of shape (1, 3)."""

    def __init__(self, n, power=2):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.z = nn.Parameter(f64(1, -0.5, 0.3).view(1, 3))
        self.x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        self.y = torch.randn(n, generator=generator, dtype=torch.float64) if power == 2 else torch.zeros(n).double()
        self.power = power

    def gradient(self, z, rows):
        x = self.x[rows]
        return ((x @ z - self.y[rows]) ** (self.power - 1)).unsqueeze(1).mul(x).mean(0)

    def loss(self, x, y):
        return ((x @ self.z[0] - y) ** self.power).mean() / self.power


def on_parts(optimizer, model):
    return step(optimizer, model, lambda: model.loss(*optimizer.take(model.x, model.y)))


def filter_norms(model):
    """By hand for (2, 2) and (2,): the row norms of the matrix, and one norm for the vector."""
    norms = [[row.norm(), row.norm()] for row in model.w.detach()] + [[model.b.detach().norm()] * 2]
    return torch.stack([n for pair in norms for n in pair])


@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"restore": "recompute", "antithetic": False}])
def test_filter_noise_is_sigma_times_the_norm_of_the_filter_of_the_weights_for_every_draw(options):
    # All draws, also those that are made after a probe away from the weights.
    model, other = Field(), Field()
    filtered = flatmin.NSO(SGD(model.parameters(), lr=0.0), 0.5, 3, scale="filter", **options)
    absolute = flatmin.NSO(SGD(other.parameters(), lr=0.0), 1.0, 3, **options)
    _, places, _ = step(filtered, model, model)
    _, units, _ = step(absolute, other, other)
    close(torch.stack(places), 0.5 * torch.stack(units) * filter_norms(model))


def test_a_filter_of_a_kernel_is_one_output_channel():
    model = nn.Conv2d(2, 3, 2, bias=False)
    optimizer = flatmin.NSO(SGD(model.parameters(), lr=0.0), 0.5, law="rademacher", scale="filter", antithetic=False)
    _, (u,), _ = step(optimizer, model, lambda: model(torch.ones(1, 2, 3, 3)).square().sum())
    norms = model.weight.detach().reshape(3, 8).norm(dim=1)
    close(u.view(3, 8).abs(), 0.5 * norms.unsqueeze(1).expand(3, 8))


def test_a_split_batch_leaves_the_difference_of_the_halves_hessians_times_u():
    # Affine halves g_h = A_h z - b_h: [g_1(W + u) + g_2(W - u)] / 2 = g(W) + (A_1 - A_2) u / 2.
    model = Power(8)
    optimizer = flatmin.NSO(SGD(model.parameters(), lr=0.0), sigma=0.5, split_batch=True)
    z, (u, minus), direction = on_parts(optimizer, model)
    close(minus, -u)
    first, second = (rows.T @ rows / 4 for rows in (model.x[:4], model.x[4:]))
    close(direction, model.gradient(z, slice(None)) + (first - second) @ u / 2)
    assert (first - second).norm() > 0.1


def test_split_batches_average_over_all_pairs():
    model = Power(8, power=4)
    optimizer = flatmin.NSO(SGD(model.parameters(), lr=0.0), 0.5, 3, split_batch=True)
    z, places, direction = on_parts(optimizer, model)
    rows = [slice(0, 4), slice(4, 8)] * 3
    close(direction, torch.stack([model.gradient(z + u, half) for u, half in zip(places, rows, strict=True)]).mean(0))
    close(torch.stack(places[::2]), -torch.stack(places[1::2]))
    assert len({float(u[0]) for u in places}) == 6


def test_the_expectation_of_a_split_batch_is_the_smoothed_gradient():
    # Losses p^4 / 4 with p = x.z: E (p + x.u)^3 x = (p^3 + 3 sigma^2 |x|^2 p) x.
    model, sigma, n = Power(6, power=4), 0.4, 1500
    optimizer = flatmin.methods()["nso-split"].build(SGD(model.parameters(), lr=0.0), sigma=sigma)
    p = model.x @ flat([model.z])
    smoothed = ((p**3 + 3 * sigma**2 * model.x.square().sum(1) * p).unsqueeze(1) * model.x).mean(0)
    draws = torch.stack([on_parts(optimizer, model)[2] for _ in range(n)])
    stderr = draws.std(0) / n**0.5
    assert ((draws.mean(0) - smoothed).abs() < 4 * stderr).all()
    assert ((model.gradient(flat([model.z]), slice(None)) - smoothed).abs() > 10 * stderr).any()


def test_of_an_odd_batch_the_second_half_is_the_larger():
    model = Power(5)
    optimizer = flatmin.NSO(SGD(model.parameters(), lr=0.0), split_batch=True)
    seen = []
    step(optimizer, model, lambda: seen.append(optimizer.take(torch.arange(5)).tolist()) or model.z.sum())
    assert seen == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize(("options", "clean"), [({}, 0.5), ({"clean_weight": 0.2}, 0.2)])
def test_rwp_mixes_the_gradient_of_one_half_with_that_of_the_other_in_filter_noise(options, clean):
    model, other = Power(6, power=4), Power(6, power=4)
    optimizer = flatmin.methods()["rwp"].build(SGD(model.parameters(), lr=0.0), sigma=0.1, seed=4, **options)
    plain = flatmin.NSO(SGD(other.parameters(), lr=0.0), sigma=0.1, seed=4, antithetic=False)
    z, (here, u), direction = on_parts(optimizer, model)
    _, (v,), _ = on_parts(plain, other)
    assert here.norm() == 0
    close(u, v * z.norm())  # one filter: all of (1, 3)
    expected = clean * model.gradient(z, slice(0, 3)) + (1 - clean) * model.gradient(z + u, slice(3, 6))
    close(direction, expected)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            (torch.ones(10, 10), torch.randn(64, 3), torch.ones(64)),
            "not the same for all tensors that it was given: 10, 64",
        ),
        ((nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(2, 2)]), torch.ones(2)), "out of a PackedSequence"),
    ],
)
def test_what_has_no_rows_in_common_is_refused(batch, message):
    optimizer = flatmin.NSO(torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1), split_batch=True)
    probe = next(optimizer.probes())
    with pytest.raises(ValueError, match=message):
        probe.take(*batch)
