"""Who works in a bucket: an object that is written only where it is still as it was read.

A bucket frees nothing when a process dies. So whoever holds it writes the object again every half minute; one that
stands still was left by a dead run.
"""

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

from saejax.buckets.bucket import Bucket, ObjectChanged, Stored
from saejax.errors import UserError

LOCK = ".lock"
_BEAT, _DEAD = 30.0, 150.0  # seconds between signs of life; without one
_LOOK_EVERY = 5.0


@dataclasses.dataclass(frozen=True)
class Holder:
    """What the object says."""

    scratch: str  #: mark of the local folder that the run works in
    name: str  #: in words
    beats: int  #: how often it was written
    free: bool = False  #: whether the run gave it back


class Lease:
    """A bucket that is held.

    Args:
      bucket: the bucket.
      own: what to write.
      stored: as it was written first.
    """

    def __init__(self, bucket: Bucket, own: Holder, stored: Stored):
        self._bucket, self._own, self._stored = bucket, own, stored
        self.taken_by = ""  # who took it, if this run has lost it

    def check(self) -> None:
        """A ``UserError`` if another run has taken the bucket."""
        if self.taken_by:
            raise UserError(
                f"{self._bucket.url} was taken over by {self.taken_by}: what this run did since then stays in its "
                "local folder alone"
            )

    def write(self, free: bool = False) -> None:
        """Writes the object again, as a sign of life or to give the bucket back, unless another run has taken it."""
        if self.taken_by:
            return
        self._own = dataclasses.replace(self._own, beats=self._own.beats + 1, free=free)
        try:
            self._stored = _written(self._bucket, self._own, self._stored)
        except ObjectChanged:
            found = self._bucket.read(LOCK)
            self.taken_by = _holder(found).name if found else "someone who deleted its lock"


@contextlib.contextmanager
def held(bucket: Bucket, scratch: str, wait: bool, say: Callable[[str], None]) -> Iterator[Lease]:
    """Holds a bucket.

    Args:
      bucket: the bucket.
      scratch: mark of the local folder, which this process has locked: a lock with this mark was left by a dead run.
      wait: whether one of another folder is to be broken, once it gives no sign of life.
      say: prints a line.

    Raises:
      UserError: another run holds it.
    """
    own = Holder(scratch, f"process {os.getpid()} on {socket.gethostname()}", 0)
    found = bucket.read(LOCK)
    try:
        if found and not _may_take(found, scratch):
            holder, ago = _holder(found).name, f"{found.age:.0f} s"
            if not wait:
                raise UserError(
                    f"{bucket.url} is in use by {holder}, whose last sign of life was {ago} ago: wait for it, or use "
                    f"another --workdir; where it is dead, --break_lock goes on in its place"
                )
            say(f"{bucket.url} is in use by {holder}, whose last sign of life was {ago} ago: waiting for another")
            found = _still(bucket, found)
            say(f"no sign of life of {holder} in {_DEAD:.0f} s: going on in its place")
        lease = Lease(bucket, own, _written(bucket, own, found))
    except ObjectChanged:
        raise UserError(f"{bucket.url} is in use: another run came first, or goes on") from None
    try:
        with every(_BEAT, lease.write, say):
            yield lease
    except BaseException:
        with contextlib.suppress(UserError):  # what went wrong first is what is said
            lease.write(free=True)
        raise
    lease.write(free=True)


def _written(bucket: Bucket, holder: Holder, before: Stored | None) -> Stored:
    """The lock, written in place of what it was before.

    Raises:
      ObjectChanged: it was not that any more.
    """
    content = json.dumps(dataclasses.asdict(holder)).encode()
    try:
        return bucket.replace(LOCK, content, before)
    except ObjectChanged:
        found = bucket.read(LOCK)
        if found and found.content == content:  # written, and the answer was lost on the way
            return found
        raise


def _still(bucket: Bucket, found: Stored) -> Stored:
    """The same lock, when it has stood still for long enough.

    Raises:
      ObjectChanged: it has not.
    """
    until = time.monotonic() + _DEAD
    while time.monotonic() < until:
        time.sleep(_LOOK_EVERY)
        now = bucket.read(LOCK)
        if now is None or now.version != found.version:
            raise ObjectChanged(LOCK)
    return found


def _may_take(found: Stored, scratch: str) -> bool:
    holder = _holder(found)
    return holder.free or holder.scratch == scratch


def _holder(found: Stored) -> Holder:
    try:
        return Holder(**json.loads(found.content))
    except (ValueError, TypeError):
        return Holder("", "something that is no run of saejax", 0)


@contextlib.contextmanager
def every(seconds: float, work: Callable[[], object], say: Callable[[str], None]) -> Iterator[None]:
    """Does some work again and again while the block runs; says when it cannot, and tries the next time."""
    ended = threading.Event()

    def run() -> None:
        said = ""
        while not ended.wait(seconds):
            try:
                work()
                said = ""
            except UserError as error:
                if said != type(error).__name__ + str(error)[:100]:
                    said = type(error).__name__ + str(error)[:100]
                    say(f"{error}; trying again")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
