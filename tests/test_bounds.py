"""PAC-Bayes bounds: closed forms, monotone in every number, and true where the true risk is known."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from flatmin import bounds

GAUSSIAN = {"largest_loss": 1.0, "distance": 2.0, "sigma": 0.5, "num_params": 10, "num_samples": 1000, "delta": 0.05}
TRACE = {"largest_loss": 2.0, "trace": 30.0, "distance": 0.5, "num_samples": 400}


def kl(q, p):
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


@pytest.mark.parametrize("q", [0.001, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("budget", [1e-6, 0.01, 0.5, 5.0])
def test_the_inverse_of_kl(q, budget):
    p = bounds.inverse_kl(q, budget)
    assert q < p <= 1
    if p < 1 - 1e-9:
        assert kl(q, p) == pytest.approx(budget, rel=1e-6)


def test_the_inverse_of_kl_at_its_ends():
    assert bounds.inverse_kl(0.0, 0.3) == pytest.approx(1 - math.exp(-0.3))
    assert bounds.inverse_kl(1.0, 0.3) == 1.0
    assert bounds.inverse_kl(0.2, 0.0) == 0.2
    assert bounds.inverse_kl(0.2, math.inf) == 1.0


@pytest.mark.parametrize("q", [-0.1, 1.1, float("nan")])
def test_the_inverse_of_kl_is_of_a_chance(q):
    with pytest.raises(ValueError, match=r"q must be"):
        bounds.inverse_kl(q, 0.3)


def test_the_divergence_of_gaussians_against_numerical_integration():
    from scipy import stats
    from scipy.integrate import quad

    s, s0, r = 0.7, 1.3, 2.0
    pdf, log = stats.norm.pdf, stats.norm.logpdf
    value = quad(lambda x: pdf(x, r, s) * (log(x, r, s) - log(x, 0, s0)), r - 12 * s, r + 12 * s)[0]
    assert bounds.gaussian_divergence(r, s, 1, s0) == pytest.approx(value, rel=1e-8)
    # Independent coordinates add up; the distance counts once.
    assert bounds.gaussian_divergence(r, s, 5, s0) == pytest.approx(
        value + 4 * bounds.gaussian_divergence(0.0, s, 1, s0)
    )
    assert bounds.gaussian_divergence(r, s, 5) == pytest.approx(r**2 / (2 * s**2))


def test_the_gaussian_bound_by_hand():
    bound = bounds.gaussian_bound(0.1, **GAUSSIAN)
    budget = (2.0**2 / (2 * 0.5**2) + math.log(2 * math.sqrt(1000) / 0.05)) / 1000
    assert kl(0.1, bound.value) == pytest.approx(budget, rel=1e-6)
    assert bound.value < bound.terms["McAllester"] == pytest.approx(0.1 + math.sqrt(budget / 2))
    assert bound.certificate
    scaled = bounds.gaussian_bound(0.3, **{**GAUSSIAN, "largest_loss": 3.0})
    assert scaled.value == pytest.approx(3 * bound.value)


def test_catoni_by_hand_and_beside_the_kl_bound():
    bound = bounds.catoni_bound(0.1, **GAUSSIAN, temperature=0.7)
    budget = (8.0 + math.log(1 / 0.05)) / 1000
    assert bound.value == pytest.approx((1 - math.exp(-0.07 - budget)) / (1 - math.exp(-0.7)))
    # The best temperature gives the inverse of kl at the same budget.
    best = min(bounds.catoni_bound(0.1, **GAUSSIAN, temperature=t).value for t in np.linspace(0.05, 2, 4000))
    assert best == pytest.approx(bounds.inverse_kl(0.1, budget), rel=1e-5)


def test_the_trace_bound_by_hand():
    bound = bounds.trace_bound(0.2, **TRACE, eps=0.1)
    assert bound.value == pytest.approx(1.1 * 0.2 + 1.1 * math.sqrt(2.0 * 30.0 * 0.25 / 400))
    assert not bound.certificate
    assert any("medium confidence" in text for text in bound.assumptions)
    assert bounds.trace_bound(0.2, **TRACE).terms["eps"] == pytest.approx(0.05)


def test_the_layerwise_forms_by_hand():
    graph = bounds.layerwise_bound(
        0.2, largest_loss=2.0, num_samples=100, traces=[3.0, 4.0], distances=[0.5, 2.0], norms=[1.0, 1.0]
    )
    assert graph.gap == pytest.approx(2.0 * math.sqrt(7.0 * (0.25 + 1.0) / 100))
    tuned = bounds.layerwise_bound(0.2, largest_loss=2.0, num_samples=100, hessian_distances=[0.5, 8.0])
    assert tuned.gap == pytest.approx(math.sqrt(0.01) + math.sqrt(0.16))
    assert math.isnan(graph.confidence)
    assert "As a score and not a bound" in str(graph)


@pytest.mark.parametrize(
    ("function", "options", "rising", "falling"),
    [
        (bounds.gaussian_bound, GAUSSIAN, ["distance", "largest_loss"], ["num_samples", "delta", "sigma"]),
        (bounds.catoni_bound, {**GAUSSIAN, "temperature": 1.0}, ["distance"], ["num_samples", "delta", "sigma"]),
        (bounds.trace_bound, {**TRACE, "eps": 0.1}, ["trace", "distance", "largest_loss"], ["num_samples"]),
    ],
)
def test_monotone(function, options, rising, falling):
    for name in rising + falling:
        factors = (0.5, 1.0, 1.5) if name != "delta" else (0.1, 1.0, 10.0)
        values = [function(0.1, **{**options, name: type(options[name])(options[name] * f)}).value for f in factors]
        assert sorted(values, reverse=name in falling) == values
        assert len(set(values)) == 3
    assert function(0.05, **options).value < function(0.1, **options).value


def test_the_best_sigma_pays_for_the_choice():
    common = {k: v for k, v in GAUSSIAN.items() if k not in ("sigma", "delta")}
    losses = {0.1: 0.05, 0.5: 0.1, 2.0: 0.4}
    best = bounds.best_gaussian(losses, **common, delta=0.06)
    each = {s: bounds.gaussian_bound(loss, sigma=s, **common, delta=0.02).value for s, loss in losses.items()}
    assert best.value == min(each.values()) == each[0.5]
    assert best.confidence == 0.94
    assert best.terms["sigmas tried"] == 3
    assert "noise of standard deviation 0.5" in str(best)


def test_a_vacuous_bound_says_so():
    assert "below the largest possible loss" in str(bounds.gaussian_bound(0.1, **GAUSSIAN))
    vacuous = bounds.trace_bound(0.2, **{**TRACE, "distance": 100.0})
    assert vacuous.vacuous
    assert "Vacuous" in str(vacuous)
    assert json.loads(json.dumps(vacuous.to_dict(), allow_nan=False))["vacuous"] is True
    with pytest.raises(dataclasses.FrozenInstanceError):
        vacuous.value = 0.0  # type: ignore[misc]


def flipped_lines(rng, n, dim=5, noise=0.1):
    """Inputs, and labels of a line through zero of which a tenth is flipped; and the risk of other lines, exactly."""
    truth = np.eye(dim)[0]
    x = rng.normal(size=(n, dim))
    y = np.sign(x @ truth) * np.where(rng.random(n) < noise, -1, 1)

    def risk(w):
        angle = np.arccos(w @ truth / np.linalg.norm(w, axis=-1))
        return noise + (1 - 2 * noise) * angle / np.pi

    return x, y, risk


def test_the_classical_bounds_hold_where_the_risk_is_known():
    rng = np.random.default_rng(0)
    delta, sigma, trials = 0.2, 0.5, 400
    broken = dict.fromkeys(("kl", "catoni", "training loss"), 0)
    for _ in range(trials):
        x, y, risk = flipped_lines(rng, 60)
        w = (y[:, None] * x).mean(0) * 2.0
        posterior = w + sigma * rng.normal(size=(4000, 5))
        training = float((np.sign(x @ posterior.T) != y[:, None]).mean())
        true = float(risk(posterior).mean())
        options = {"largest_loss": 1.0, "distance": float(np.linalg.norm(w)), "sigma": sigma, "num_params": 5}
        options |= {"num_samples": 60, "delta": delta}
        broken["kl"] += bounds.gaussian_bound(training, **options).value < true
        broken["catoni"] += bounds.catoni_bound(training, **options, temperature=1.0).value < true
        broken["training loss"] += training < true
    assert broken["training loss"] > 0.5 * trials  # so that there is something to hold
    assert broken["kl"] <= delta * trials
    assert broken["catoni"] <= delta * trials


def test_for_one_hypothesis_the_bound_fails_as_often_as_it_may():
    # Posterior = prior, so it is a test-set bound: it must hold in 1 - delta of the cases, and is nearly as tight.
    rng = np.random.default_rng(1)
    n, risk, delta = 50, 0.3, 0.5
    options = {"largest_loss": 1.0, "distance": 0.0, "sigma": 1.0, "num_params": 3, "num_samples": n, "delta": delta}
    errors = rng.binomial(n, risk, size=2000) / n
    failed = np.mean([bounds.catoni_bound(q, **options, temperature=0.6).value < risk for q in errors])
    assert 0.02 < failed <= delta
    assert np.mean([bounds.gaussian_bound(q, **options).value < risk for q in errors]) <= delta


@pytest.mark.parametrize(
    ("sigma", "prior_sigma", "distance"),
    [(1e-160, None, 1.0), (0.5, 1e-160, 0.0), (1e300, 1e-300, 0.0), (0.5, None, 1e200)],
)
def test_a_divergence_beyond_the_largest_number_is_infinite_and_the_bound_vacuous(sigma, prior_sigma, distance):
    options = {**GAUSSIAN, "sigma": sigma, "prior_sigma": prior_sigma, "distance": distance}
    assert bounds.gaussian_divergence(distance, sigma, 10, prior_sigma) == math.inf
    assert bounds.gaussian_bound(0.1, **options).value == 1.0
    assert bounds.catoni_bound(0.1, **options, temperature=1.0).vacuous


def test_a_width_far_below_the_priors_has_a_finite_divergence():
    expected = 10 * (math.log(1e300) + math.log(1e300) - 0.5)  # the ratio itself is 0 to the smallest number
    assert bounds.gaussian_divergence(0.0, 1e-300, 10, 1e300) == pytest.approx(expected)


def test_a_distance_whose_square_is_beyond_the_largest_number():
    bound = bounds.trace_bound(0.2, **{**TRACE, "distance": 1e200}, eps=1.0)
    assert bound.vacuous
    assert bound.value == pytest.approx(2 * math.sqrt(2.0 * 30.0 / 400) * 1e200)


def best_of_two(**changed):
    options: dict[str, Any] = {"largest_loss": 1.0, "distance": 1.0, "num_params": 1, "num_samples": 9, **changed}
    return bounds.best_gaussian({0.1: 0.05, 0.5: 0.1}, **options)


def layerwise(**changed):
    return bounds.layerwise_bound(
        0.1, largest_loss=1.0, num_samples=5, **{"traces": [1.0], "distances": [1.0], "norms": [1.0], **changed}
    )


def text(number: str) -> Any:
    """What type checkers would refuse before us."""
    return number


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bounds.gaussian_bound(1.5, **GAUSSIAN), r"the training loss must be in \[0, 1.0\]"),
        (lambda: bounds.gaussian_bound(0.1, **{**GAUSSIAN, "sigma": 0.0}), "sigma must be positive"),
        (lambda: bounds.gaussian_bound(0.1, **{**GAUSSIAN, "delta": 1.0}), "delta must be in"),
        (lambda: bounds.gaussian_bound(0.1, **{**GAUSSIAN, "num_samples": 7}), "at least 8"),
        (lambda: bounds.gaussian_bound(0.1, **{**GAUSSIAN, "distance": -1.0}), "distance must be at least 0"),
        (lambda: bounds.catoni_bound(0.1, **GAUSSIAN, temperature=0.0), "temperature must be positive"),
        (lambda: bounds.trace_bound(0.1, **{**TRACE, "trace": -1.0}), "trace must be at least 0"),
        (lambda: bounds.trace_bound(0.1, **TRACE, eps=2.0), "eps must be in"),
        (
            lambda: bounds.trace_bound(0.1, **{**TRACE, "largest_loss": math.inf}),
            "largest_loss.*must be a finite number",
        ),
        (lambda: bounds.layerwise_bound(0.1, largest_loss=1.0, num_samples=5), "give either"),
        (lambda: bounds.layerwise_bound(0.1, largest_loss=1.0, num_samples=5, traces=[1.0]), "must all be given"),
        (lambda: layerwise(distances=[math.nan]), r"distances\[0\] must be a finite number"),
        (lambda: layerwise(norms=[math.inf]), r"norms\[0\] must be a finite number"),
        (lambda: bounds.best_gaussian({}, largest_loss=1.0, distance=1.0, num_params=1, num_samples=9), "is empty"),
        (lambda: best_of_two(delta=1.5), r"delta must be in \(0, 1\), got 1.5"),
        (lambda: best_of_two(delta=1.0), "delta must be in"),
        (
            lambda: bounds.gaussian_bound(text("0.1"), **GAUSSIAN),
            "the training loss must be a finite number, got '0.1'",
        ),
        (lambda: bounds.gaussian_bound(0.1, **{**GAUSSIAN, "largest_loss": None}), "largest_loss.*must be a finite"),
        (lambda: bounds.gaussian_bound(0.1, **{**GAUSSIAN, "sigma": "0.1"}), "sigma must be a finite number"),
        (lambda: bounds.gaussian_bound(0.1, **{**GAUSSIAN, "distance": None}), "distance must be a finite number"),
        (lambda: bounds.catoni_bound(0.1, **GAUSSIAN, temperature=text("1")), "temperature must be a finite number"),
        (lambda: bounds.trace_bound(0.1, **{**TRACE, "trace": "30"}), "trace must be a finite number"),
        (lambda: layerwise(traces=[True]), r"traces\[0\] must be a finite number"),
    ],
)
def test_bad_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("num_params", [0, 2.5, -5])
def test_weights_are_counted(num_params):
    with pytest.raises(ValueError, match=r"num_params must be (a whole number|at least 1), got"):
        bounds.gaussian_divergence(1.0, 0.1, num_params, 5.0)


def test_samples_are_counted():
    options: dict[str, Any] = {"largest_loss": 1.0, "distance": 1.0, "sigma": 0.1, "num_params": 10}
    options["num_samples"] = 1000.5
    with pytest.raises(ValueError, match="num_samples must be a whole number"):
        bounds.gaussian_bound(0.1, **options)


def test_a_score_says_no_probability():
    score = bounds.trace_bound(0.1, largest_loss=1.0, trace=2.0, distance=0.5, num_samples=1000)
    assert str(score).startswith("As a score and not a bound, the loss of these weights")
    assert math.isnan(score.confidence)
    assert score.to_dict()["confidence"] is None
    assert not score.certificate
