"""Traces of a few steady steps of each unit, for ``--profile=DIR``."""

from collections.abc import Callable
from pathlib import Path

_FIRST, _LAST = 5, 9  # steps between which is traced: the first ones compile


class Profiler:
    """A test whether to stop that also counts steps, because stages ask it once a step, batch or item.

    Args:
      folder: folder of the trace, which TensorBoard's and XProf's pages read.
      stopping: whether the process was asked to stop.
      say: prints a line.
    """

    def __init__(self, folder: Path, stopping: Callable[[], bool], say: Callable[[str], None]):
        self._folder, self._stopping, self._say, self._steps, self._running = folder, stopping, say, 0, False

    def __call__(self) -> bool:
        """Return whether to stop; start and end the trace at its steps."""
        self._steps += 1
        if self._steps == _FIRST:
            import jax

            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif self._steps == _LAST:
            self.close()
        return self._stopping()

    def close(self) -> None:
        """End a trace that is running; say where it is, or that there were too few steps for one."""
        if self._running:
            import jax

            jax.profiler.stop_trace()
            self._running = False
            self._say(f"profile of steps {_FIRST} to {min(self._steps, _LAST) - 1} in {self._folder}")
        elif self._steps < _FIRST:
            self._say(f"no profile: {self._steps} steps, at least {_FIRST} are needed")
