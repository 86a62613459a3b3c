"""The flatness report: frozen, printable, plottable, and plain data on request."""

import dataclasses
import io
import json
import math
import re
from typing import Any

import pytest
import torch
from torch import nn

import flatmin
import flatmin.curvature.report as report_module
import flatmin.curvature.store as store_module
from flatmin.curvature.results import format_estimate
from flatmin.curvature.store import revived
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


def test_an_objective_is_measured_as_its_parts_are(report):
    model, x, y = make("tanh")
    objective = flatmin.Objective(model, criterion, [(x, y)])
    assert flatmin.measure(objective, num_eigenvalues=2) == report
    others: dict[str, Any] = {"criterion": criterion, "data": [(x, y)], "params": ["0.weight"], "eval_mode": False}
    for name, value in others.items():
        with pytest.raises(ValueError, match=f"the Objective has its own {name}: leave"):
            flatmin.measure(objective, **{name: value})
    with pytest.raises(ValueError, match="was called without data"):
        flatmin.measure(model, criterion)


def test_frozen(report):
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.trace.value = 0.0


def test_plain_data(report):
    data = json.loads(report.to_json())
    assert data == report.to_dict()
    assert data["trace"]["per_layer"]["0"]["stderr"] > 0
    assert data["top_eigenvalue"]["residuals"]


def test_each_eigenvalue_stands_in_one_place_and_one_that_was_not_found_says_so(report):
    first, second = report.top_eigenvalue.estimates
    rows = {name.strip(): (value, note) for name, value, note in report.rows()}
    assert rows["lambda_max"] == (str(first), f"{report.top_eigenvalue.num_products} products")
    assert rows["lambda_2"] == (str(second), "")
    cut = dataclasses.replace(report, top_eigenvalue=dataclasses.replace(report.top_eigenvalue, converged=False))
    assert {name: note for name, _, note in cut.rows()}["lambda_max"].endswith("products, not to the error asked for")


def test_the_repr_leaves_out_what_there_are_hundreds_of():
    model, x, y = make("tanh")
    whole = full(model, x, y)
    assert "converged=True" in repr(whole)
    assert not re.search(r"samples=\(|nodes=|weights=", repr(whole))


def test_a_report_is_read_back(report):
    assert report.loss.seed is None  # the one entry that may be null and is no number
    assert flatmin.FlatnessReport.from_json(report.to_json()) == report
    model, x, y = make("tanh")
    whole = full(model, x, y)
    again = flatmin.FlatnessReport.from_json(whole.to_json())
    assert whole.ascent_sharpness is not None
    assert math.isnan(whole.ascent_sharpness.stderr)  # null in JSON
    assert str(again) == str(whole)
    assert again.to_dict() == whole.to_dict()
    for field in dataclasses.fields(whole):
        assert type(getattr(again, field.name)) is type(getattr(whole, field.name))
    assert again.trace == whole.trace
    assert again.trace.interval() == whole.trace.interval()
    assert again.density == whole.density


def test_an_infinite_error_is_read_back_as_none_that_is_known():
    model, x, y = make("tanh")
    result = flatmin.noise_stability(flatmin.Objective(model, criterion, [(x, y)]), 0.01, num_draws=1, per_layer=True)
    again = revived(type(result), json.loads(json.dumps(result.to_dict())))
    assert math.isnan(again.stderr)
    assert again.samples == result.samples
    part = again.per_layer["0"]
    assert (part.value, math.isnan(part.stderr)) == (result.per_layer["0"].value, True)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"loss": 1}', '{"other": {}}', '{"loss": {"value": 1.0}}'])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(ValueError, match=r"this is not a report that FlatnessReport\.to_json wrote"):
        flatmin.FlatnessReport.from_json(text)


def test_plain_data_is_plain(report):
    def types(value):
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        return {type(value)}.union(*map(types, parts))

    assert types(report.to_dict()) <= {dict, list, str, int, float, bool, type(None)}


