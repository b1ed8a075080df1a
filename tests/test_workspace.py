"""Units appear whole, are found again, and never overwrite silently."""

import json
import shutil
import subprocess
import sys

import pytest

from saejax.errors import UserError
from saejax.workspace import Workspace


def finish(space: Workspace, mark: str, content: str = "x") -> None:
    folder, _ = space.begin("train", "topk", mark)
    (folder / "result.txt").write_text(content)
    space.finish("train", "topk", mark, dict(results={}))


def test_a_finished_unit_is_found_by_its_fingerprint(tmp_path):
    space = Workspace(tmp_path)
    assert not space.finished("train", "topk", "m1")
    folder, found = space.begin("train", "topk", "m1")
    assert found == "" and not space.finished("train", "topk", "m1")
    (folder / "result.txt").write_text("abc")
    assert space.begin("train", "topk", "m1")[1] == "resumed"
    space.finish("train", "topk", "m1", dict(results=dict(a=1)))
    assert space.finished("train", "topk", "m1") and not space.finished("train", "topk", "m2")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["files"] == {"result.txt": 3} and summary["results"] == {"a": 1}


def test_other_work_is_moved_aside_and_never_lost(tmp_path):
    space = Workspace(tmp_path)
    for content in ("first", "second"):
        finish(space, "m1", content)
        finish(space, "m2", "other")
    kept = sorted(path.read_text() for path in (tmp_path / "superseded").glob("*/result.txt"))
    assert kept == ["first", "other", "second"]
    assert space.finished("train", "topk", "m2")


def test_checkpoints_of_a_finished_unit_may_be_deleted(tmp_path):
    space = Workspace(tmp_path)
    folder, _ = space.begin("train", "topk", "m")
    for file in ("dictionary/weights", "checkpoints/5/state", "expansion4/checkpoints/5/state"):
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text("abc")
    space.finish("train", "topk", "m", dict(results={}))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["files"] == {"dictionary/weights": 3}
    summary["files"]["checkpoints/5/state"] = 3  # as older versions listed them
    (folder / "summary.json").write_text(json.dumps(summary))
    shutil.rmtree(folder / "checkpoints")
    assert space.finished("train", "topk", "m")


def test_what_a_killed_process_left_half_written_is_no_part_of_a_unit(tmp_path):
    """Neither a file nor a folder of files; where the workdir lies in a bucket, they are not there either."""
    space = Workspace(tmp_path)
    folder, _ = space.begin("train", "topk", "m")
    (folder / "member" / ".writing-1").mkdir(parents=True)
    (folder / "member" / ".writing-1" / "large").write_text("half")
    (folder / ".scores.json.writing-2").write_text("half")
    assert space.begin("train", "topk", "m") == (folder, "resumed")
    (folder / "whole").write_text("whole")
    space.finish("train", "topk", "m", dict(results={}))
    assert json.loads((folder / "summary.json").read_text())["files"] == {"whole": 5} and space.finished(
        "train", "topk", "m"
    )


def test_missing_and_truncated_files_of_a_finished_unit_are_named(tmp_path):
    space = Workspace(tmp_path)
    finish(space, "m", "long content")
    (tmp_path / "train/topk/result.txt").write_text("long")
    with pytest.raises(UserError, match=r"result\.txt is missing or not 12 bytes"):
        space.finished("train", "topk", "m")


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "baseline").mkdir()
    (tmp_path / "baseline" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that saejax did not write"):
        Workspace(tmp_path).begin("baseline", "", "m")


def test_two_runs_at_once_are_refused_and_a_dead_one_frees_the_lock(tmp_path):
    code = (
        f"from saejax.workspace import Workspace; import sys\n"
        f"with Workspace({str(tmp_path)!r}).lock():\n print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline().strip() == "held"
    with pytest.raises(UserError, match=f"in use by process {holder.pid}"), Workspace(tmp_path).lock():
        pass
    holder.kill()
    holder.wait()
    with Workspace(tmp_path).lock():
        pass


def test_an_unwritable_workdir_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        Workspace(tmp_path / "file" / "run")
