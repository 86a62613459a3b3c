"""Policy as tests: who may import whom, what is public, what is documented, what may not be committed."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flatmin

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "flatmin"

# room -> the rooms it may import from. Files at the top level are rooms of their own.
MAY_IMPORT = {
    "checks": set(),
    "extras": set(),
    "files": set(),
    "notices": set(),
    "shards": set(),
    "slabs": {"shards"},
    "versions": set(),
    "buffers": {"versions"},
    "entries": {"shards"},
    "vectors": {"shards", "entries"},
    "radii": {"vectors"},
    "distributed": {"checks", "shards"},
    "noise": {"radii", "vectors", "shards", "slabs"},
    "quiet": {"buffers", "versions"},
    "place": {"vectors", "shards", "versions", "notices"},
    "problems": set(),
    "optim": {"checks", "notices", "buffers", "radii", "vectors", "noise", "quiet", "place", "shards", "distributed"},
    "curvature": {
        *("checks", "notices", "radii", "vectors", "noise", "quiet", "place", "extras", "shards", "distributed"),
        "files",
    },
    "bounds": {"checks"},
    "integrations": {"notices", "quiet", "extras", "optim"},
    "lab": {
        "notices",
        "checks",
        "vectors",
        "noise",
        "quiet",
        "extras",
        "files",
        "optim",
        "curvature",
        "problems",
        "integrations",
    },
    "__init__": {"vectors", "optim", "curvature", "problems", "bounds"},
    "__main__": {"lab"},
}
# Rooms within a room, and what of it they may import. Files beside them put together what these rooms have.
WITHIN = {
    "curvature/function": set(),
    "curvature/products": {"function"},
    "curvature/per_sample": {"products"},
    "curvature/traces": {"function", "products", "per_sample", "results"},
    "curvature/spectra": {"function", "products", "results"},
    "curvature/sharpness": {"function", "products", "results"},
    "optim/engine": {"rule", "tools", "options", "registry"},
    "optim/companions": {"engine"},
}
CORE = {"torch", "numpy", "scipy"}
FRAMEWORKS = {"accelerate", "lightning", "transformers"}
THIRD_PARTY = {"problems": {"torch"}, "lab": {*CORE, "rich", "tyro"}, "integrations": {*CORE, *FRAMEWORKS}}

PUBLIC = [
    "BSAM", "ESAM", "GSAM", "NSO", "RSP", "SAM", "SAP", "WSAM", "AscentResult", "Averager", "DensityResult",
    "DistancePenalty", "DistanceProjection", "EigenResult", "EigenSAM", "FisherOperator", "FisherSAM", "FlatMinimum",
    "FlatMinimumEstimate", "FlatOptimizer", "FlatnessReport", "FreeTrace", "FriendlySAM", "GaussNewtonOperator",
    "HessianOperator", "LookSAM", "LossSlice", "MatchedComparison", "Measurement", "MomentumSAM", "MongeSAM",
    "Objective", "Probe", "RandomSAM", "RayleighSum", "SharpnessResult", "TraceResult", "TrackPoint", "Tracker",
    "Vector", "ascent_sharpness", "average_sharpness", "block_eigenvalues", "bounds", "compare_at_matched_loss",
    "direction_to", "flat_minimum", "flat_minimum_estimate", "layerwise_rayleigh_sum", "limit_map", "loss_slice",
    "measure", "methods", "mixup", "model_function", "noise_stability", "norm_parameters", "problems",
    "random_direction", "spectral_density", "top_eigenvalues", "trace",
]  # fmt: skip


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "flatmin" else {node.module}
            )
    return found


FILES = sorted(SOURCE.rglob("*.py"))
CONTRIBUTING = ROOT / "CONTRIBUTING.md"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_import_directions(path):
    check_imports(path, room_of(path))


def test_the_file_to_copy_follows_the_rule_too(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text(), re.S)
    (tmp_path / "copied.py").write_text(code)
    check_imports(tmp_path / "copied.py", "optim")


def check_imports(path, room):
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package == "flatmin":
            target = rest.split(".")[0]
            assert target == room or target in MAY_IMPORT[room], f"{room} may not import {target}"
        elif package not in sys.stdlib_module_names:
            assert package in THIRD_PARTY.get(room, CORE), f"{room} may not import {package}"


@pytest.mark.parametrize("place", WITHIN)
def test_import_directions_within_a_room(place):
    outer, inner = place.split("/")
    for path in (SOURCE / place).glob("*.py"):
        targets = {name.split(".")[2] for name in imports(path) if name.startswith(f"flatmin.{outer}.")}
        assert targets <= {inner, *WITHIN[place]}, path.name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_file_is_one_room(path):
    assert len(path.read_text().splitlines()) <= 350


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_warnings_go_through_one_function(path):
    assert room_of(path) == "notices" or "warnings.warn(" not in path.read_text()


def test_every_room_has_a_rule():
    assert {room_of(path) for path in FILES} == set(MAY_IMPORT)
    found = {str(path.parent.relative_to(SOURCE)) for path in (SOURCE / "curvature").glob("*/*.py")}
    assert found == {place for place in WITHIN if place.startswith("curvature/")}


def test_public_names_are_frozen():
    assert sorted(flatmin.__all__) == sorted(PUBLIC)
    assert all(hasattr(flatmin, name) for name in PUBLIC)


def test_the_core_imports_without_the_extras():
    code = "import sys, flatmin; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for extra in ("rich", "tyro", "matplotlib", "jinja2", "sklearn", "safetensors", *FRAMEWORKS):
        assert f"'{extra}'" not in loaded


def test_a_missing_extra_is_named():
    from flatmin.extras import need

    with pytest.raises(ImportError, match=r"this needs no_such_package: pip install 'flatmin\[lab\]'"):
        need("no_such_package.part", "lab")


def test_version_is_said_once():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(rf'^version = "{re.escape(flatmin.__version__)}"$', text, re.M)
    assert f"## {flatmin.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {flatmin.__version__}" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("name", [n for n in PUBLIC if n not in ("bounds", "problems")])
def test_public_names_are_documented(name):
    thing = getattr(flatmin, name)
    doc = inspect.getdoc(thing) or ""
    assert len(doc) > 60
    holders = ("Averager", "DistancePenalty", "DistanceProjection", "Objective", "Vector")
    is_method = inspect.isclass(thing) and issubclass(thing, flatmin.FlatOptimizer) and name != "FlatOptimizer"
    if inspect.isfunction(thing) or name in holders or is_method:
        for parameter in inspect.signature(thing).parameters:
            assert re.search(rf"\b{parameter}\b", doc), f"{name} does not explain {parameter}"


@pytest.mark.parametrize("name", [n for n in flatmin.methods() if n != "base"])
def test_methods_state_cost_errors_and_source(name):
    doc = inspect.getdoc(flatmin.methods()[name].factory) or ""
    for section in ("Args:", "Cost:", "Raises:", "Source:"):
        assert section in doc


MEASURES = [
    "ascent_sharpness", "average_sharpness", "block_eigenvalues", "flat_minimum_estimate", "layerwise_rayleigh_sum",
    "loss_slice", "measure", "model_function", "noise_stability", "spectral_density", "top_eigenvalues", "trace",
    "compare_at_matched_loss", "FreeTrace", "Tracker", "HessianOperator", "GaussNewtonOperator", "FisherOperator",
]  # fmt: skip


@pytest.mark.parametrize("name", MEASURES)
def test_measures_state_cost_and_errors_and_operators_their_source(name):
    doc = inspect.getdoc(getattr(flatmin, name)) or ""
    for section in ("Args:", "Cost:", "Raises:", *(["Source:"] if name.endswith("Operator") else [])):
        assert section in doc, f"{name} does not say {section}"


def test_docstring_examples():
    import doctest

    tested = 0
    for module in pkgutil.walk_packages(flatmin.__path__, "flatmin."):
        if not module.name.endswith("__main__"):
            result = doctest.testmod(importlib.import_module(module.name))
            assert result.failed == 0
            tested += result.attempted
    assert tested > 0


def test_nothing_unpickles_or_evaluates():
    for path in FILES:
        text = path.read_text()
        calls = re.findall(r"(?<![\w.`])(?:eval|exec)\(", text)  # not a method, as in model.eval()
        calls += re.findall(r"\b(?:torch\.load|pickle\.\w+|os\.system)\((?!.*weights_only=True)", text)
        assert not calls, f"{path}: {calls}"
        assert "shell=True" not in text