def test_what_is_not_finite_is_null_in_json():
    model, x, y = make("tanh")
    result = flatmin.noise_stability(flatmin.Objective(model, criterion, [(x, y)]), 0.01, num_draws=1)
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
    largest = report.top_eigenvalue.estimates[0]
    assert report.plot().get_title().endswith(f"largest eigenvalue {largest}")  # that one alone
    axes = report.plot()
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0", "2", "3"]
    assert len(report.top_eigenvalue.plot().lines) >= 1


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (17.0712, 0.8512, "17.07 +- 0.85"),
        (1234.6, 56.0, "1235 +- 56"),
        (123456.0, 1234.0, "123500 +- 1200"),
        (0.0004097, 0.073, "0.000 +- 0.073"),
        (-0.0004097, 0.00073, "-0.00041 +- 0.00073"),
        (-0.00004097, 0.000073, "(-4.1 +- 7.3)e-05"),
        (0.0, 0.073, "0.000 +- 0.073"),
        (-1e-15, 0.41, "0.00 +- 0.41"),
        (5e-324, 5e-324, "4.941e-324 +- 4.9e-324"),
        (0.00123, 0.00002, "0.001230 +- 0.000020"),
        (0.0153311, 0.0, "0.01533"),
        (5.37381, 0.00204, "5.3738 +- 0.0020"),
        (2e-6, 1e-7, "(2.00 +- 0.10)e-06"),
        (1.2345e7, 2.2e5, "(1.234 +- 0.022)e+07"),
        (1e-9, 7e-7, "(0.0 +- 7.0)e-07"),
        (0.0, 0.0, "0"),
        (1.5, float("inf"), "1.5 +- inf"),
    ],
)
def test_two_digits_of_the_error(value, stderr, text):
    assert format_estimate(value, stderr) == text


def test_a_difference_has_its_sign():
    assert format_estimate(0.26, 0.44, "+") == "+0.26 +- 0.44"
    assert format_estimate(-4e-7, 1e-8, "+") == "(-4.00 +- 0.10)e-07"
    assert format_estimate(0.5, 0.0, "+") == "+0.5"


def full(model, x, y, **options):
    return flatmin.measure(model, criterion, [(x, y)], sigma=0.01, rho=0.1, density=True, **options)


def test_everything_at_once(monkeypatch):
    monkeypatch.setattr(report_module, "spectral_density", small_density)
    report = full(*make("tanh"))
    text = str(report)
    for word in (
        "noise rise",
        "sigma = 0.01",
        "worst rise",
        ">= ",
        "rho = 0.1, euclidean",
        "negative",
        "share of eigenvalues < -",
    ):
        assert word in text
    assert set(report.to_dict()) == {
        "loss", "trace", "top_eigenvalue", "noise_stability", "ascent_sharpness", "density"
    }  # fmt: skip
    json.dumps(report.to_dict(), allow_nan=False)


def small_density(objective, seed):
    return flatmin.spectral_density(objective, num_probes=2, num_steps=4, seed=seed)


def test_a_table_for_rich(report):
    console = pytest.importorskip("rich.console").Console(width=100, record=True, file=io.StringIO())
    console.print(report)
    text = console.export_text()
    assert "lambda_max" in text
    assert str(report.trace) in text


def test_an_interrupted_measurement_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "spectral_density", small_density)
    model, x, y = make("tanh")
    path = tmp_path / "flatness.json"
    calls = []

    def counted(name):
        function = getattr(report_module, name)

        def count(*arguments, **options):
            calls.append(name)
            if calls == ["trace", "top_eigenvalues", "noise_stability"]:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        monkeypatch.setattr(report_module, name, count)

    for name in ("trace", "top_eigenvalues", "noise_stability", "ascent_sharpness", "spectral_density"):
        counted(name)
    with pytest.raises(KeyboardInterrupt):
        full(model, x, y, store=path)
    calls.append("again")
    resumed = full(model, x, y, store=path)
    assert calls[4:] == ["noise_stability", "ascent_sharpness", "spectral_density"]
    calls.append("once more")
    fresh = full(model, x, y, store=path).to_dict()
    assert fresh == resumed.to_dict() == full(model, x, y).to_dict()
    assert calls[calls.index("once more") :][:2] == ["once more", "trace"]  # nothing but for the call without a file
    assert resumed.trace.per_layer["0"].stderr >= 0  # an estimate again, not a dict
    # Another setting is measured again; the rest is not.
    calls.append("other setting")
    full(model, x, y, store=path, rtol=0.2)
    assert calls[calls.index("other setting") :] == ["other setting", "trace", "noise_stability"]


