"""Options of a run that are no settings: --keep_going, --profile, --budget_device_hours, and log files."""

import dataclasses
import errno
import json
import os
import re
import time

import jax
import pytest
import runs

from saejax.errors import CheckFailed, UserError
from saejax.runner import command, pipeline, usage
from saejax.runner.pipeline import RunOptions, run_stages
from saejax.runner.profiling import Profiler
from saejax.runner.registry import all_stages
from saejax.runner.usage import check_budget, used_device_hours
from saejax.runner.workspace import Workspace

STAGE_NAMES = ["baseline", "capture", "train", "evaluate"]


@pytest.fixture
def fake(monkeypatch, inputs, tmp_path):
    """Runs stages whose functions only note that they ran; ``broken`` maps stages to the errors they raise, ``during``
    to what they do."""
    ran, during = [], {}

    def run(broken=(), **options):
        def work(run):
            during.get(run.stage, lambda: None)()
            ran.append(f"{run.stage}/{run.name}" if run.name else run.stage)
            run.say("working")
            if run.stage in broken:
                raise broken[run.stage]
            return dict(value=1)

        for stage in STAGE_NAMES:
            monkeypatch.setitem(pipeline.all_stages(), stage, dataclasses.replace(all_stages()[stage], run=work))
        model, corpus = inputs
        configs = runs.make_configs(
            model__path=str(model), corpus__path=str(corpus), task__behaviours=(), train__kinds=("topk", "standard")
        )
        lines: list[str] = []
        ran.clear()
        run_stages(STAGE_NAMES, configs, str(tmp_path / "run"), lines.append, options=RunOptions(**options))
        return lines

    run.ran, run.during, run.root = ran, during, tmp_path / "run"
    return run


def test_units_that_do_not_depend_on_a_failed_one_are_made(fake):
    broken = dict(capture=UserError("no sites"))
    with pytest.raises(CheckFailed) as failed:
        fake(broken, keep_going=True)
    assert fake.ran == ["baseline", "capture"]
    assert re.match("5 of 6 units: capture: no sites; train/topk: skipped: capture failed; ", str(failed.value))
    assert "evaluate/standard: skipped: capture failed" in str(failed.value)
    with pytest.raises(UserError, match="no sites"):
        fake(broken)
    assert fake.ran == ["capture"], "without the flag it ends at the first failure; what is done stays"


def test_a_full_disk_is_no_bug(fake, capsys):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(CheckFailed, match="5 of 6 units: capture: .* No space left on device; train/topk: skipped"):
        fake(dict(capture=full), keep_going=True)
    assert capsys.readouterr().err == ""


def test_a_bug_leaves_the_rest_to_go_on_and_is_in_the_log(fake):
    with pytest.raises(CheckFailed, match=r"2 of 6 units: evaluate/topk: a bug; evaluate/standard: a bug"):
        fake(dict(evaluate=RuntimeError("a bug")), keep_going=True)
    log = (fake.root / "logs" / "evaluate-topk.log").read_text()
    assert "evaluate/topk: started" in log and "working" in log
    assert "Traceback" in log and "RuntimeError: a bug" in log
    assert "train/topk: done in" in (fake.root / "logs" / "train-topk.log").read_text()


@pytest.mark.parametrize(
    ("processes", "status", "message"),
    [(1, 1, "failed: 5 of 6 units: capture: "), (2, 2, "error: --keep_going is for one process")],
)
def test_failures_are_listed_in_one_line(inputs, tmp_path, capsys, processes, status, message):
    changes = dict(capture__sites="resid_post.9", mesh__processes=processes)
    flags = runs.small_flags(*inputs, tmp_path / "run", **changes)
    assert command.run(STAGE_NAMES, "", ["program", *flags, "--keep_going"]) == status
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1
    assert (tmp_path / "run" / "baseline" / "done.json").exists() == (processes == 1)


def test_a_profile_of_a_few_steps(tmp_path):
    lines: list[str] = []
    profiler = Profiler(tmp_path / "profile", lambda: False, lines.append)
    assert not any(profiler() for _ in range(20))
    profiler.close()
    assert any((tmp_path / "profile").rglob("*.xplane.pb"))
    assert lines[0].startswith("profile of steps 5 to 8 in ")
    short = Profiler(tmp_path / "short", lambda: True, lines.append)
    assert short() and not (tmp_path / "short").exists()
    short.close()
    assert lines[-1] == "no profile: 1 steps, at least 5 are needed"


def test_a_budget_warns_and_then_ends_the_run(fake, tmp_path):
    fake()
    workspace, lines = Workspace(fake.root), []
    file = next(workspace.root.glob("hours/train-topk-*.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(seconds=3600.0, devices=4)))
    assert used_device_hours(workspace) == pytest.approx(4, abs=0.1)
    check_budget(workspace, 0.0, lines.append)
    check_budget(workspace, 100.0, lines.append)
    assert lines == []
    check_budget(workspace, 4.5, lines.append)
    assert lines[0].endswith("of 4.5 device-hours are used")
    with pytest.raises(UserError, match="--budget_device_hours is NaN"):
        check_budget(workspace, float("nan"), lines.append)
    with pytest.raises(UserError, match=r"--budget_device_hours=3 is used up \(4.0.* device-hours\)"):
        check_budget(workspace, 3.0, lines.append)
    with pytest.raises(UserError, match="is used up"):
        fake(budget_device_hours=3.0)
    assert fake.ran == []


def test_a_damaged_file_of_hours_is_deleted_alone(tmp_path):
    """Its folder has the hours of all other attempts."""
    (tmp_path / "hours").mkdir(parents=True)
    for content in ("{", "[]", "{}"):
        (tmp_path / "hours" / "a.json").write_text(content)
        with pytest.raises(UserError, match=r"hours/a.json .*: it is damaged; delete this file, and the hours of its"):
            used_device_hours(Workspace(tmp_path))


def test_hours_of_attempts_that_failed_or_were_killed_count(fake, monkeypatch):
    """An attempt is written while it runs, counts all devices, and outlives the folder of its unit."""
    monkeypatch.setattr(usage, "_WRITE_EVERY", 0.001)

    def until_written():
        while not [*fake.root.glob("hours/baseline-*.json")]:  # what a process that is killed now leaves
            time.sleep(0.001)

    fake.during["baseline"] = until_written
    with pytest.raises(UserError, match="no sites"):
        fake(dict(capture=UserError("no sites")))
    files = {path.name.split("-")[0]: path for path in fake.root.glob("hours/*.json")}
    assert sorted(files) == ["baseline", "capture"] and not [*fake.root.glob("capture*")]
    attempt = json.loads(files["capture"].read_text())
    assert attempt["devices"] == jax.device_count() == 8
    files["capture"].write_text(json.dumps(attempt | dict(seconds=3600.0, devices=3)))
    fake()
    done = json.loads((fake.root / "capture" / "done.json").read_text())
    assert done["seconds"] == pytest.approx(3600, abs=10) and done["device_hours"] == pytest.approx(3, abs=0.1)
    assert used_device_hours(Workspace(fake.root)) == pytest.approx(3, abs=0.1)
