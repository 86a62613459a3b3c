"""The benchmark of rules for what is tuned: what a rule sees, and what it is judged by."""

import itertools

import numpy as np
import pytest

from benchmarks.tuning_rules import CASES, RULES, TRIALS, Tried, judge


def valley(best):
    """Losses of a 4 x 4 x 4 grid without interactions, lowest at `best`."""
    return np.array([sum(abs(i - j) for i, j in zip(at, best, strict=True)) for at in np.ndindex(4, 4, 4)], float)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_finds_the_end_of_a_valley_in_19_trials(rule):
    for best in itertools.product(range(4), range(4), range(4)):
        tried = Tried(valley(best).reshape(4, 4, 4))
        assert RULES[rule](tried, 2) == best
        assert len(tried.seen) <= TRIALS


def test_no_rule_sees_more_than_19():
    tried = Tried(np.arange(64.0).reshape(4, 4, 4)[::-1])
    tried.best(*itertools.product(range(4), range(4), range(4)))
    assert len(tried.seen) == TRIALS


def test_what_was_chosen_by_chance_is_judged_by_other_seeds():
    # All settings are alike; each seed has a favourite by chance. In-sample a choice would look better than it is.
    rng = np.random.default_rng(0)
    losses = {name: rng.normal(size=(4, 4, 4, 10)).tolist() for name in CASES["digits"].radii}
    losses["base"] = rng.normal(size=(4, 4, 1, 10)).tolist()
    for found in judge(CASES["digits"], losses).values():
        assert all(abs(lost) < 0.5 for lost in found["held_out"].values())  # of choices from 64: about -1 by their own
        assert found["best"] < -0.5
