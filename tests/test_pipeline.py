"""Which units run: new ones, unfinished ones, and those that depend on what changed; nothing else."""

import dataclasses
import json

import pytest
from runs import make_configs

from saejax.errors import Interrupted, UserError
from saejax.runner import changes, pipeline, workplan
from saejax.runner.pipeline import RunOptions
from saejax.runner.registry import all_stages
from saejax.runner.workspace import hold_claim

OPTIONS = RunOptions()
ALL = "preflight baseline capture train/topk train/standard evaluate/topk evaluate/standard ablate/topk report"


def go(workdir, stages=(), say=lambda line: None, refused=(), stopped=(), options=OPTIONS, **changes) -> list[str]:
    """Runs made-up stages with settings changed, such as train__k=3; gives the units that ran."""
    ran: list[str] = []

    def run_unit(run) -> dict:
        unit = f"{run.stage}/{run.name}" if run.name else run.stage
        if unit in refused:
            raise UserError("these settings do not fit")
        if unit in stopped:
            (run.folder / "half.txt").write_text("half")
            raise Interrupted("stopped")
        for folder in run.inputs.values():
            assert (folder / "done.json").exists()
        ran.append(unit)
        (run.folder / "out.txt").write_text(unit)
        return dict(unit=unit)

    changes_of = dict(
        run=run_unit, foresee=lambda configs, workdir, stages: ["what is left takes much"] if stages else []
    )
    stand_ins = {
        name: dataclasses.replace(stage, inputs=stage.units_read, **changes_of) for name, stage in all_stages().items()
    }
    with pytest.MonkeyPatch.context() as patch:
        for module in (pipeline, workplan):
            patch.setattr(module, "all_stages", lambda: stand_ins)
        pipeline.run_stages(
            stages or tuple(all_stages()), make_configs(**changes), str(workdir), say=say, options=options
        )
    return ran


def test_only_what_depends_on_a_changed_flag_runs_and_setting_it_back_finds_the_earlier_result(tmp_path):
    """Which units depend on which flag, ``test_reuse`` says."""
    assert go(tmp_path) == ALL.split() and go(tmp_path) == []
    changed = dict(train__l1=(9.0,))
    assert go(tmp_path, **changed) == ["train/standard", "evaluate/standard", "report"]
    assert go(tmp_path, **changed) == []
    before = (tmp_path / "ablate" / "topk").resolve()
    lines: list[str] = []
    assert go(tmp_path, say=lines.append, ablate__top=9)[1:] == ["ablate/topk", "report"]  # after preflight
    assert "ablate/topk: started (--ablate.top was 10, is 9)" in lines
    assert (tmp_path / "ablate" / "topk").resolve() != before
    assert go(tmp_path) == [] and (tmp_path / "ablate" / "topk").resolve() == before
    assert len(list((tmp_path / "ablate").glob("topk-*/out.txt"))) == 2


