"""Says where a run hangs: a process that waits for another one, or for a file system, prints nothing by itself."""

import faulthandler
import sys
import time
from typing import Self

PATIENCE = 600.0  # seconds


class Watchdog:
    """Writes the stack of every thread to stderr whenever no step has ended for ``PATIENCE`` seconds; ends nothing."""

    def __enter__(self) -> Self:
        self._arm()
        return self

    def __exit__(self, *error: object) -> None:
        faulthandler.cancel_dump_traceback_later()

    def step_ended(self) -> None:
        """A step has ended."""
        if time.monotonic() - self._armed > PATIENCE / 100:  # each time starts a thread
            self._arm()

    def _arm(self) -> None:
        self._armed = time.monotonic()
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(PATIENCE, repeat=True, file=sys.__stderr__)
