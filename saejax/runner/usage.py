"""Resource use of a process: its memory, as the system and the devices count it, and its lifetime."""

import contextlib
import ctypes
import os
import re
import signal
import sys
from pathlib import Path

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
        found = re.search(r"^VmHWM:\s*(\d+) kB", (_PROCESS / "status").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return None


def peak_device_bytes() -> int | None:
    """Return the largest peak memory among this process's devices; None where JAX was not used, and on CPUs."""
    if "jax" not in sys.modules:
        return None
    import jax

    found = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in found if peak is not None), default=None)


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
