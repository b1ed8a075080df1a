"""The units of a study: each in a process, what fails stops no other row, a killed study goes on; bad input."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import fake_child
import fake_study
import pytest

from saejax.errors import Interrupted, UserError
from saejax.runner import pipeline, workplan, workspace
from saejax.runner.registry import default_configs
from saejax.runner.workspace import hold_claim
from saejax.studies import run, shares, study, units

UNITS = ["preflight", "baseline", "capture", "train/topk", "evaluate/topk", "report"]


@pytest.fixture(scope="module")
def child():
    """The program of a row's process: a fork of one that has imported everything."""
    address = f"\0saejax-study-{os.getpid()}"
    command = [sys.executable, "-c", f"{fake_study.CHILD}serve({address!r})"]
    root = Path(__file__).parent.parent.parent
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) as server:
        assert server.stdout.readline() == b"listening\n"
        yield fake_child.ASK.replace("ADDRESS", repr(address))
        server.kill()


@pytest.fixture
def fake(child, monkeypatch, tmp_path):
    """Runs a study of rows with these revisions of a model; gives its status and the states of its units."""
    fake_study.install(monkeypatch.setattr, child)
    monkeypatch.setenv("FAKE_RUNS", str(tmp_path / "runs.jsonl"))

    def go(*extra, **revisions):
        folder = write_rows(tmp_path / "rows", revisions)
        status = run.run(["study_run", f"--workdir={tmp_path / 'study'}", f"--rows={folder}", *extra])
        states = json.loads((tmp_path / "study" / "study.json").read_text())["states"]
        return status, {(state["row"], state["unit"]): state for state in states}

    return go


def write_rows(folder: Path, revisions) -> Path:
    folder.mkdir(exist_ok=True)
    for name, revision in revisions.items():
        flags = ["# a row", "--task.behaviours=", "--train.kinds=topk", f"--model.revision={revision}"]
        (folder / f"{name}.flags").write_text("\n".join(flags))
    return folder


def ran(tmp_path) -> list[str]:
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    return [json.loads(line)[0].removeprefix(f"{tmp_path}/study/rows/") for line in lines]


def test_a_study_runs_every_unit_once(fake, tmp_path, capsys, monkeypatch):
    rows = dict(a="main", b="main\n--model.backend=torch")  # which has no preflight
    status, states = fake(**rows)
    assert status == 0 and {state["state"] for state in states.values()} == {"done"}
    later = [f"{row}/{unit}" for row in "ab" for unit in UNITS[1:]]
    assert ran(tmp_path) == ["a/preflight", *later] and len(states) == 11
    assert "a: started, 1 of 6 units done before" in capsys.readouterr().out
    assert (tmp_path / "study/logs/b.log").read_text().startswith("=== 20")
    assert fake(**rows)[0] == 0
    assert len(ran(tmp_path)) == 11 and "all done before, unchanged" in capsys.readouterr().out
    # No unit depends on it, but the page does.
    assert fake("--study.control=stranger", **rows)[0] == 0
    assert len(ran(tmp_path)) == 11 and "all done before" not in capsys.readouterr().out
    # Nor on the code that makes the page.
    monkeypatch.setattr(study, "hash_code", lambda: "another version")
    for is_written in (True, False):
        assert fake("--study.control=stranger", **rows)[0] == 0
        assert len(ran(tmp_path)) == 11 and ("all done before" in capsys.readouterr().out) is not is_written
    (tmp_path / "rows" / "b.flags").unlink()
    assert fake("--train.k=5", a="main")[0] == 0
    assert ran(tmp_path)[11:] == ["a/train/topk", "a/evaluate/topk", "a/report"]


