"""A pipeline whose stages do nothing: what a study's child processes run in tests, without JAX."""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

from saejax.errors import UserError
from saejax.models.settings import ModelConfig
from saejax.runner import command, pipeline, workplan


def fake_stages() -> dict:
    """The stages with ``fake_stage`` in place of their work, which read nothing from outside."""
    changes = dict(run=fake_stage, identity={}, unit_identity={}, results=None)
    return {name: dataclasses.replace(stage, **changes) for name, stage in pipeline.all_stages().items()}


def fake_stage(run) -> dict:
    """Leaves a line in a file; does what the model's revision says: fail, be killed, or take its time."""
    unit = f"{run.stage}/{run.name}".rstrip("/")
    with open(Path(os.environ["FAKE_RUNS"]), "a") as file:
        file.write(json.dumps([str(run.folder).rpartition("-")[0], sorted(os.sched_getaffinity(0))]) + "\n")
    wish, _, where = run.configs[ModelConfig].revision.partition("@")
    if unit == where and wish == "refuse":
        raise UserError("there is no such thing")
    if unit == where and wish == "bug":
        raise ZeroDivisionError("a bug")
    if unit == where and wish == "memory":
        os.kill(os.getpid(), signal.SIGKILL)
    if unit == where and wish == "meet":
        meet(run.folder)
    if wish == "slow":
        time.sleep(0.3)
    (run.folder / "out.txt").write_text(unit)
    return dict(unit=unit)


def meet(folder: Path) -> None:
    """Waits until the same unit of another row is at work, too."""
    study = next(parent for parent in folder.parents if parent.name == "rows")
    for _ in range(6000):
        if len(list(study.glob(f"*/{folder.relative_to(study).parts[1]}/{folder.name}"))) > 1:
            return
        time.sleep(0.1)
    raise UserError("alone")


def main() -> None:
    stages = fake_stages()
    pipeline.all_stages = workplan.all_stages = lambda: stages
    command.main(list(pipeline.all_stages()), "", sys.argv)
