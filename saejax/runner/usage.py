"""Resource use: memory of a process, as the system and the devices count it; device-hours of a workdir.

Hours are counted by attempt: whoever works on a unit keeps a file in ``DIR/hours`` for it, and writes that file again
every half minute. So attempts that were killed or failed count, and so do attempts at units whose folders are gone.
"""

import contextlib
import ctypes
import math
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax._src import xla_bridge

from saejax.errors import UserError
from saejax.files import read_object, write_json
from saejax.runner.workspace import SUMMARY, Workspace, now

HOURS = "hours"  # folder of a workdir with a file for each attempt
_WRITE_EVERY = 30.0  # seconds, which a process that is killed may lose
_WARN = 0.8  # share of a budget from which a line says how much is used
_PROCESS = Path("/proc/self")
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl


def forget_peak() -> None:
    """Reset the peak of the host's memory to the process's current use, where Linux allows it."""
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")


def peak_host_bytes() -> int | None:
    """Return the process's peak host memory since ``forget_peak``; None where the system does not report it.

    ``getrusage`` does not help: a child process starts with its parent's peak.
    """
    with contextlib.suppress(OSError):
        peak = re.search(r"^VmHWM:\s*(\d+) kB", (_PROCESS / "status").read_text(), re.MULTILINE)
        return int(peak[1]) * 1024 if peak else None
    return None


def peak_device_bytes() -> int | None:
    """Return the largest peak memory among this process's devices; None on CPUs."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)


def end_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Make Linux send this process a signal when its parent has ended, however it ended.

    Args:
      parent: process id of the parent, which may be gone already.
      number: the signal's number.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


class Attempt:
    """The time that a process has worked on a unit, and the devices of all processes that work on it together."""

    def __init__(self, workspace: Workspace, unit: str, mark: str):
        self._earlier = [file for file in _attempts(workspace) if (file["unit"], file["fingerprint"]) == (unit, mark)]
        self._about = dict(unit=unit, fingerprint=mark, start=now())
        self._clock = time.monotonic()
        name = f"{unit.replace('/', '-')}-{mark}.{uuid.uuid4().hex[:8]}.json"
        self._path = workspace.root / HOURS / name

    @property
    def seconds(self) -> float:
        """Seconds since the attempt began."""
        return time.monotonic() - self._clock

    def totals(self) -> tuple[float, float]:
        """Return seconds and device-hours of this attempt and of all earlier ones at the same unit."""
        attempts = [*self._earlier, dict(seconds=self.seconds, devices=_device_count())]
        return sum(attempt["seconds"] for attempt in attempts), _device_hours(attempts)

    def write(self) -> None:
        """Write the attempt's file; one that cannot be written stops no run."""
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(exist_ok=True)
            write_json(self._path, self._about | dict(seconds=round(self.seconds, 2), devices=_device_count()))


@contextlib.contextmanager
def count_hours(workspace: Workspace, unit: str, mark: str) -> Iterator[Attempt]:
    """Count the time of the block as an attempt at a unit, however the block or the process ends."""
    attempt, ended = Attempt(workspace, unit, mark), threading.Event()

    def write_now_and_then() -> None:
        while not ended.wait(_WRITE_EVERY):
            attempt.write()

    thread = threading.Thread(target=write_now_and_then, daemon=True)
    thread.start()
    try:
        yield attempt
    finally:
        ended.set()
        thread.join()
        attempt.write()


def _device_count() -> int:
    """Return the number of devices of all processes; 0 if JAX has not looked for devices."""
    # Counting devices must not be what reserves their memory, which torch may want.
    return jax.device_count() if xla_bridge.backends_are_initialized() else 0


def _attempts(workspace: Workspace) -> list[dict[str, Any]]:
    """Return the attempts at the units of a workdir.

    Raises:
      UserError: the file of one is damaged.
    """
    attempts = []
    for path in workspace.root.glob(f"{HOURS}/*.json"):
        try:
            attempts.append(read_object(path, "unit", "seconds", "devices"))
        except UserError as error:  # its folder has the hours of all other attempts
            damage = str(error).partition(";")[0]
            raise UserError(f"{damage}; delete this file, and the hours of its attempt count no more") from None
    return attempts


def _device_hours(attempts: Sequence[Mapping[str, Any]]) -> float:
    return sum(attempt["seconds"] * attempt["devices"] for attempt in attempts) / 3600


def used_device_hours(workspace: Workspace) -> float:
    """Return the hours of all attempts at units of a workdir, finished or not, times the devices of each."""
    return _device_hours(_attempts(workspace))


def check_budget(workspace: Workspace, budget: float, say: Callable[[str], None]) -> None:
    """Warn before a budget of device-hours is used up.

    Args:
      workspace: the folder of the run.
      budget: device-hours; 0: there is no limit.
      say: prints a line.

    Raises:
      UserError: it is used up, or NaN.
    """
    if math.isnan(budget):  # which is neither below nor above what is used
        raise UserError("--budget_device_hours is NaN: expected a number of hours")
    if not budget:
        return
    used, preflight, expected = used_device_hours(workspace), workspace.current("preflight"), 0.0
    if preflight and (preflight / SUMMARY).exists():
        expected = read_object(preflight / SUMMARY, "results")["results"].get("device_hours") or 0.0
    if used >= budget:
        raise UserError(
            f"--budget_device_hours={budget:g} is used up ({used:.2f} device-hours): finished units are kept; raise it "
            "to go on"
        )
    if used >= _WARN * budget:
        say(f"{used:.2f} of {budget:g} device-hours are used")
    elif expected > budget:
        say(f"preflight expects {expected:.2f} device-hours, more than --budget_device_hours={budget:g}")
