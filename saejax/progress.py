"""Progress of long computations: reported to the caller, or shown in a notebook, a console or a terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm

OnProgress = Callable[[int, int], None]  # called with the work done and to do, mostly in tokens; may raise to stop


_DELAY = 2.0  # seconds after which a bar is shown: quick calls show none


def silent(done: int, total: int) -> None:
    """Ignore progress: an ``OnProgress`` for callers that report none.

    Args:
      done: work done.
      total: work in total.
    """


@contextlib.contextmanager
def show_progress(title: str) -> Iterator[OnProgress]:
    """Show a bar while a call of the library takes long, where somebody looks on; elsewhere nothing.

    Args:
      title: what is done, such as "capture".

    Yields:
      The function that takes the work done and to do.
    """
    with tqdm(desc=title, disable=not is_interactive(), delay=_DELAY, leave=False) as bar:

        def on_progress(done: int, total: int) -> None:
            """Draw the bar anew."""
            bar.total = total or None  # some do not know it from the start
            bar.update(done - bar.n)

        yield on_progress


def is_interactive() -> bool:
    """Return whether somebody looks on: in a notebook, in Python's console, or at a terminal."""
    ipython = sys.modules.get("IPython")
    in_notebook = ipython is not None and ipython.get_ipython() is not None
    return in_notebook or hasattr(sys, "ps1") or sys.stderr.isatty()