def test_a_file_about_something_else_is_refused(tmp_path):
    model, x, y = make("tanh")
    path = tmp_path / "flatness.json"
    flatmin.measure(model, criterion, [(x, y)], store=path, rtol=0.5)
    with pytest.raises(ValueError, match=r"another measurement \(loss, num_samples differ\)"):
        flatmin.measure(model, criterion, [(x[:20], y[:20])], store=path, rtol=0.5)
    with torch.no_grad():
        next(model.parameters()).add_(1e-9)
    with pytest.raises(ValueError, match=r"another measurement \(weights"):
        flatmin.measure(model, criterion, [(x, y)], store=path, rtol=0.5)
    path.write_text("[]")
    with pytest.raises(ValueError, match="is not a file of results"):
        flatmin.measure(model, criterion, [(x, y)], store=path, rtol=0.5)


def test_a_store_knows_the_criterion_and_what_had_not_converged(tmp_path):
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 3), torch.randn(16, 3), torch.randint(3, (16,))
    path = tmp_path / "kept.json"

    def other(outputs, targets):
        return nn.functional.cross_entropy(outputs, targets) + (outputs - outputs.detach()).square().mean()

    flatmin.measure(model, nn.CrossEntropyLoss(), [(x, y)], store=path)
    with pytest.raises(ValueError, match="criterion differ"):
        flatmin.measure(model, other, [(x, y)], store=path)
    kept = json.loads(path.read_text())
    kept["parts"]["top_eigenvalue"]["result"]["converged"] = False
    path.write_text(json.dumps(kept))
    with pytest.warns(RuntimeWarning, match="has not converged"):
        flatmin.measure(model, nn.CrossEntropyLoss(), [(x, y)], store=path)
    path.write_text('{"about": null, "parts": null}')
    with pytest.raises(ValueError, match="is not a file of results"):
        flatmin.measure(model, nn.CrossEntropyLoss(), [(x, y)], store=path)


def test_a_store_is_json_that_every_reader_takes(tmp_path):
    model, x, y = make("tanh")
    path, other = tmp_path / "kept.json", tmp_path / "kept.json.new"
    other.write_text("mine")
    options: dict[str, Any] = {"rtol": 0.5, "rho": 0.01, "store": path}
    report = flatmin.measure(model, criterion, [(x, y)], **options)
    assert report.ascent_sharpness is not None
    assert math.isnan(report.ascent_sharpness.stderr)
    kept = json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is none of JSON's words
    assert kept["parts"]["ascent_sharpness"]["result"]["stderr"] is None
    assert flatmin.measure(model, criterion, [(x, y)], **options).to_dict() == report.to_dict()
    assert other.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [path, other]


def test_without_a_file_no_weights_are_read_for_one(monkeypatch):
    model, x, y = make("tanh")
    monkeypatch.setattr(store_module, "_digest", lambda _: pytest.fail("the weights were hashed"))
    assert flatmin.measure(model, criterion, [(x, y)], rtol=0.5).trace.value


def test_an_error_of_the_size_of_rounding_is_written_shortly():
    assert format_estimate(1.6241979832157052, 6.3e-17) == "1.62419798322 +- 6e-17"


def test_the_table_says_where_the_error_asked_for_was_not_reached():
    model, x, y = make("tanh")
    report = flatmin.measure(model, criterion, [(x, y)], sigma=0.01)
    assert "not to the error" not in str(report)
    parts = {name: dataclasses.replace(getattr(report, name), converged=False) for name in ("trace", "noise_stability")}
    assert str(dataclasses.replace(report, **parts)).count("not to the error asked for") == 2
