"""Files that are written whole or not at all."""

import json
import os
from contextlib import suppress

import pytest

from flatmin.files import replacing, write_json


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with suppress(KeyboardInterrupt), replacing(path) as temporary:
        assert str(os.getpid()) in temporary.name  # another process that writes the same file has its own
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