def test_rows_run_side_by_side_on_their_shares_and_units_that_fail_stop_no_other_row(fake, tmp_path, capsys):
    wishes = dict(bug="bug@train/topk", memory="memory@baseline", unfit="refuse@preflight")
    at_once, wish = (2, "meet@train/topk") if len(os.sched_getaffinity(0)) > 1 else (1, "main")
    status, states = fake(f"--at_once={at_once}", a=wish, b=wish, **wishes)
    error = capsys.readouterr().err
    assert status == 1 and "failed: 3 of 30 units: " in error and "(and others)" in error
    assert [states["unfit", unit]["state"] for unit in UNITS] == ["failed"] + ["not run"] * 5
    assert "there is no such thing" in states["unfit", "preflight"]["reason"]
    assert [name for name in ran(tmp_path) if name.startswith("unfit/")] == ["unfit/preflight"]
    assert states["bug", "train/topk"]["state"] == "failed" and "a bug" in states["bug", "train/topk"]["reason"]
    assert states["bug", "capture"]["state"] == "done"
    assert states["bug", "evaluate/topk"]["reason"] == "train/topk is not done"
    assert states["memory", "baseline"]["state"] == "failed"
    assert "when memory runs out" in states["memory", "baseline"]["reason"]
    assert states["memory", "evaluate/topk"]["state"] == "done", "what does not read it goes on"
    assert states["memory", "report"]["reason"] == "baseline is not done"
    assert all(state["state"] == "done" for (row, _), state in states.items() if row in "ab")
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    parts = {frozenset(cores) for _, cores in lines}
    assert len(parts) == at_once, "each unit on one of two halves of the cores"
    assert at_once == 1 or not frozenset.intersection(*parts)
    for row in "ab":
        own = [name.partition("/")[2] for name in ran(tmp_path) if name.startswith(f"{row}/")]
        assert own == UNITS, "the units of a row one after the other"
    status, states = fake(bug="main")
    assert status == 1, "memory fails still"
    assert states["bug", "report"]["state"] == "done", "mended, and run again"


def test_a_signal_that_ends_a_row_with_the_study_is_no_failure(tmp_path):
    """A terminal and a batch system send it to both, and the row may end first."""
    asked = iter([False, True])
    process = mock.Mock(ended=lambda within: True, share=shares.Share())
    row = mock.Mock(is_claimed=lambda: False, start=lambda first, share: process, states=list)
    row.name = "a"
    with pytest.raises(Interrupted, match="stopped in a"):
        units._run_side_by_side([row], False, print, lambda: next(asked), [shares.Share()])
    row.end.assert_not_called()


def test_shares_of_a_host(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4}, raising=False)
    assert shares.shares(1) == [shares.Share()]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [part.cores for part in shares.shares(2)] == [{0, 1}, {2, 3, 4}]
    with pytest.raises(UserError, match="this host has 5 cores, too few for 6 units at once"):
        shares.shares(6)
    monkeypatch.setattr(shares, "count_gpus", lambda: 8)
    for none in ("-1", "-1,0", "NoDevFiles"):  # no GPU, as CUDA reads it: cores are shared
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert [part.cores for part in shares.shares(2)] == [{0, 1}, {2, 3, 4}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3,GPU-5,7,9")
    assert [part.environment["CUDA_VISIBLE_DEVICES"] for part in shares.shares(2)] == ["1,3", "GPU-5,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-2")  # a process sees one of them
    assert [part.environment["CUDA_VISIBLE_DEVICES"] for part in shares.shares(2)] == ["MIG-1", "MIG-2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3,GPU-5,7")
    with pytest.raises(UserError, match="this host has 4 GPUs"):
        shares.shares(5)
    monkeypatch.undo()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: a (UUID: b)'\necho 'GPU 1: a (UUID: c)'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))  # and no files of GPUs, as in Linux on Windows
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: [])
    assert [part.environment["CUDA_VISIBLE_DEVICES"] for part in shares.shares(2)] == ["0", "1"]


def test_rows_whose_files_cannot_be_read(fake, monkeypatch, capsys):
    """One lacks what only a unit's fingerprint asks for; the other cannot be planned, which is said before any runs."""

    def missing(configs):
        raise UserError("there is no model folder here")

    capture = pipeline.all_stages()["capture"]
    capture = dataclasses.replace(capture, inputs=lambda configs, name: dict(model=missing))
    stages = pipeline.all_stages() | dict(capture=capture)
    for module in (pipeline, workplan):
        monkeypatch.setattr(module, "all_stages", lambda: stages)
    _, states = fake(a="main", b="main\n--track.prompt=x")
    output = capsys.readouterr().out
    assert 0 < output.index("b  settings: failed: --track.dictionaries is missing") < output.index("a: started")
    assert states["a", "capture"]["reason"] == "there is no model folder here"
    assert states["a", "baseline"]["state"] == "done" and states["a", "train/topk"]["state"] == "not run"


