"""Progress of long computations, reported to the caller."""

from collections.abc import Callable

OnProgress = Callable[[int, int], None]  # called with the work done and to do, mostly in tokens; may raise to stop


def silent(done: int, total: int) -> None:
    """Ignore progress: an ``OnProgress`` for callers that report none.

    Args:
      done: work done.
      total: work in total.
    """
