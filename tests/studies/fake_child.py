"""A pipeline whose stages do nothing: what a study's child processes run in tests, without JAX."""

import dataclasses
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

from saejax.errors import UserError
from saejax.models.settings import ModelConfig
from saejax.runner import command, pipeline, workplan


def fake_stages() -> dict:
    """The stages with ``fake_stage`` in place of their work, which read nothing from outside."""
    return {
        name: dataclasses.replace(stage, run=fake_stage, inputs=stage.units_read, results=None)
        for name, stage in pipeline.all_stages().items()
    }


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
    command.leave(command.run(list(pipeline.all_stages()), "", sys.argv))


# A child that asks ``serve`` for a process, and ends as that process does.
ASK = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect(ADDRESS)
    request = [sys.argv, dict(os.environ), sorted(os.sched_getaffinity(0))]
    socket.send_fds(server, [json.dumps(request).encode()], [1])
    status = int(server.recv(99))
if os.WIFSIGNALED(status):
    os.kill(os.getpid(), os.WTERMSIG(status))
sys.exit(os.WEXITSTATUS(status))
"""


def serve(address: str) -> None:
    """Fork a child for each that asks: to import what stages import takes most of the time of one that does nothing."""
    fake_stages()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(address)
        server.listen()
        print("listening", flush=True)
        while True:
            asker, _ = server.accept()
            if os.fork() == 0:
                _answer(asker)
            asker.close()


def _answer(asker: socket.socket) -> None:
    text, (output,), *_ = socket.recv_fds(asker, 2**20, 1)
    sys.argv, environment, cores = json.loads(text)
    if (child := os.fork()) == 0:
        for number in (1, 2):
            os.dup2(output, number)
        os.environ.clear()
        os.environ.update(environment)
        os.sched_setaffinity(0, cores)
        main()
    asker.send(str(os.waitpid(child, 0)[1]).encode())
    os._exit(0)
