"""Contract 1: radius 0 is the base optimizer, bit for bit: weights, buffers and random state."""

from functools import cache

from tests.contracts.cases import Case, assert_same, differs, each_base, each_method, each_model, radius_zero


@cache
def after_the_base(base, model_name):
    """Weights, buffers and random state after 20 steps: the same for all methods."""
    return Case("base", base, model_name).run(20).snapshot()


@each_method
@each_base
@each_model
def test_radius_zero_is_the_base_optimizer_bit_for_bit(method, base, model_name):
    ours = Case(method, base, model_name, radius_zero(method)).run(20).snapshot()
    assert_same(ours, after_the_base(base, model_name))


@each_method
def test_the_comparison_above_can_fail(method):
    assert differs(Case(method).run(20).snapshot(), after_the_base("sgd", "plain"))


@each_method
def test_at_radius_zero_one_probe_is_asked_for_at_the_weights(method):
    case = Case(method, options=radius_zero(method))
    visited = []
    for probe in case.optimizer.probes():
        visited.append(probe.at_weights)
        case.loss().backward()
    assert visited == [True]


@each_method
def test_a_radius_set_to_zero_later_turns_the_rule_off(method):
    case = Case(method)
    for group in case.optimizer.param_groups:
        group[case.radius_name] = 0.0
    assert_same(case.run(5).snapshot(), Case("base").run(5).snapshot())


@each_method
def test_outside_its_window_a_rule_is_the_base_optimizer(method):
    case = Case(method, options={"start": 3, "stop": 9, "every": 2})
    perturbed = []
    for step in range(12):
        calls = 0
        for _ in case.optimizer.probes():
            calls += 1
            case.loss().backward()
        case.optimizer.step()
        if calls > 1:
            perturbed.append(step)
    if case.optimizer.gradients_per_step > 1:
        assert perturbed == ([3, 7] if method == "looksam" else [3, 5, 7])  # of these every second, k = 2
    control = Case("base").run(3).snapshot()
    assert_same(Case(method, options={"start": 3}).run(3).snapshot(), control)
    assert differs(Case(method, options={"start": 2}).run(3).snapshot(), control)
