"""Progress of work on a text, logged every few seconds."""

import time
from collections.abc import Callable

from saejax.progress import OnProgress

SAY_EVERY = 5.0  # seconds


def say_progress(say: Callable[[str], None], doing: str, ask: Callable[[], None]) -> OnProgress:
    """Return a function that is called with the work done and all of it, and says every few seconds how far it is.

    Args:
      say: prints a line.
      doing: name of the work, for the line.
      ask: called each time; it may raise to stop.
    """
    progress = TextProgress(lambda line: say(f"{doing}: {line}"), 0)
    counted = 0

    def on_progress(done: int, total: int) -> None:
        nonlocal counted
        ask()
        if done < total:  # what is done needs no line
            progress.total = total
            progress.add(done - counted)
            counted = done

    return on_progress


class TextProgress:
    """Counter that logs the work done, its speed and the remaining time.

    Args:
      say: prints a line.
      total: amount of work to do; 0: not known.
      unit: name of the unit that is counted.
    """

    def __init__(self, say: Callable[[str], None], total: int, unit: str = "tokens"):
        self._say, self.total, self._unit, self._done = say, total, unit, 0
        self._start = self._last_logged = time.monotonic()

    def add(self, count: int) -> None:
        """Count the work done since the last call."""
        self._done += count
        now = time.monotonic()
        if now - self._last_logged >= SAY_EVERY:
            self._last_logged, rate, remaining = now, self.rate, max(self.total - self._done, 0)
            of, to_go = (f" of {self.total:,}", f"  {remaining / rate:.0f} s to go") if self.total else ("", "")
            self._say(f"{self._done:,}{of} {self._unit}  {rate:,.0f} {self._unit}/s{to_go}")

    @property
    def rate(self) -> float:
        """Work done per second; 0 before there is any."""
        return self._done / (time.monotonic() - self._start) if self._done else 0.0
