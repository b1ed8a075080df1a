"""The processes of one run as one of them sees them: barriers, broadcasts from the first one, and the split of items.

Everything goes through the key-value store of JAX's coordination service, which process 0 keeps. No device takes part,
so that processes may wait for each other as long as they like, hear of a signal meanwhile, and learn within a second
that another one has failed.
"""

import collections
import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from saejax.errors import Interrupted, OtherFailed, UserError

_LOOK_EVERY, _SAY_EVERY = 0.1, 300.0  # seconds
_LOOK_WORKING = 1.0  # seconds between looks whether others have failed, of a process that does not wait for them
_SAY_MOST = 8  # names in a line about what is missing
_VISIBLE = 120.0  # seconds within which a file is seen on all hosts that share its folder
_LAST = 10.0  # seconds for which process 0, having failed, waits for the others to end
_FAILED = "failed"
T = TypeVar("T")


class Processes:
    """The processes of a run.

    Args:
      client: client of the coordination service: sets and lists keys.
      rank: number of this process.
      count: number of processes.
      say: prints a line.

    Attributes:
      stopping: whether this process was asked to stop; it then no longer waits.
    """

    def __init__(self, client: Any, rank: int, count: int, say: Callable[[str], None] = lambda line: None):
        self.rank, self.count, self._client, self._say = rank, count, client, say
        self._visits: collections.Counter[str] = collections.Counter()
        self._last_look = time.monotonic()
        self.stopping: Callable[[], bool] = lambda: False

    def broadcast(self, place: str, value: str) -> str:
        """Return what process 0 gives, in every process; all of them call it equally often."""
        key = self._key("value", place)
        if self.rank == 0:
            self._client.key_value_set(f"{key}/0", value)
        self.wait(place, lambda: self._late(key, [0]))
        return dict(self._client.key_value_dir_get(f"{key}/"))[f"{key}/0"]

    def barrier(self, place: str) -> None:
        """Wait until all processes have reached a place, which each reaches equally often.

        Raises:
          Interrupted: this one was asked to stop.
          OtherFailed: another one has failed, and will not come.
        """
        key = self._key("at", place)
        self._client.key_value_set(f"{key}/{self.rank}", "")
        self.wait(place, lambda: self._late(key, range(self.count)))

    def tell_failure(self, status: int) -> None:
        """Tell the others that this process ends with an exit status other than 0.

        Process 0 keeps the store, without which JAX aborts the others, whatever status they end with. So it waits some
        seconds for those that end, too; one that still computes does not hear of the failure, and is not waited for.
        """
        with contextlib.suppress(Exception):  # process 0 may be gone, and with it the store
            self.put(_FAILED, str(status))
            until = time.monotonic() + _LAST
            while self.rank == 0 and self._late(_FAILED, range(self.count)) and time.monotonic() < until:
                time.sleep(_LOOK_EVERY)
            if self.rank == 0:
                time.sleep(_LOOK_EVERY)  # between their last word and their end

    def failure(self) -> tuple[int, int] | None:
        """Return the rank and the exit status of another process that has failed; None if none has."""
        failed = {rank: int(status) for rank, status in self.get(_FAILED).items() if rank != self.rank}
        return min(failed.items()) if failed else None

    def should_stop(self) -> bool:
        """Return whether this process, which works and waits for no other, was asked to stop.

        Raises:
          OtherFailed: another one has failed.
        """
        failure = None
        if time.monotonic() - self._last_look > _LOOK_WORKING:
            self._last_look = time.monotonic()
            with contextlib.suppress(Exception):  # the service may be busy: the next look comes soon
                failure = self.failure()
        if failure:
            raise OtherFailed(*failure)
        return self.stopping()

    def put(self, topic: str, value: str) -> None:
        """Give the other processes this one's value of a topic, in place of an earlier one."""
        self._client.key_value_set(f"{topic}/{self.rank}", value, allow_overwrite=True)

    def get(self, topic: str) -> dict[int, str]:
        """Return the values of a topic that processes have put so far, by their ranks."""
        return {int(name.rpartition("/")[2]): value for name, value in self._client.key_value_dir_get(f"{topic}/")}

    def _key(self, what: str, place: str) -> str:
        self._visits[what + place] += 1
        return f"{what}/{place}/{self._visits[what + place]}"

    def wait(self, place: str, missing: Callable[[], Sequence[str]], most: float = math.inf) -> bool:
        """Wait until nothing is missing that other processes make; return False if it is after ``most`` seconds.

        Args:
          place: what is waited for, for messages.
          missing: returns the names of what is missing.
          most: seconds.

        Raises:
          Interrupted: this one was asked to stop.
          OtherFailed: another one has failed, and will not make it.
        """
        last_line = start = time.monotonic()
        while late := missing():
            if self.stopping():
                raise Interrupted(f"stopped while waiting for other processes ({place}); finished work is kept")
            if failure := self.failure():
                raise OtherFailed(*failure)
            now = time.monotonic()
            if now - start > most:
                return False
            if now - last_line > _SAY_EVERY:
                more = f" and {len(late) - _SAY_MOST:,} more" if len(late) > _SAY_MOST else ""
                self._say(f"{place}: waiting for {', '.join(late[:_SAY_MOST])}{more}, {now - start:.0f} s")
                last_line = now
            time.sleep(_LOOK_EVERY)
        return True

    def _late(self, key: str, ranks: Sequence[int]) -> list[str]:
        arrivals = {name.rpartition("/")[2] for name, _ in self._client.key_value_dir_get(f"{key}/")}
        return [f"process {rank}" for rank in ranks if str(rank) not in arrivals]

    def wait_until_visible(self, files: Sequence[Path]) -> None:
        """Wait until files that other hosts wrote are visible here: a shared file system may show them seconds later.

        Raises:
          UserError: a file is still missing after two minutes.
          Interrupted, OtherFailed: see ``wait``.
        """

        def missing() -> list[str]:
            unseen = [path for path in files if not path.exists()]
            for folder in {path.parent for path in unseen}:
                with contextlib.suppress(OSError):
                    os.listdir(folder)  # NFS then looks again
            return [str(path) for path in unseen]

        if not self.wait("files of other processes", missing, _VISIBLE) and (unseen := missing()):
            raise UserError(
                f"{unseen[0]} was written by another process and is not seen here: --workdir has to be one folder "
                "that all hosts share"
            )


class ShareDone(BaseException):
    """End of a stage in a process whose part of the items is done: the first process does the rest."""


@dataclasses.dataclass(frozen=True)
class ProcessShare:
    """This process's part of a unit."""

    processes: Processes | None = None  #: all that work on the unit; None: this one alone

    @property
    def leads(self) -> bool:
        """True if this process does the work that is done only once."""
        return self.processes is None or self.processes.rank == 0

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items that this process works on."""
        return items if self.processes is None else items[self.processes.rank :: self.processes.count]

    def join(self, files: Sequence[Path], last: bool = True) -> None:
        """Wait until all items are done.

        Args:
          files: files of the items, which exist afterwards.
          last: whether the first process alone continues.

        Raises:
          ShareDone: this is not the first one.
        """
        if self.processes is None:
            return
        self.processes.barrier("items are done")
        if last and not self.leads:
            raise ShareDone
        self.processes.wait_until_visible(files)
