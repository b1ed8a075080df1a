"""Which units a workdir has, and what may go: obsolete ones, checkpoints, stores whose readers are finished."""

import shutil
from unittest import mock

import pytest
from test_pipeline import go

from saejax.errors import Interrupted, UserError
from saejax.runner import runs
from saejax.runner.pipeline import RunOptions
from saejax.runner.workspace import Workspace

CHANGED = dict(train__l1=(9.0,))


def states(workdir) -> dict[str, list[str]]:
    units = runs.list_units(workdir)
    return {name: [unit.state for unit in units if unit.name == name] for name in {unit.name for unit in units}}


@pytest.fixture
def workdir(tmp_path):
    """A run, changed in one setting: three of its units are obsolete."""
    go(tmp_path)
    go(tmp_path, **CHANGED)
    return tmp_path


def test_units_are_listed_with_what_reads_them(workdir, capsys):
    assert runs.run(["runs", f"--workdir={workdir}"]) == 0
    output = capsys.readouterr().out
    lines = {tuple(line.split()[i] for i in (0, 2)): line for line in output.splitlines()[1:-1]}
    readers = "(evaluate/standard), (report), (train/standard), evaluate/standard, evaluate/topk, report"
    assert lines["capture", "current"].endswith(f"  {readers}, train/standard, train/topk")
    assert lines["train/standard", "obsolete"].endswith("(evaluate/standard), (report)")
    assert output.splitlines()[-1].startswith("12 units, ")
    assert states(workdir)["train/standard"] == ["obsolete", "current"]


def test_obsolete_units_go_and_what_current_ones_read_stays(workdir, capsys):
    flags = ["runs", f"--workdir={workdir}", "--remove=obsolete"]
    assert runs.run([*flags, "--dry_run"]) == 0 and capsys.readouterr().out.count("would remove obsolete") == 3
    assert len(runs.list_units(workdir)) == 12
    assert runs.run(flags) == 0 and capsys.readouterr().out.count("removed obsolete") == 3
    assert all(state == ["current"] for state in states(workdir).values())
    assert go(workdir, **CHANGED) == []
    assert go(workdir) == ["train/standard", "evaluate/standard", "report"], "made anew"


def test_a_copy_without_links_loses_nothing(workdir):
    """A defect: all units counted as obsolete, and all were removed."""
    for link in [path for path in workdir.rglob("*") if path.is_symlink()]:
        link.unlink()
    assert {state for found in states(workdir).values() for state in found} == {"unlinked"}
    assert runs.remove(Workspace(workdir), runs.list_units(workdir), ["obsolete"]) == []
    assert go(workdir, **CHANGED) == []
    assert len(runs.remove(Workspace(workdir), runs.list_units(workdir), ["obsolete"])) == 3


def make_unit(workdir, unit, mark, **about):
    workspace = Workspace(workdir)
    with workspace.claim(unit, mark) as folder:
        workspace.begin(unit, mark, about)
        (folder / "out.txt").touch()
        workspace.finish(unit, mark, {})
    return folder


def test_a_unit_whose_name_has_a_dash_is_listed_once(tmp_path):
    make_unit(tmp_path, "track/two-words", "0" * 16)
    make_unit(tmp_path, "track/two-words", "1" * 16)
    assert states(tmp_path) == {"track/two-words": ["obsolete", "current"]}


def test_units_of_workdirs_in_a_folder_are_none_of_it(workdir, tmp_path_factory):
    """A defect: some of them were listed, without their readers, and were removed."""
    folder = tmp_path_factory.mktemp("workdirs")  # alone: the parent of ``workdir`` has those of other tests
    shutil.copytree(workdir, folder / "run", symlinks=True)
    assert runs.list_units(folder / "run") and runs.list_units(folder) == []


def test_a_dictionary_that_a_flag_names_by_its_folder_stays(tmp_path):
    """A defect: the command that had made all current units was then refused, as that folder was missing."""
    folder = make_unit(tmp_path, "train/topk", "0" * 16)
    make_unit(tmp_path, "train/topk", "1" * 16, config=dict(train=dict(init_from=f"{folder}/k16")))
    assert runs.remove(Workspace(tmp_path), runs.list_units(tmp_path), ["obsolete"]) == [] and folder.exists()


def test_a_unit_goes_at_once_or_not_at_all(tmp_path, monkeypatch):
    """A defect: a run went on from what a removal that was stopped had left of it."""
    first, moved = make_unit(tmp_path, "train/topk", "0" * 16), tmp_path / "disk"
    first.rename(moved)
    first.symlink_to(moved)
    second, _ = (make_unit(tmp_path, "train/topk", digit * 16) for digit in "12")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.shutil, "rmtree", mock.Mock(side_effect=KeyboardInterrupt))
        runs.remove(Workspace(tmp_path), runs.list_units(tmp_path), ["obsolete"])
    assert [path.exists() for path in (first, second)].count(True) == 1
    runs.remove(Workspace(tmp_path), runs.list_units(tmp_path), ["obsolete"])
    assert {path.name for path in (tmp_path / "train").iterdir()} == {"topk", f"topk-{'2' * 16}"}


