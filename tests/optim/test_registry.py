"""What a budget of gradients pays for: whole steps, none of them lost to rounding."""

from fractions import Fraction

import pytest

from flatmin.optim.registry import Method, get_method, methods


def costing(gradients):
    return Method("one", None, gradients, "here")


@pytest.mark.parametrize("cost", ["1", "2", "2.1", "1.1", "1.2", "2.01", *(f"{k + 1}/{k}" for k in range(2, 21))])
def test_a_budget_pays_for_every_step_that_it_covers(cost):
    exact, method = Fraction(cost), costing(float(Fraction(cost)))
    for budget in range(3, 2101):
        assert method.num_steps(budget) == budget // exact


def test_a_thousand_steps_of_eigen_sam_cost_2100_gradients():
    assert get_method("eigen-sam").num_steps(2100) == 1000


@pytest.mark.parametrize("name", list(methods()))
def test_a_budget_below_one_step_is_refused(name):
    method = get_method(name)
    with pytest.raises(ValueError, match=f"a budget of 0 gradients does not pay for one step of {name}, which costs"):
        method.num_steps(0)
    assert method.num_steps(3) >= 1
