"""Units are addressed by their content, appear whole, and are never overwritten; one process makes each."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

import saejax.files
from saejax.errors import UserError
from saejax.runner import workspace
from saejax.runner.workspace import Workspace, current_units


def make(space: Workspace, mark: str, content: str = "x", unit: str = "train/topk") -> None:
    with space.claim(unit, mark) as folder:
        space.begin(unit, mark)
        (folder / "result.txt").write_text(content)
        space.finish(unit, mark, dict(results={}))


def claim(space: Workspace, unit: str = "train/topk", mark: str = "m", **options) -> Path:
    """Claims a unit and lets it go again; gives its folder."""
    with space.claim(unit, mark, **options) as folder:
        return folder


# Statement 4 of WORKSPACE.md, what must hold.
def test_a_finished_unit_is_found_by_its_fingerprint(tmp_path):
    space = Workspace(tmp_path)
    with space.claim("train/topk", "m1") as folder:
        assert not space.begin("train/topk", "m1") and not space.is_done("train/topk", "m1")
        (folder / "result.txt").write_text("abc")
        assert space.begin("train/topk", "m1"), "it was begun before"
        space.finish("train/topk", "m1", dict(results=dict(a=1)))
    assert space.is_done("train/topk", "m1") and not space.is_done("train/topk", "m2")
    summary = json.loads((tmp_path / "train" / "topk" / "done.json").read_text())
    assert summary["files"] == {"result.txt": 3} and summary["results"] == {"a": 1}
    assert not (folder / "claim.json").exists()


@pytest.mark.parametrize("links", [True, False])
def test_each_setting_has_a_folder_and_the_link_stands_for_the_current_one(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "symlink", Mock(side_effect=OSError("no links here")))
    space = Workspace(tmp_path)
    for unit in ("train/topk", "capture"):
        make(space, "m1", "first", unit)
        make(space, "m2", "second", unit)
        assert (space.current(unit) / "result.txt").read_text() == "second"
        assert space.is_done(unit, "m1") and space.is_done(unit, "m2"), "nothing was moved or overwritten"
        with space.claim(unit, "m3"):
            space.begin(unit, "m3")
            assert space.current(unit).name.endswith("-m2"), "until the new one is finished"
            space.finish(unit, "m3", dict(results={}))
        assert space.current(unit).name.endswith("-m3")
        space.point(unit, "m1")
        assert (space.current(unit) / "result.txt").read_text() == "first"
        assert (tmp_path / unit).is_symlink() == links
    assert current_units(tmp_path) == {unit: tmp_path / f"{unit}-m1" for unit in ("capture", "train/topk")}


@pytest.mark.parametrize("text", ["", "\n", "topk-gone\n"])
def test_a_file_in_place_of_a_link_that_names_no_folder_leads_nowhere(tmp_path, text):
    space = Workspace(tmp_path)
    make(space, "m1")
    (tmp_path / "train" / "topk").unlink()
    (tmp_path / "train" / "topk.current").write_text(text)
    assert space.current("train/topk") is None and not current_units(tmp_path)


def test_a_unit_in_which_nothing_was_made_goes(tmp_path):
    space = Workspace(tmp_path)
    for files in ([], ["half.txt"]):
        with space.claim("train/topk", "m1") as folder:
            space.begin("train/topk", "m1")
            for file in files:
                (folder / file).write_text("half")
            space.discard_if_empty("train/topk", "m1")
        assert folder.exists() == (space.current("train/topk") is not None) == bool(files)


def test_checkpoints_and_what_a_killed_process_left_half_written_are_no_part_of_a_unit(tmp_path):
    """Neither a file nor a folder of files, not even the unit's first file, which a kill can leave alone."""
    space = Workspace(tmp_path)
    folder = space.folder("train/topk", "m")
    halves = ("member/.writing-1/large", ".scores.json.writing-2", ".started.json.writing-1")
    for file in (*halves, "checkpoints/5/state", "expansion4/checkpoints/5/state", "dictionary/weights"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("abc")
    with space.claim("train/topk", "m"):
        assert not space.begin("train/topk", "m")
        space.finish("train/topk", "m", dict(results={}))
    assert json.loads((folder / "done.json").read_text())["files"] == {"dictionary/weights": 3}
    shutil.rmtree(folder / "checkpoints")
    assert space.is_done("train/topk", "m"), "checkpoints of a finished unit may be deleted"


def test_missing_and_truncated_files_of_a_finished_unit_are_named(tmp_path):
    space = Workspace(tmp_path)
    make(space, "m", "long content")
    (tmp_path / "train/topk/result.txt").write_text("long")
    with pytest.raises(UserError, match=r"result\.txt is missing or not 12 bytes"):
        space.is_done("train/topk", "m")


@pytest.mark.parametrize(
    ("file", "why"), [("mine.txt", "did not write"), ("started.json", "where saejax keeps a link")]
)
def test_files_in_the_place_of_a_link_are_left_alone(tmp_path, file, why):
    (tmp_path / "baseline").mkdir()
    (tmp_path / "baseline" / file).write_text("mine")
    with pytest.raises(UserError, match=why):
        claim(Workspace(tmp_path), "baseline")
    assert (tmp_path / "baseline" / file).read_text() == "mine"


def test_a_unit_that_was_moved_to_a_disk_which_is_not_there_is_told(tmp_path):
    (tmp_path / "baseline-m").symlink_to("/nowhere/baseline-m")
    with pytest.raises(UserError, match="leads to /nowhere/baseline-m, which is not there: mount its disk"):
        claim(Workspace(tmp_path), "baseline")


def claim_elsewhere(root, then: str) -> subprocess.Popen:
    """A process that claims a unit and says so, or that it was refused."""
    code = (
        "import sys\nfrom saejax.runner.workspace import Workspace\nfrom saejax.errors import UserError\n"
        f"try:\n with Workspace({str(root)!r}).claim('train/topk', 'm'): print('held', flush=True); {then}\n"
        "except UserError: print('refused')"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_unit_that_another_process_makes_is_refused_until_that_is_gone(tmp_path):
    holder, space = claim_elsewhere(tmp_path, "sys.stdin.read()"), Workspace(tmp_path)
    assert holder.stdout.readline().strip() == "held"
    assert space.is_claimed("train/topk", "m") and not space.is_claimed("train/topk", "other")
    with pytest.raises(UserError, match=f"is being made by process {holder.pid} on .*--take_over"):
        claim(space)
    claim(space, mark="other")
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # nobody has asked for its status yet
    assert not space.is_claimed("train/topk", "m")
    holder.wait()
    assert not space.is_claimed("train/topk", "m")
    claim(space)


def test_containers_of_one_host_name_do_not_take_each_others_claims(tmp_path):
    """They do not see each other's processes; after a restart of one, its number may be that of a living process."""
    space = Workspace(tmp_path)
    with space.claim("train/topk", "m") as folder:
        about = json.loads((folder / "claim.json").read_text())
        (folder / "claim.json").write_text(json.dumps(about | dict(process=2**22 + 1)))  # of no process that is seen
        assert space.is_claimed("train/topk", "m")
        with pytest.raises(UserError, match="is being made by process 4194305"):
            claim(space)
        assert json.loads((folder / "claim.json").read_text())["process"] == 2**22 + 1
    (folder / "claim.json").write_text(json.dumps(about))  # as a kill leaves it; this process lives
    assert not space.is_claimed("train/topk", "m")
    claim(space)


def test_where_files_cannot_be_locked_a_claim_counts_as_held(tmp_path, monkeypatch):
    space = Workspace(tmp_path)

    def refuse(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(saejax.files.fcntl, "flock", refuse)
    with space.claim("train/topk", "m") as folder:
        kept = (folder / "claim.json").read_text()
    (folder / "claim.json").write_text(kept)  # as a kill leaves it
    with pytest.raises(UserError, match="--take_over"):
        claim(space)
    claim(space, take_over=True)


def test_what_a_process_leaves_that_is_killed_as_it_claims_is_removed(tmp_path, monkeypatch):
    space = Workspace(tmp_path)
    monkeypatch.setattr(workspace.Path, "unlink", lambda path, missing_ok=False: None)
    folder = claim(space)
    monkeypatch.undo()
    assert len([*folder.iterdir()]) == 2, "the claim, and what it was written to"
    (folder / "claim.json").unlink()
    make(space, "m")
    assert sorted(path.name for path in folder.iterdir()) == ["done.json", "result.txt", "started.json"]


def test_a_claim_of_another_host_is_taken_over_on_request_or_by_the_same_job(tmp_path, monkeypatch):
    space = Workspace(tmp_path)

    def leave_claim(job):
        monkeypatch.setattr(workspace.socket, "gethostname", lambda: "elsewhere")
        monkeypatch.setenv("SLURM_JOB_ID", job)
        with space.claim("train/topk", "m") as folder:
            kept = (folder / "claim.json").read_text()
        (folder / "claim.json").write_text(kept)  # as a kill leaves it
        monkeypatch.undo()

    leave_claim("7")
    with pytest.raises(UserError, match="on elsewhere since"):
        claim(space)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    # Another host of the same allocation is alive as far as anyone knows; a restart of the job is proof of its end.
    with pytest.raises(UserError, match="on elsewhere since"):
        claim(space)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    claim(space)
    leave_claim("8")
    folder = claim(space, take_over=True)
    about = dict(host="elsewhere", process=1, key="", time="")
    for damaged in ("", json.dumps(about | dict(job=8)), json.dumps(about | dict(job="8 restart one"))):
        (folder / "claim.json").write_text(damaged)  # a damaged one counts as held
        monkeypatch.setenv("SLURM_JOB_ID", "8")
        with pytest.raises(UserError, match="unknown host"):
            claim(space)
    monkeypatch.undo()
    (folder / "claim.json").unlink()
    (folder / "claim.json").symlink_to("nowhere")
    with pytest.raises(UserError, match="unknown host"):
        claim(space)
    claim(space, take_over=True)


def test_of_two_that_find_a_claim_gone_one_gets_it(tmp_path):
    folder = claim(Workspace(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    about = dict(host=workspace.socket.gethostname(), process=gone.pid, key="", job="", time="")
    (folder / "claim.json").write_text(json.dumps(about))
    both = [claim_elsewhere(tmp_path, "sys.stdin.read()") for _ in range(2)]
    assert sorted(process.stdout.readline().strip() for process in both) == ["held", "refused"]
    for process in both:
        process.communicate()


def test_an_unusable_workdir_is_refused(tmp_path):
    for name in ("run[1]", "run\\1"):  # where Orbax saves what it does not find again
        with pytest.raises(UserError, match="which dictionaries cannot be saved below"):
            Workspace(tmp_path / name / "run")
        assert not list(tmp_path.iterdir())
    Workspace(tmp_path / "run #1 100%25 ü=?*'&")
    with pytest.raises(UserError, match="cannot be written to"):
        Workspace("/dev/null/run")
    with pytest.raises(UserError, match="mount the bucket"):
        Workspace("s3://bucket/run")
