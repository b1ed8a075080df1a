"""Files appear whole or not at all; damaged ones are named."""

import os
import socket
import subprocess
import sys

import pytest

from saejax.errors import UserError
from saejax.files import read_json, unfinished_folder, whole_file, write_json, write_text


# Statement 4 of WORKSPACE.md, what must hold.
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


def test_what_a_killed_process_left_is_no_hindrance_and_does_not_stay(tmp_path, monkeypatch):
    """In a container the next process may have the number of the killed one."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)  # as where nobody asks for its status
    here, number = socket.gethostname(), os.getpid()
    for mark in (f"{number}-0a@{here}", f"{gone.pid}-0b@{here}", f"{gone.pid}-0c@elsewhere", f"1-0d@{here}"):
        (tmp_path / f".writing-{mark}").mkdir()
    with unfinished_folder(tmp_path) as folder:
        (folder / "half").touch()
        left = sorted(path.name for path in tmp_path.glob(".writing-*") if path != folder)
    assert left == [f".writing-1-0d@{here}", f".writing-{gone.pid}-0c@elsewhere"], "these may be at work"
    assert not folder.exists()
    gone.wait()
