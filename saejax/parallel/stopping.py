"""Stopping: every process hears of SIGTERM itself, and processes that work together agree on where they stop.

``jax.distributed.initialize`` would install a handler of SIGTERM of its own, after which Python no longer hears of the
signal: JAX's preemption service is turned off before (``cluster.join``), and the agreement is made here.
"""

import atexit
import contextlib
import threading
import time
from collections.abc import Iterator

from saejax.parallel.processes import Processes

_LOOK_EVERY = 0.1  # seconds
_open_blocks = [0]  # of ``interruptible`` that the main thread is in


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let a signal end a block of the main thread at once: one that reads for long, and has nothing to save."""
    count = threading.current_thread() is threading.main_thread()
    _open_blocks[0] += count
    try:
        yield
    finally:
        _open_blocks[0] -= count


def is_interruptible() -> bool:
    """Return whether the main thread is in a block of ``interruptible``."""
    return _open_blocks[0] > 0


class StopAgreement:
    """Agreement of the processes of a run on the question at which all of them stop.

    Processes that run one program together have to stop at the same step, or some would wait for others that have
    left. Each counts how often it has asked whether to stop. When one of them was told to stop, a thread in each
    process says how far its process has come, which meanwhile gets no answer, and all stop at the question after the
    largest number. The main threads may wait for each other's devices all the while.

    Example: processes have asked 7 and 8 times when one hears of SIGTERM. Both stop at their ninth question.

    Args:
      processes: the processes of the run; ``processes.stopping`` says whether this one was told to stop.
    """

    def __init__(self, processes: Processes):
        self._processes, self._lock = processes, threading.Lock()
        self._questions = 0
        self._last_question: int | None = None  # at which all stop, once they have agreed
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="saejax-stop", daemon=True)
        self._thread.start()
        atexit.register(self.end)  # before JAX leaves the coordination service

    def ask(self) -> bool:
        """Return whether to stop; all processes get the same answer to their question of the same number."""
        with self._lock:
            self._questions += 1
            return self._last_question is not None and self._questions >= self._last_question

    def end(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        """Wait until a process is told to stop, then agree on the question."""
        while not self._ended.wait(_LOOK_EVERY):
            with contextlib.suppress(Exception):  # the service may be busy, or gone with process 0
                if self._processes.stopping():
                    self._processes.put("stop/signals", "")
                if self._processes.get("stop/signals"):
                    break
        else:
            return
        with contextlib.suppress(Exception):
            self._agree()

    def _agree(self) -> None:
        with self._lock:
            self._processes.put("stop/questions", str(self._questions))
            while len(questions := self._processes.get("stop/questions")) < self._processes.count:
                if self._ended.is_set() or self._processes.failure():
                    return
                time.sleep(_LOOK_EVERY)
            self._last_question = max(map(int, questions.values())) + 1