@pytest.mark.parametrize("folder", ["runs/other/train/topk/k9", "else/where/topk", "./topk"])
def test_a_dictionary_in_a_folder_is_tested_without_capture_and_training(tmp_path, monkeypatch, folder):
    (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    stages = ["ablate", "patch", "probe", "steer"]
    changes = {f"{stage}__dictionary": folder for stage in stages} | dict(probe__labels=("answer",))
    units = [f"{stage}/{folder.strip('./').replace('/', '-')}" for stage in stages]
    assert go(tmp_path, ["baseline", *stages], **changes) == ["baseline", *units]
    assert go(tmp_path, ["report"], **changes) == ["report"]


def test_what_is_refused_or_stopped_leaves_the_earlier_result_in_its_place(tmp_path):
    def files():
        return sorted(path for path in tmp_path.rglob("*") if path.parent.name != "hours")  # the time is used

    go(tmp_path)
    before = files()
    with pytest.raises(UserError, match="do not fit"):
        go(tmp_path, ["train"], refused={"train/topk"}, train__batch=7)
    assert files() == before
    with pytest.raises(Interrupted):  # which leaves half of a file there
        go(tmp_path, ["train"], stopped={"train/topk"}, train__batch=7)
    assert (tmp_path / "train" / "topk" / "done.json").exists()
    assert go(tmp_path) == []


def test_a_member_that_another_run_makes_is_left_to_it(tmp_path):
    """Its folder has no more files than one in which nothing will be made."""
    train = ["capture", "train"], dict(train__kinds=("topk",))
    with pytest.raises(Interrupted):
        go(tmp_path, train[0], stopped={"train/topk"}, train__k=(4, 8), **train[1])
    unit = tmp_path / "train" / "topk"
    shared = unit.parent / json.loads((unit / "stack.json").read_text())["members"]["k8"]
    before = sorted(unit.parent.iterdir())
    with hold_claim(shared, "train/topk"), pytest.raises(UserError, match="is being made by process"):
        go(tmp_path, train[0], train__k=(2, 8), **train[1])
    assert (shared / "started.json").exists() and sorted(unit.parent.iterdir()) == before


def test_what_is_begun_says_with_which_settings_and_versions(tmp_path):
    batch = dict(stopped={"train/topk"}, train__batch=7)
    with pytest.raises(Interrupted):
        go(tmp_path, ["capture", "train"], **batch)
    started = json.loads((tmp_path / "train/topk/started.json").read_text())
    assert started["config"]["train"]["batch"] == started["depends_on"]["settings"]["train.batch"] == 7
    assert workplan.fingerprint(started["depends_on"]) == started["fingerprint"] and "jax" in started["packages"]
    started["start"] = "2026-01-01T00:00:00+00:00"
    (tmp_path / "train/topk/started.json").write_text(json.dumps(started))
    with pytest.raises(Interrupted):
        go(tmp_path, ["train"], **batch)
    assert json.loads((tmp_path / "train/topk/started.json").read_text()) == started, "it was begun then"


def test_differences_are_named_as_flags():
    def depends(**changes) -> dict:
        settings = {"train.k": [32], "train.form": "", "train.l1": 0.5}
        return dict(settings=settings, needs=dict(capture="a"), sources={}, revision=1) | changes

    settings = {"train.k": [32, 64], "train.form": "sae"}
    changed = depends(settings=settings, needs=dict(capture="b"), sources=dict(text="c"))
    assert ", ".join(changes._changes(depends(), changed)) == (
        "--train.form was empty, is sae, --train.k was 32, is 32,64, --train.l1 was 0.5, is unread, "
        "capture is different, and 1 more"
    )
    assert list(changes._changes(depends(), depends(revision=2))) == ["the revision of the stage is different"]
    assert list(changes._changes(depends(), depends())) == []


def test_an_interrupted_unit_goes_on_and_finished_ones_stay(tmp_path):
    with pytest.raises(Interrupted):
        go(tmp_path, stopped={"train/standard"})
    assert go(tmp_path) == ALL.split()[4:]
    assert (tmp_path / "train/standard/half.txt").exists(), "its unfinished files are for the stage to use"


def test_a_stage_without_its_inputs_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"train/topk reads capture, which has not been made"):
        go(tmp_path, ["train"])
    go(tmp_path, ["capture"])
    with pytest.raises(UserError, match=r"which was made with other settings \(--corpus.held_out was 0.1, is 0.2\)"):
        go(tmp_path, ["train"], corpus__held_out=0.2)


def test_summaries_say_what_was_done(tmp_path):
    go(tmp_path)
    summary = json.loads((tmp_path / "train" / "topk" / "done.json").read_text())
    assert summary["schema_version"] == 1 and summary["stage"] == "train" and summary["name"] == "topk"
    assert summary["config"]["train"]["k"] == [32] and summary["config"]["mesh"]["model"] == 1
    assert list(summary["inputs"]) == ["capture"] and summary["seeds"] == {"train": [123]}
    assert summary["packages"]["jax"] and summary["devices"]["count"] == 8
    assert summary["results"] == {"unit": "train/topk"} and summary["files"] == {"out.txt": 10}


def test_a_dry_run_says_what_would_be_done_and_why_and_writes_nothing(tmp_path, monkeypatch):
    """Of units that are done, changed, half made, and read by others that are."""
    dry, workdir = RunOptions(dry_run=True), tmp_path / "run"

    def planned(**changes):
        lines: list[str] = []
        assert go(workdir, say=lines.append, options=dry, **changes) == []
        return {line.split()[0]: " ".join(line.split()[2:]) for line in lines[:-1]} | dict(last=lines[-1])

    lines = planned()
    assert not workdir.exists() and set(ALL.split()) == lines.keys() - {"last", "what"}
    assert lines["what"] == "left takes much"
    assert lines["train/topk"] == "to run: capture is made first" and lines["last"].startswith("9 of 9 units to make")
    go(workdir)
    before = sorted(path.relative_to(workdir) for path in workdir.rglob("*"))
    assert {*planned().values()} == {"done, reused", planned()["last"]}
    changed = planned(train__l1=(9.0,))
    assert changed["train/standard"] == "to run: --train.l1 was 2.0, is 9.0" and changed["train/topk"] == "done, reused"
    assert "train/standard" in changed["evaluate/standard"] and changed["last"].startswith("3 of 9 units to make")
    assert sorted(path.relative_to(workdir) for path in workdir.rglob("*")) == before
    with pytest.raises(Interrupted):
        go(workdir, stopped=["train/topk"], train__k=(3,))
    assert planned(train__k=(3,))["train/topk"] == "to resume"
    # Only the cluster knows the number of processes: a dry run takes that of the last preflight.
    monkeypatch.setattr(pipeline, "join", lambda mesh, say, stopping: dataclasses.replace(mesh, processes=2))
    assert go(workdir, ["preflight"], mesh__distributed="auto") == ["preflight"]
    assert planned(mesh__distributed="auto")["preflight"] == "done, reused"
