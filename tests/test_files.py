"""Files appear whole or not at all; damaged ones are named."""

import os

import pytest

from saejax.errors import UserError
from saejax.files import read_json, whole_file, write_json, write_text


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_bad_json(tmp_path):
    """NaN is none; damaged files are named."""
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", dict(x=float("nan")))
    assert not os.listdir(tmp_path)
    for text in ("", "{", '{"a": 1', "\xff", "[" * 100_000):
        (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=r"a\.json is not valid JSON"):
            read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "b.json")
