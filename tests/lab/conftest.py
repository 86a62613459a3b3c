"""A folder to work in, for tests of commands that read Python files of the user's own."""

import sys

import pytest

from flatmin.lab.script import forget


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in, and what an import leaves in this process undone."""
    forget()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name == "beside" or name.startswith("flatmin_file_")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path