@pytest.mark.parametrize(
    ("files", "flags", "message"),
    [
        ({}, [], "has no file that ends in .flags"),
        ({"a": "--train.bach=3"}, [], "row a ("),
        ({"a": "--train.batch=0"}, [], "--train.batch is 0: expected at least 1"),
        ({"a": ""}, ["--train.batch=0"], "--train.batch is 0: expected at least 1"),
        ({"a": "--workdir=/tmp/x"}, [], "--workdir is no flag of a row"),
        ({"a": "--take_over"}, [], "--take_over is no flag of a row"),
        ({"a": ""}, ["--at_once=1000"], "too few for 1000 units at once"),
        ({"a": ""}, ["--rows="], "--rows=FILE,FOLDER is missing"),
        ({"a": ""}, ["--workdir="], "--workdir=DIR is missing"),
        ({"a": ""}, ["--rows=nowhere.flags"], "--rows=nowhere.flags is no flag file"),
        ({"a": "--flagfile=nowhere.flags"}, [], "the flag file nowhere.flags cannot be read"),
        ({"a": "nonsense"}, [], "row a ("),
        ({"a": "nonsense", "b": "--train.batch=0"}, [], "--rows: 2 rows cannot be run: row a ("),
    ],
)
def test_bad_input(tmp_path, capsys, files, flags, message):
    rows = tmp_path / "rows"
    rows.mkdir()
    for name, text in files.items():
        (rows / f"{name}.flags").write_text(text)
    assert run.run(["study_run", f"--workdir={tmp_path / 'study'}", f"--rows={rows}", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and message in error[0], error
    assert not (tmp_path / "study").exists()


def test_rows_share_a_cache_of_programs(tmp_path, monkeypatch):
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "jax")  # whose settings are those of all tests
    seen = []
    monkeypatch.setattr(run, "run_study_rows", lambda *_, **__: seen.append(os.environ["JAX_COMPILATION_CACHE_DIR"]))
    rows = write_rows(tmp_path / "rows", dict(a="main"))
    assert run.run(["study_run", f"--workdir={tmp_path / 'study'}", f"--rows={rows}"]) == 0
    assert Path(seen[0]).is_relative_to(tmp_path / "study" / ".compile_cache")


def test_two_rows_of_one_name_and_two_studies_in_one_folder(fake, tmp_path, capsys):
    rows = [str(write_rows(tmp_path / folder, dict(a="main"))) for folder in ("first", "second")]
    assert run.run(["study_run", f"--workdir={tmp_path / 'study'}", f"--rows={','.join(rows)}"]) == 2
    assert "2 rows are called a (" in capsys.readouterr().err
    (tmp_path / "study").mkdir()
    with hold_claim(tmp_path / "study", "it"):
        assert run.run(["study_run", f"--workdir={tmp_path / 'study'}", f"--rows={rows[0]}"]) == 2
    assert "is being made by process" in capsys.readouterr().err


def test_claims_of_a_host_that_is_gone_are_taken_over_in_the_rows_too(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(workspace.socket, "gethostname", lambda: "elsewhere")
    with hold_claim(tmp_path, "it"):
        claimed = (tmp_path / "claim.json").read_text()
    monkeypatch.undo()
    plain = SimpleNamespace(name="a", configs=default_configs(), argv=[])
    row = units.RowUnits(tmp_path / "study", plain, take_over=True)
    row.workspace.folder("train/topk", "m").mkdir(parents=True)
    (row.workspace.folder("train/topk", "m") / "claim.json").write_text(claimed)
    row._units, row._plan = ["train/topk"], mock.Mock(fingerprint=lambda unit: "m")
    assert not row.is_claimed()
    row._take_over = False
    assert row.is_claimed()


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(tmp_path):
    """SIGKILL: the child of the study ends, too, and no unit is done twice."""
    rows = write_rows(tmp_path / "rows", dict(a="slow", b="slow"))
    flags = [f"--workdir={tmp_path / 'study'}", f"--rows={rows}"]
    command = [sys.executable, str(Path(__file__).parent / "fake_study.py"), *flags]
    root = Path(__file__).parent.parent.parent
    environment = os.environ | dict(FAKE_RUNS=str(tmp_path / "runs.jsonl"), PYTHONPATH=str(root))
    for wait in (random.Random(5).uniform(1.0, 6.0) for _ in range(10)):
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.DEVNULL)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, cwd=root, env=environment, stdout=subprocess.DEVNULL).returncode == 0
    states = json.loads((tmp_path / "study" / "study.json").read_text())["states"]
    assert len(states) == 12 and {state["state"] for state in states} == {"done"}
    summaries = [json.loads(path.read_text()) for path in (tmp_path / "study/rows").rglob("done.json")]
    assert len(summaries) == 12
    assert len(ran(tmp_path)) <= 12 + 10, "what was done is not done again"


def test_the_time_to_go_is_that_of_the_longest_row():
    assert units._time_to_go(0, [5], 2, 1) == ""  # not known before a row ended
    assert units._time_to_go(60, [20], 0, 1) == "; about 40 s to go in all"
    assert units._time_to_go(60, [20, 40], 2, 2) == "; about 2 min to go in all"
    assert units._time_to_go(60, [200], 0, 1) == "; about 20 s to go in all"  # late
