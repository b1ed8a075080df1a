"""What a process takes of the host: its memory, as the system and the devices count it, and its lifetime."""

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
    """Lets the peak of the host's memory start again at what the process holds now, where Linux allows it."""
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")


def peak_host_bytes() -> int | None:
    """The most memory that the process held at once since ``forget_peak``; None where the system does not tell.

    What ``getrusage`` says is of no use: a child process begins with its parent's peak.
    """
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s*(\d+) kB", (_PROCESS / "status").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return None


def peak_device_bytes() -> int | None:
    """The most that any of this process's devices held so far; None where JAX was not used, and on CPUs."""
    if "jax" not in sys.modules:
        return None
    import jax

    found = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in found if peak is not None), default=None)


def end_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Have Linux send this process a signal when its parent is gone, however that ended.

    Args:
      parent: number of the parent's process, which may be gone already.
      number: of the signal.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)
