"""What the batch script makes of how a run ends, with commands of the cluster that are played."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs

SCRIPT = str(runs.ROOT / "launch" / "slurm.sbatch")
SRUN = """#!/bin/bash
shift
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "$@" >> {queue}
"""
RUN = """import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
open({ready!r}, "w").close()
{ends}
"""


@pytest.fixture
def started(tmp_path):
    """A function that starts the script on a run that ends as some Python says, with 143 when it is told to stop."""

    def start(ends: str) -> tuple[subprocess.Popen[str], Path]:
        tools, ready = tmp_path / "bin", tmp_path / "ready"
        tools.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL.format(queue=tmp_path / "queue"))):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        (tmp_path / "run.py").write_text(RUN.format(ready=str(ready), ends=ends))
        environment = os.environ | dict(PATH=f"{tools}:{os.environ['PATH']}", SLURM_JOB_ID="7")
        environment["SAEJAX"] = f"{sys.executable} {tmp_path / 'run.py'}"
        job = subprocess.Popen(["bash", SCRIPT, "--x=a b"], env=environment, start_new_session=True, text=True)
        while not ready.exists():
            time.sleep(0.02)
        return job, tmp_path / "queue"

    return start


@pytest.mark.parametrize(
    ("ends", "status"),
    [("sys.exit(0)", 0), ("sys.exit(2)", 1), ("os.abort()", 1), ("os.kill(os.getpid(), 9)", 1)],
    ids=["well", "a wrong flag", "a crash", "killed for want of memory"],
)
def test_a_run_that_ends_by_itself_is_not_queued_again(started, ends, status):
    job, queue = started(ends)
    assert job.wait(300) == status and not queue.exists()


def test_a_run_that_was_stopped_is_queued_again_and_not_for_ever(started, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "19")
    job, queue = started("sys.exit(143)")
    assert job.wait(300) == 143 and queue.read_text() == "requeue 7\n"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "20")
    queue.unlink()
    shutil.rmtree(queue.parent / "bin")
    job, queue = started("sys.exit(143)")
    assert job.wait(300) == 143 and not queue.exists()


def test_a_run_that_is_told_to_stop_is_queued_again(started):
    job, queue = started("time.sleep(60)")
    # As the cluster does: every process of the step gets the signal, the batch script does not.
    for process in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        with contextlib.suppress(ProcessLookupError):
            if process != job.pid and os.getsid(process) == job.pid:
                os.kill(process, signal.SIGTERM)
    assert job.wait(300) == 143 and queue.read_text() == "requeue 7\n"
