"""A study's row at work: the pipeline in a process of its own, with a log and a share of the host.

So its memory is its own, its output a file, and whatever ends it (bad input, a bug, the system for want of memory)
leaves a row with its reason.
"""

import functools
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from saejax.runner.usage import end_with_parent
from saejax.runner.workspace import now
from saejax.studies.shares import Share

_FAILED = re.compile(r"\[ *[\d.]+ s\] (\S+): failed: (.*)")  # as ``pipeline`` prints it with ``--keep_going``


class RowProcess:
    """A process that runs the units of a row, and that ends with this one.

    Args:
      command: its arguments.
      log: a file that its output is added to.
      share: what of the host it may use.
    """

    def __init__(self, command: Sequence[str], log: Path, share: Share):
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with open(log, "ab") as file:
            file.write(f"=== {now()} {shlex.join(command)}\n".encode())
            file.flush()
            self._start = file.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | share.environment,
                preexec_fn=functools.partial(_settle, os.getpid(), share),
            )
        self.share = share
        self._began = self.last_report = time.monotonic()  # last_report: when its progress was last logged

    @property
    def seconds(self) -> float:
        """Seconds since the process began."""
        return time.monotonic() - self._began

    @property
    def last_line(self) -> str:
        """The last line that the process printed; "" if there is none."""
        return ["", *self._lines()][-1]

    def _lines(self) -> list[str]:
        text = self._log.read_bytes()[self._start :].decode(errors="replace")
        return [line.strip() for line in text.splitlines() if line.strip()]

    def ended(self, within: float | None = 0.0) -> bool:
        """Return whether the process has ended, or ends within some seconds; None: wait until it has."""
        try:
            self._process.wait(within)
        except subprocess.TimeoutExpired:
            return False
        return True

    def ask_to_stop(self) -> None:
        """Ask the process to save its work and to end."""
        self._process.send_signal(signal.SIGTERM)

    def failed_units(self) -> dict[str, str]:
        """Return the units that the process said have failed, and why."""
        return {match[1]: match[2] for match in map(_FAILED.match, self._lines()) if match}

    @property
    def was_killed(self) -> bool:
        """True if a signal has ended the process."""
        return self._process.returncode < 0

    def why_it_failed(self) -> str:
        """Return the last line that an ended process wrote, or the signal that ended it."""
        status, last = self._process.returncode, self.last_line.removeprefix("error: ").removeprefix("failed: ")
        if self.was_killed:
            name = signal.Signals(-status).name
            memory = ", as the system ends processes when memory runs out" if -status == signal.SIGKILL else ""
            return f"ended by {name}{memory}; the last line before: {last}"
        return (last or "said nothing") if status else "the pipeline left it out"


def _settle(parent: int, share: Share) -> None:
    end_with_parent(parent, signal.SIGTERM)
    if share.cores:
        os.sched_setaffinity(0, share.cores)
