"""The flatness report: frozen, printable, plottable, and plain data on request."""

import dataclasses
import json

import pytest

import flatmin
from flatmin.curvature.results import format_estimate
from tests.curvature.nets import criterion, make


@pytest.fixture(scope="module")
def report():
    model, x, y = make("tanh")
    return flatmin.measure(model, criterion, [(x, y)], num_eigenvalues=2)


def test_contents(report):
    assert report.loss.stderr == 0
    assert report.trace.stderr <= 0.05 * report.trace.value
    assert report.top_eigenvalue.values[0] >= report.top_eigenvalue.values[1]
    assert set(report.trace.per_layer) == {"0", "2", "3"}


def test_frozen(report):
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.trace.value = 0.0


def test_plain_data(report):
    data = json.loads(report.to_json())
    assert data == report.to_dict()
    assert data["trace"]["per_layer"]["0"]["stderr"] > 0
    assert data["top_eigenvalue"]["residuals"]


def test_plain_data_is_plain(report):
    def types(value):
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        return {type(value)}.union(*map(types, parts))

    assert types(report.to_dict()) <= {dict, list, str, int, float, bool, type(None)}


def test_what_is_not_finite_is_null_in_json():
    model, x, y = make("tanh")
    result = flatmin.trace(flatmin.Objective(model, criterion, [(x, y)]), max_products=1)
    assert result.stderr == float("inf")
    assert result.to_dict()["stderr"] is None
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["samples"] == [result.value]


def test_text(report):
    text = str(report)
    for word in ("loss", "trace", "lambda_max", "+-", "products", "24 samples"):
        assert word in text


def test_plots(report):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = report.plot()
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0", "2", "3"]
    assert len(report.top_eigenvalue.plot().lines) >= 1


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (17.0712, 0.8512, "17.07 +- 0.85"),
        (1234.5, 56.0, "1234 +- 56"),
        (0.0153311, 0.0, "0.01533"),
        (5.37381, 0.00204, "5.3738 +- 0.0020"),
        (2e-6, 1e-7, "2e-06 +- 1e-07"),
        (0.0, 0.0, "0"),
        (1.5, float("inf"), "1.5 +- inf"),
    ],
)
def test_two_digits_of_the_error(value, stderr, text):
    assert format_estimate(value, stderr) == text
