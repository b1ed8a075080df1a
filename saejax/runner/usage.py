"""Resource use: memory of a process, as the system and the devices count it; device-hours of a workdir."""

import contextlib
import ctypes
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from saejax.errors import UserError
from saejax.files import read_object
from saejax.runner.workspace import STACK, SUMMARY, Workspace

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
    """Return the largest peak memory among this process's devices; None where JAX was not used, and on CPUs."""
    if "jax" not in sys.modules:
        return None
    import jax

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


def used_device_hours(workspace: Workspace) -> float:
    """Return the seconds of a workdir's finished units, current or not, times the devices of each, in hours."""
    total = 0.0
    # Units lie in DIR/<stage>-<hash> or in DIR/<stage>/<name>-<hash>.
    for pattern in ("*", "*/*"):
        for path in workspace.root.glob(f"{pattern}/{SUMMARY}"):
            folder = path.parent
            if folder.is_symlink() or folder.parent.is_symlink() or (folder / STACK).exists():
                continue  # counted under its own name; a stack's members are
            summary = read_object(path, "seconds")
            total += summary["seconds"] * (summary.get("devices") or {}).get("count", 0) / 3600
    return total


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