def test_what_an_unfinished_unit_reads_stays(tmp_path):
    go(tmp_path)
    with pytest.raises(Interrupted):
        go(tmp_path, stopped=["evaluate/standard"], **CHANGED)
    go(tmp_path)  # back: the changed dictionary is not current
    runs.remove(Workspace(tmp_path), runs.list_units(tmp_path), ["obsolete"])
    assert go(tmp_path, **CHANGED) == ["evaluate/standard", "report"]


def test_a_store_goes_when_its_readers_are_done_and_is_made_again_for_a_new_one(workdir, capsys):
    (store,) = [unit for unit in runs.list_units(workdir) if unit.name == "capture"]
    assert runs.run(["runs", f"--workdir={workdir}", "--remove=stores"]) == 0
    assert "removed store: capture-" in capsys.readouterr().out
    assert not (store.folder / "out.txt").exists() and (store.folder / "done.json").exists()
    lines: list[str] = []
    assert go(workdir, say=lines.append, options=RunOptions(dry_run=True), **CHANGED) == []
    assert lines[-1].startswith("0 of 9 units to make")
    assert go(workdir, say=lines.append, **CHANGED) == []
    assert "capture: done before, its files removed since, and no unit that is left reads them" in lines
    assert go(workdir, train__k=(3,)) == ["capture", "train/topk", "evaluate/topk", "ablate/topk", "report"]
    assert (store.folder / "out.txt").exists() and not (store.folder / "removed.json").exists()
    assert runs.remove(Workspace(workdir), runs.list_units(workdir), ["stores"])
    (store.folder / "rest.npy").touch()  # which a kill has left
    assert runs.remove(Workspace(workdir), runs.list_units(workdir), ["stores"])
    assert not runs.remove(Workspace(workdir), runs.list_units(workdir), ["stores"])
    assert go(workdir, ["capture"], train__k=(3,)) == ["capture"], "asked for by itself, it is made again"


def test_a_store_of_which_units_read_some_sites_alone_is_known_to_be_read(tmp_path):
    """Their own fingerprints take one of a store that has no other sites."""
    sites = dict(capture__sites=("resid_post.15", "resid_post.14"), task__behaviours=())
    stages = ["capture", "train", "evaluate"]
    with pytest.raises(Interrupted):
        go(tmp_path, stages, stopped=["train/standard"], **sites)
    (store,) = [unit for unit in runs.list_units(tmp_path) if unit.name == "capture"]
    assert store.readers == ("train/standard", "train/topk")
    assert runs.remove(Workspace(tmp_path), runs.list_units(tmp_path), ["stores"]) == [], "a reader is not finished"
    go(tmp_path, stages, **sites)
    go(tmp_path, stages, **sites | dict(capture__bos="never"))
    assert len(runs.remove(Workspace(tmp_path), runs.list_units(tmp_path), ["stores"])) == 2


def test_checkpoints_of_finished_units_go(workdir):
    (folder,) = workdir.glob("train/topk-*")
    (folder / "checkpoints" / "52").mkdir(parents=True)
    (folder / "checkpoints" / "52" / "state").write_bytes(bytes(5000))
    (line,) = runs.remove(Workspace(workdir), runs.list_units(workdir), ["checkpoints"])
    assert line.endswith(", 5 kB") and not (folder / "checkpoints").exists() and go(workdir, **CHANGED) == []


def test_sizes_are_in_words():
    sizes = [runs._words(size) for size in (7, 999.4e3, 999.6e3, 999.7e6, 1.5e12)]
    assert sizes == ["7 B", "999 kB", "1 MB", "1.0 GB", "1,500.0 GB"]


def test_nothing_goes_while_a_run_goes_on(workdir):
    """It may come to units later that read what is obsolete, or a store whose readers so far are finished."""
    workspace, mark = Workspace(workdir), "0" * 16
    with workspace.claim("ablate/new", mark):
        workspace.begin("ablate/new", mark)
        for wanted in ("obsolete", "stores"):
            with pytest.raises(UserError, match="ablate/new is being made by another process"):
                runs.remove(workspace, runs.list_units(workdir), [wanted])
    assert runs.remove(workspace, runs.list_units(workdir), ["obsolete", "stores"])


def test_a_file_that_goes_while_units_are_listed_has_no_size(tmp_path):
    """Such as one that a run renames when it is whole."""
    (tmp_path / "kept").write_bytes(bytes(7))
    walked = [(str(tmp_path), [], ["kept", ".out.npy.writing-1"])]
    with mock.patch.object(runs.os, "walk", return_value=walked):
        assert runs._size(tmp_path) == 7


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--workdir=none"], "is no folder"), (["--remove=all"], "unknown thing to remove"), (["what"], "is not a flag")],
)
def test_bad_input_is_one_line(workdir, capsys, flags, message):
    assert runs.run(["runs", f"--workdir={workdir}", *flags]) == 2
    assert message in capsys.readouterr().err and len(runs.list_units(workdir)) == 12
