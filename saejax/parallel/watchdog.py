"""What a process that gets nowhere leaves to find out why: where all its threads are."""

import contextlib
import faulthandler
import sys
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def watched(
    seconds: float, stopping: Callable[[], bool], step: Callable[[], None] = lambda: None
) -> Iterator[Callable[[], bool]]:
    """In the block, the stacks of all threads are written to stderr whenever no step has ended for some time.

    It is done in C, so that it works while Python's lock is held. Gives a function to be called in place of
    ``stopping``: stages ask at each step whether to stop.

    Args:
      seconds: the time; 0: nothing is written.
      stopping: whether the process was asked to stop.
      step: called at each step.
    """
    armed = float("-inf")

    def ended() -> None:
        nonlocal armed
        step()
        now = time.monotonic()
        if seconds and sys.__stderr__ and now - armed > seconds / 100:  # arming starts a thread
            faulthandler.dump_traceback_later(seconds, repeat=True, file=sys.__stderr__)
            armed = now

    def asked() -> bool:
        ended()
        return stopping()

    ended()
    try:
        yield asked
    finally:
        if seconds:
            faulthandler.cancel_dump_traceback_later()
