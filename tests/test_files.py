"""Files appear whole or not at all; damaged ones are named."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import runs

from saejax.errors import UserError
from saejax.files import locked_text, read_json, unfinished_folder, whole_file, write_json, write_text


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


def test_a_full_disk_names_the_file_that_was_to_be(tmp_path):
    """It may be in a cache; what was cut off does not stay, as it would hold a unit for ever."""
    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.txt'"), whole_file(tmp_path / "a.txt") as half:
        runs.write_half(half)
    opened = mock.mock_open()
    opened.return_value.write.side_effect = OSError(errno.ENOSPC, "")
    (tmp_path / "claim.json").touch()
    with mock.patch("builtins.open", opened), mock.patch("saejax.files.fcntl.flock"), pytest.raises(OSError):
        locked_text(tmp_path / "claim.json", "text").__enter__()
    assert not os.listdir(tmp_path)


def test_bad_json(tmp_path):
    """NaN is none; damaged files are named."""
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", dict(x=float("nan")))
    assert not os.listdir(tmp_path)
    for text in ("", "{", '{"a": 1', "\xff", "[" * 100_000):
        (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=r"a\.json is not valid JSON"):
            read_json(tmp_path / "a.json")
    os.mkfifo(tmp_path / "pipe.json")
    for path, message in (
        (tmp_path / "b.json", "b.json does not exist"),
        (tmp_path, "cannot be read .is a directory.: expected a file"),
        (tmp_path / "pipe.json", "pipe.json is a pipe: expected a file"),
    ):
        with pytest.raises(UserError, match=message):
            read_json(path)


def test_what_a_killed_process_left_is_no_hindrance_and_does_not_stay(tmp_path):
    """Neither a process of another container, whose number says nothing here, nor one that still writes, loses it."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom saejax.files import unfinished_folder\n"
        f"with unfinished_folder(Path({str(tmp_path)!r})) as folder: (folder / 'half').touch(); print(folder); "
        "sys.stdout.flush(); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code]
    writers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    killed, living = [Path(writer.stdout.readline().strip()) for writer in writers]
    writers[0].kill()
    os.waitid(os.P_PID, writers[0].pid, os.WEXITED | os.WNOWAIT)  # as where nobody asks for its status
    with unfinished_folder(tmp_path) as folder:
        (folder / "half").touch()
        assert not killed.exists() and (living / "half").exists()
    assert not folder.exists()
    for writer in writers:
        writer.communicate()
    assert [*tmp_path.iterdir()] == []
