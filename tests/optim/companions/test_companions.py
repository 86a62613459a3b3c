"""What goes together with any method: distance to the start as penalty and as ball, mixup."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

import flatmin


def test_the_penalty_and_its_gradient():
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    penalty = flatmin.DistancePenalty([w], strength=0.5, start=[torch.tensor([1.0, 1.0])])
    value = penalty()
    value.backward()
    assert value.item() == 0.5 * (4 + 9)
    assert w.grad is not None
    assert w.grad.tolist() == [2.0, 3.0]  # 2 * 0.5 * (w - w_0)
    assert penalty.distance() == pytest.approx(13**0.5)


def test_the_distance_is_as_exact_as_the_weights():
    w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    penalty = flatmin.DistancePenalty([w], strength=0.5)
    with torch.no_grad():
        w += 1e-12 * torch.tensor([3.0, 4.0])
    assert penalty.distance().item() == torch.linalg.vector_norm(w.detach() - torch.tensor([3.0, 4.0])).item()
    tiny = nn.Parameter(torch.full((4,), 1e-30, dtype=torch.float64))  # its square is nothing in fp32
    assert flatmin.DistanceProjection([tiny], 1.0, start=[torch.zeros(4)]).distance() == pytest.approx(2e-30)


def test_under_two_point_noise_the_penalty_has_its_own_gradient():
    w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    penalty = flatmin.DistancePenalty([w], strength=0.5, start=[torch.zeros(2)])
    optimizer = flatmin.NSO(SGD([w], lr=0.0), sigma=1.0)
    for _ in optimizer.probes():
        penalty().backward()
    torch.testing.assert_close(w.grad, torch.tensor([3.0, 4.0], dtype=torch.float64))


def test_frobenius_projection():
    outside, inside = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([0.1, 0.2]))
    ball = flatmin.DistanceProjection([outside, inside], radius=2.5, start=[torch.zeros(1, 2), torch.zeros(2)])
    kept = inside.detach().clone()
    pointer = outside.data_ptr()
    ball.project()
    torch.testing.assert_close(outside.detach(), torch.tensor([[1.5, 2.0]]))
    assert torch.equal(inside, kept)
    assert outside.data_ptr() == pointer


def test_mars_projection_scales_rows_by_their_absolute_sums():
    w = nn.Parameter(torch.tensor([[3.0, -1.0], [0.5, 0.5]]))
    flatmin.DistanceProjection([w], radius=2.0, norm="mars", start=[torch.zeros(2, 2)]).project()
    torch.testing.assert_close(w.detach(), torch.tensor([[1.5, -0.5], [0.5, 0.5]]))


def test_a_scalar_and_a_start_of_now():
    w = nn.Parameter(torch.tensor(1.0))
    for norm in ("frobenius", "mars"):
        ball = flatmin.DistanceProjection([w], radius=0.5, norm=norm)
        with torch.no_grad():
            w += 2.0
        ball.project()
        assert w.item() == pytest.approx(ball._start[0].item() + 0.5)


def test_training_in_a_ball_stays_there_and_resumes():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    ball = flatmin.DistanceProjection(model.parameters(), radius=0.3)
    again = nn.Linear(4, 3)
    other = flatmin.DistanceProjection(again.parameters(), radius=0.3)
    other.load_state_dict(ball.state_dict())
    x, y = torch.randn(32, 4), torch.randint(3, (32,))
    optimizer = flatmin.SAM(SGD(model.parameters(), lr=1.0))
    for _ in range(10):
        for _ in optimizer.probes():
            nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        ball.project()
    assert ball.distance() == pytest.approx(0.3 * 2**0.5, rel=1e-5)  # weight and bias, each at its border
    again.load_state_dict(model.state_dict())
    assert other.distance() == ball.distance()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: flatmin.DistancePenalty([w], strength=-1.0), "strength must be at least 0, got -1"),
        (lambda w: flatmin.DistancePenalty([], strength=1.0), "no floating-point parameters"),
        (lambda w: flatmin.DistancePenalty([w], 1.0, start=[torch.zeros(3)]), r"start must have the shapes"),
        (lambda w: flatmin.DistanceProjection([w], radius=0.0), "radius must be positive, got 0"),
        (
            lambda w: flatmin.DistanceProjection([w], 1.0, norm="l1"),  # type: ignore[arg-type]
            "norm must be 'frobenius' or 'mars', got 'l1'",
        ),
        (lambda w: flatmin.mixup(torch.zeros(2), torch.zeros(2, dtype=torch.long)), "say num_classes"),
        (lambda w: flatmin.mixup(torch.zeros(2), torch.zeros(2), alpha=0.0), "alpha must be positive"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(nn.Parameter(torch.zeros(2)))


def test_mixup_mixes_inputs_and_targets_alike():
    labels = torch.arange(5)
    inputs = nn.functional.one_hot(labels, 5).float()
    mixed, targets = flatmin.mixup(inputs, labels, num_classes=5)
    assert torch.equal(mixed, targets)
    torch.testing.assert_close(targets.sum(1), torch.ones(5))
    torch.testing.assert_close(mixed.sum(0), torch.ones(5))  # every sample gives away what it gets


def test_the_share_is_beta_distributed():
    n, alpha = 4000, 0.2
    inputs = torch.tensor([1.0, 0.0])
    shares = torch.tensor([float(flatmin.mixup(inputs, inputs, alpha=alpha)[0][0]) for _ in range(n)])
    shares = shares[shares < 1]  # half of the time a sample is mixed with itself
    variance = 1 / (4 * (2 * alpha + 1))
    error = float((shares - 0.5).square().std() / len(shares) ** 0.5)
    assert abs(float((shares - 0.5).square().mean()) - variance) < 4 * error
    assert 0.4 * n < len(shares) < 0.6 * n


def test_all_probes_of_a_step_see_the_same_mix():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    optimizer = flatmin.NSO(SGD(model.parameters(), lr=0.1))
    seen = []
    for _ in range(2):
        for _ in optimizer.probes():
            inputs, targets = flatmin.mixup(x, y, num_classes=3)
            seen.append(inputs)
            nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2])


def test_each_entry_of_a_vector_is_a_row_of_its_own():
    bias, row = nn.Parameter(torch.tensor([0.9, -0.9, 3.0])), nn.Parameter(torch.tensor([[0.9, -0.9, 3.0]]))
    starts = [torch.zeros(3), torch.zeros(1, 3)]
    flatmin.DistanceProjection([bias, row], radius=1.0, norm="mars", start=starts).project()
    torch.testing.assert_close(bias.detach(), torch.tensor([0.9, -0.9, 1.0]))
    torch.testing.assert_close(row.abs().sum(), torch.tensor(1.0))


@pytest.mark.parametrize("start", [[torch.ones(1, 3)], [torch.ones(2, 3), torch.ones(2)]])
def test_the_start_of_another_model_is_not_loaded(start):
    penalty = flatmin.DistancePenalty([nn.Parameter(torch.zeros(2, 3))], strength=1.0)
    with pytest.raises(ValueError, match="start must have the shapes of the parameters"):
        penalty.load_state_dict({"start": start})
    assert float(penalty.distance()) == 0.0
