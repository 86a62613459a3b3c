"""Arguments of the wrong kind are refused with a sentence, at the line that gives them."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

import flatmin
from flatmin.checks import check_flag, check_share


@pytest.mark.parametrize(
    ("ends", "inside", "outside"),
    [("[]", (0, 1, 0.5), (-0.1, 1.1)), ("[)", (0, 0.5), (1,)), ("(]", (1,), (0,)), ("()", (0.5,), (0, 1))],
)
def test_a_share_lies_between_its_ends(ends, inside, outside):
    for value in inside:
        assert check_share("part", value, ends) == value
    for value in outside:
        with pytest.raises(ValueError, match=f"part must be in .0, 1., got {value}"):
            check_share("part", value, ends)
    for value in ("0.5", None, True, float("nan"), 0.5j):
        with pytest.raises(ValueError, match="part must be a finite number, got"):
            check_share("part", value, ends)


def test_a_flag_is_no_word():
    assert check_flag("loud", True) is True
    for value in ("no", 1, None):
        with pytest.raises(ValueError, match="loud must be True or False, got"):
            check_flag("loud", value)


WRONG = [
    ("FriendlySAM", {"decay": "0.9"}, "decay"),
    ("NSO", {"clean_weight": "0.5"}, "clean_weight"),
    ("NSO", {"split_batch": "yes"}, "split_batch"),
    ("NSO", {"noise_per_rank": "no"}, "noise_per_rank"),
    ("NSO", {"seed": 0.7}, "seed must be a whole number"),
    ("WSAM", {"gamma": None}, "gamma"),
    ("WSAM", {"decouple": 1}, "decouple"),
    ("BSAM", {"betas": 0.9, "num_data": 10}, "betas"),
    ("BSAM", {"betas": (0.9, "x"), "num_data": 10}, "betas"),
    ("RSP", {"threshold": "a"}, "threshold"),
    ("ESAM", {"beta": True}, "beta"),
    ("SAM", {"adaptive": "no"}, "adaptive"),
    ("SAM", {"normalize": "no"}, "normalize"),
    ("SAM", {"sync_ascent": "no"}, "sync_ascent"),
    ("MongeSAM", {"sync_ascent": "no"}, "sync_ascent"),
    ("FisherSAM", {"sync_ascent": "no"}, "sync_ascent"),
    ("RandomSAM", {"sync_ascent": "no"}, "sync_ascent"),
]


@pytest.mark.parametrize(("method", "options", "message"), WRONG)
def test_what_an_optimizer_cannot_take_is_refused(method, options, message):
    base = SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        getattr(flatmin, method)(base, **options)


def objective():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return flatmin.Objective(model, nn.CrossEntropyLoss(), [(torch.randn(20, 4), torch.randint(3, (20,)))])


MEASURED = {
    "trace": lambda o, seed: flatmin.trace(o, max_products=8, method="hutchinson", seed=seed),
    "noise": lambda o, seed: flatmin.noise_stability(o, 0.01, num_draws=8, seed=seed),
    "ascent": lambda o, seed: flatmin.ascent_sharpness(o, 0.1, num_steps=2, seed=seed),
    "density": lambda o, seed: flatmin.spectral_density(o, num_probes=2, num_steps=5, seed=seed),
    "eigenvalues": lambda o, seed: flatmin.top_eigenvalues(o, seed=seed),
    "operator": lambda o, seed: flatmin.HessianOperator(o, seed=seed),
    "direction": lambda o, seed: flatmin.random_direction(o, seed=seed),
}


@pytest.mark.parametrize("name", MEASURED)
def test_a_seed_of_measuring_is_a_whole_number_or_none(name):
    MEASURED[name](objective(), None)
    with pytest.raises(ValueError, match=r"seed must be a whole number, got 0\.5"):
        MEASURED[name](objective(), 0.5)


@pytest.mark.parametrize("name", ["trace", "noise"])
def test_without_a_seed_it_is_random_and_says_which_it_was(name):
    first, second = (MEASURED[name](objective(), None) for _ in range(2))
    assert first.value != second.value
    assert MEASURED[name](objective(), first.seed).value == first.value
