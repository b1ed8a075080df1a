"""What the processes of a run tell one another: where they are, and what is left to do.

It goes through the key-value store of JAX's coordination service, which process 0 keeps; no device takes part in it.
"""

import collections
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from saejax.errors import Interrupted, OtherEnded

_LOOK_EVERY, _BEAT_EVERY, _SAY_EVERY = 0.1, 5.0, 300.0  # seconds
T = TypeVar("T")


class Peers:
    """The processes of a run, as one of them sees them.

    Args:
      client: of the coordination service: sets, lists and counts keys.
      own: number of this process.
      count: how many there are.
      patience: seconds after which a process that others wait for, and that ends no step, counts as stuck; 0: never.
      say: prints a line.

    Attributes:
      stopping: whether this process was asked to stop; it then no longer waits.
      ended: whether another process is known to have ended before its work was done; this one then no longer waits.
    """

    def __init__(
        self, client: Any, own: int, count: int, patience: float = 0.0, say: Callable[[str], None] = lambda line: None
    ):
        self.own, self.count = own, count
        self._client, self._patience, self._say = client, patience, say
        self._places: collections.Counter[str] = collections.Counter()
        self.stopping: Callable[[], bool] = lambda: False
        self.ended: Callable[[], bool] = lambda: False
        self._steps, self._told = 0, -_BEAT_EVERY

    def step(self) -> None:
        """Called where this process gets on, so that others see that it does."""
        self._steps += 1
        if time.monotonic() - self._told >= _BEAT_EVERY:
            self._told = time.monotonic()
            self._client.key_value_set(f"beat/{self.own}", str(self._steps), allow_overwrite=True)

    def take(self, place: str, items: Sequence[T]) -> Iterator[T]:
        """Those of the items that no other process takes: whoever is free takes the next one."""
        while (number := self._client.key_value_increment(f"next/{place}", 1) - 1) < len(items):
            yield items[number]

    def tell(self, place: str, value: str) -> str:
        """What process 0 says, in every process; all of them call it equally often."""
        key = self._key("said", place)
        if self.own == 0:
            self._client.key_value_set(f"{key}/0", value)
        self._wait(place, key, [0])
        return dict(self._client.key_value_dir_get(f"{key}/"))[f"{key}/0"]

    def meet(self, place: str, processes: Sequence[int] | None = None) -> None:
        """Waits until processes (None: all) have come to a place; they come there equally often.

        Raises:
          Interrupted: one of them is stuck, or this one was asked to stop.
          OtherEnded: a process has ended before its work was done.
        """
        key = self._key("at", place)
        self._client.key_value_set(f"{key}/{self.own}", "")
        self._wait(place, key, range(self.count) if processes is None else processes)

    def _key(self, what: str, place: str) -> str:
        self._places[what + place] += 1
        return f"{what}/{place}/{self._places[what + place]}"

    def _wait(self, place: str, key: str, processes: Sequence[int]) -> None:
        said = start = time.monotonic()
        seen: dict[int, tuple[str, float]] = {}  # of those that are late, the last sign of life, and when it changed
        while late := self._late(key, processes):
            self.step()
            if self.stopping():
                raise Interrupted(f"stopped where it waited for others ({place}); what is finished is kept")
            if self.ended():
                raise OtherEnded(f"another process has ended ({place})")
            now, beats = time.monotonic(), dict(self._client.key_value_dir_get("beat/"))
            for process in late:
                beat = beats.get(f"beat/{process}", "")
                if seen.setdefault(process, (beat, now))[0] != beat:
                    seen[process] = (beat, now)
                if self._patience and now - seen[process][1] > self._patience + _BEAT_EVERY:
                    raise Interrupted(
                        f"process {process} has ended no step in {self._patience:.0f} s, and this one waits for it "
                        f"({place}): its output has its stacks; what is finished is kept"
                    )
            if now - said > _SAY_EVERY:
                self._say(f"{place}: waiting for {', '.join(map(str, late))}, {now - start:.0f} s")
                said = now
            time.sleep(_LOOK_EVERY)

    def _late(self, key: str, processes: Sequence[int]) -> list[int]:
        there = {name.rpartition("/")[2] for name, _ in self._client.key_value_dir_get(f"{key}/")}
        return [process for process in processes if str(process) not in there]
