"""Work for a request, in a thread of its own that ends with the request.

The answer is lines of JSON: ``{"say": words}`` and ``{"done": n, "total": m}`` while it goes on, then
``{"result": ...}`` or ``{"error": words}``. One piece of work runs at a time, as it has the machine's devices; others
wait. A reader who leaves, and a server that ends, stop the work where it next says how far it is.
"""

import asyncio
import contextlib
import json
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from typing import Any

from saejax.errors import Interrupted, UserError

THREAD = "saejax-job"  # the name of such threads
_JOIN = 30.0  # seconds that a server which ends waits for its work
_MOST_LINES = 200  # steps that are told of one piece of work


class Job:
    """Progress messages of a piece of work, and a request to stop it.

    Args:
      tell: takes a line; called from the work's thread.
    """

    def __init__(self, tell: Callable[[dict[str, Any]], None]):
        self._tell, self._stop, self._last_step = tell, threading.Event(), -1

    def stop(self) -> None:
        """Ask the work to stop."""
        self._stop.set()

    def stopping(self) -> bool:
        """Return whether the work is to stop."""
        return self._stop.is_set()

    def say(self, words: str) -> None:
        """Send a line that says what is done now; raise ``Interrupted`` if it is to stop."""
        self.check()
        self._last_step = -1
        self._tell(dict(say=words.strip()))

    def progress(self, done: int, total: int) -> None:
        """Send the progress, in any unit; raise ``Interrupted`` if it is to stop."""
        self.check()
        step = done * _MOST_LINES // max(total, 1)
        if step != self._last_step:
            self._last_step = step
            self._tell(dict(done=done, total=total))

    def check(self) -> None:
        """Raise ``Interrupted`` if the work is to stop."""
        if self.stopping():
            raise Interrupted("stopped")


class Jobs:
    """The work of a server."""

    def __init__(self) -> None:
        self._turn, self._going, self._closed = threading.Lock(), dict[Job, threading.Thread](), False

    async def lines(self, work: Callable[[Job], Any]) -> AsyncIterator[bytes]:
        """Do work and yield its lines; closing this iterator stops the work.

        Args:
          work: gives the result, JSON data; a ``UserError`` is told.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[bytes, bool]]()

        def tell(line: dict[str, Any]) -> None:
            text = json.dumps(line, allow_nan=False).encode() + b"\n"
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(queue.put_nowait, (text, not line.keys().isdisjoint(("result", "error"))))

        job = Job(tell)
        thread = threading.Thread(target=self._run, args=(job, work, tell), name=THREAD, daemon=True)
        self._going[job] = thread
        if self._closed:
            job.stop()
        thread.start()
        try:
            last = False
            while not last:
                text, last = await queue.get()
                yield text
        finally:
            job.stop()

    def stop(self) -> None:
        """Stop all work, and start no more, without waiting."""
        self._closed = True
        for job in list(self._going):
            job.stop()

    def close(self) -> None:
        """Stop all work and wait for its threads."""
        self.stop()
        for thread in list(self._going.values()):
            thread.join(_JOIN)

    def _run(self, job: Job, work: Callable[[Job], Any], tell: Callable[[dict[str, Any]], None]) -> None:
        try:
            if self._turn.locked():
                job.say("Waiting for other work")
            with self._turn:
                job.check()
                tell(dict(result=work(job)))
        except Interrupted:
            tell(dict(error="The work was stopped."))
        except UserError as error:
            tell(dict(error=" ".join(str(error).split())))
        except Exception as error:  # a bug: the reader learns that there is one, the terminal which
            traceback.print_exc(file=sys.stderr)
            tell(dict(error=f"This is a bug of saejax ({type(error).__name__}); the server's terminal has more."))
        finally:
            self._going.pop(job, None)
