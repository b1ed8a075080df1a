"""A parent for each process of a run, which ends it when another one has ended, and says which.

A process that waits for another one in a collective cannot look after it, and JAX aborts it, without saying in its exit
status why, a minute after the other is gone; before all have joined it waits for minutes. So the work is done in a
child. The parents have a folder in the workdir, in which each writes how its own child ended.
"""

import contextlib
import ctypes
import dataclasses
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from saejax.errors import Interrupted

FOLDER = ".processes"  # of a workdir
COME = 300  # seconds that processes wait for one another at the start
LOST = 75  # exit status of a child whose connection to another process broke
_LOOK_EVERY, _GRACE, _ABORTED = 0.5, 20.0, 25.0  # seconds: to save what there is; until others have said how they ended
_VISIBLE = 120.0  # seconds within which a file is seen on all hosts that share its folder
_SAVED = 128 + signal.SIGTERM
_COME = "come"  # a folder of FOLDER, for those that have not joined yet
_STOP, _STOPS = "stop", (signal.SIGTERM, signal.SIGINT)
_FOLLOWS = (-signal.SIGABRT, LOST)  # ends that mostly follow from that of another process
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl
_joined: list[int] = []  # the end of a pipe by which a child says where it belongs


@dataclasses.dataclass(frozen=True)
class ProcessPlace:
    """Where a process belongs."""

    folder: Path  #: in which parents leave word
    own: int
    count: int

    def say(self, word: str) -> None:
        """Leaves word: "stop", or an exit status, of a signal below 0."""
        with contextlib.suppress(OSError):  # the first process may be gone, and the folder with it
            (self.folder / f"{self.own}-{word}").touch()

    def other_ended(self) -> bool:
        """Whether another process left word of how it ended."""
        with contextlib.suppress(OSError):  # the first process may be gone, and the folder with it
            return any(word != _STOP for words in self.others().values() for word in words)
        return False

    def others(self) -> dict[int, set[str]]:
        """The words of other processes."""
        found: dict[int, set[str]] = {}
        for name in os.listdir(self.folder) if self.folder.is_dir() else ():
            process, dash, word = name.partition("-")
            if dash and int(process) != self.own:
                found.setdefault(int(process), set()).add(word)
        return found


def guarded(work: Callable[[], int], workdir: Path, count: int, own: int | None = None) -> int:
    """Runs one process's work in a child, and gives its exit status, or the one that others' ends ask for.

    It is 143 where the same command is to be run again: the run was stopped, or a process died. It is 1 or 2 where one
    process met a bug or bad input.

    Args:
      work: joins the other processes, says so by ``joined``, and returns an exit status.
      workdir: of the run.
      count: how many processes there are, as far as flags tell.
      own: which one this is; None where only the cluster knows, which then has to end the others until all have joined.
    """
    asked: list[int] = []
    place = None if own is None else come(workdir, own, count)
    for number in _STOPS:
        signal.signal(number, lambda number, frame: asked.append(number))
    sys.stdout.flush()
    read, write = os.pipe()
    parent, child = os.getpid(), os.fork()
    if not child:
        for number in _STOPS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        os.close(read)
        end_with_parent(parent)
        _joined[:] = [write]
        status = 1
        try:
            status = work()
        except Exception:  # Python would print it only after the end below
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            if status not in (0, _SAVED):  # or it would wait at its end for others, who wait for it
                os._exit(status)
        return status
    os.close(write)
    found = _Parent(child, read, asked, place)
    status = found.watch()
    if status == 128 + signal.SIGABRT and not found.knows_others:
        print("error:", not_come(workdir, count), file=sys.stderr)
        return _SAVED
    return status


def seen(files: Sequence[Path]) -> None:
    """Waits until files that another host wrote are seen on this one.

    Raises:
      Interrupted: one is not.
    """
    until = time.monotonic() + _VISIBLE
    while missing := [path for path in files if not path.exists()]:
        if time.monotonic() > until:
            raise Interrupted(f"{missing[0]} is not seen here, though another process wrote it: is the workdir shared?")
        time.sleep(_LOOK_EVERY)


def come(workdir: Path, own: int, count: int) -> ProcessPlace:
    """Leaves word that a process is about to join the others; the place in which these tell how they end until then."""
    place = ProcessPlace(workdir / FOLDER / _COME, own, count)
    with contextlib.suppress(OSError):  # a workdir that cannot be written is refused by the work
        place.folder.mkdir(parents=True, exist_ok=True)
        for word in place.folder.glob("*-*"):  # of an earlier start
            word.unlink(missing_ok=True)
        (place.folder / str(own)).touch()
    return place


def not_come(workdir: Path, count: int) -> str:
    """Says which processes did not come in time."""
    paths = {number: workdir / FOLDER / _COME / str(number) for number in range(count)}
    late = [number for number, path in paths.items() if not path.exists() or _age(path) > 2 * COME]
    names = ", ".join(map(str, late)) or "some"
    of = f"{count} processes" if count else "the processes"
    return f"of {of} {names} did not come within {COME} s: start all with the same --mesh.coordinator"


def _age(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def joined(workdir: Path, mark: str, own: int, count: int) -> ProcessPlace:
    """Tells a child's parent where the child belongs.

    Args:
      workdir: of the run.
      mark: that no other run has.
      own, count: the process's number, and how many there are.
    """
    place = ProcessPlace(workdir / FOLDER / mark, own, count)
    if own == 0:
        shutil.rmtree(workdir / FOLDER, ignore_errors=True)
        place.folder.mkdir(parents=True)
    for pipe in _joined:
        os.write(pipe, f"{place.folder}\n{own}\n{count}\n".encode())
        os.close(pipe)
    _joined.clear()
    return place


class _Parent:
    """What a parent knows of its child, and of the other processes.

    Args:
      child: its process.
      pipe: on which it says where it belongs.
      asked: the signals that came so far.
      place: where it belongs until then, if that is known.

    Attributes:
      knows_others: whether the child has joined the other processes.
    """

    def __init__(self, child: int, pipe: int, asked: list[int], place: ProcessPlace | None):
        self._child, self._pipe, self._asked, self._place = child, pipe, asked, place
        self.knows_others = False
        os.set_blocking(pipe, False)

    def watch(self) -> int:
        """Waits until the child has ended, or ends it; gives the exit status."""
        told, until = "", float("inf")
        while (own := self._ended()) is None:
            why = _STOP if self._asked else self._why()
            if why and not told:
                told = why
                os.kill(self._child, signal.SIGTERM)
                if self._asked and self._place:
                    self._place.say(_STOP)
                if why != _STOP:
                    until = time.monotonic() + _GRACE
            if self._place and time.monotonic() > until:
                until = float("inf")
                os.kill(self._child, signal.SIGKILL)
                who = label(self._place.own, self._place.count)
                print(f"{who}did not end within {_GRACE:.0f} s of being asked to, and was killed", file=sys.stderr)
            time.sleep(_LOOK_EVERY)
        return self._status(own, told)

    def _ended(self) -> int | None:
        """The child's exit status, of a signal below 0; None while it runs."""
        if not self.knows_others:
            with contextlib.suppress(BlockingIOError):
                folder, *numbers = os.read(self._pipe, 65536).decode().splitlines() or [""]
                if folder:
                    self._place, self.knows_others = ProcessPlace(Path(folder), *map(int, numbers)), True
        process, status = os.waitpid(self._child, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if process else None

    def _why(self) -> str:
        """Why the child is to end: "stop", or the process that ended and how; "" if it is not."""
        found = self._place.others() if self._place else {}
        if any(_STOP in words for words in found.values()):
            return _STOP
        ends = [(int(word) in _FOLLOWS, process, word) for process, words in found.items() for word in words]
        return f"{min(ends)[1]} {min(ends)[2]}" if ends else ""

    def _status(self, own: int, told: str) -> int:
        """What this process ends with, given how its child did, and what it had been told."""
        place = self._place
        if place is None or not own or told == _STOP or (own == _SAVED and not told):
            if place and place.own == 0 and not own:
                shutil.rmtree(place.folder.parent, ignore_errors=True)
            return _SAVED if told == _STOP and own < 0 else own % 256 if own >= 0 else 128 - own
        if not told and (self.knows_others or own != -signal.SIGABRT):  # or JAX gave up waiting for them
            place.say(str(own))
            told = self._explained(place, own) if own in _FOLLOWS else ""
        elif told:
            place.say(str(LOST))
        if not told:
            return own if own > 0 else 128 - own
        process, _, word = told.partition(" ")
        status = int(word) if word in ("1", "2") else _SAVED
        print(f"{label(place.own, place.count)}process {process} {_how(word)}, so this one ends", file=sys.stderr)
        return status

    def _explained(self, place: ProcessPlace, own: int) -> str:
        """Which other process the end of this one follows from, and how that one ended; "" if it is its own fault."""
        until = time.monotonic() + _ABORTED
        while time.monotonic() < until:
            if (why := self._why()) and why != _STOP and int(why.split()[1]) not in _FOLLOWS:
                return why
            time.sleep(_LOOK_EVERY)
        words = place.others()
        if silent := {*range(place.count)} - {place.own, *words}:
            return f"{min(silent)} "
        crashed = own == -signal.SIGABRT and set().union(*words.values()) <= {str(LOST)}
        return "" if crashed else why


def _how(word: str) -> str:
    """What an exit status says, in words."""
    if not word:
        return "is gone without a word"
    told = {"1": "failed", "2": "was given bad input", str(LOST): "lost its connection to others"}
    return told.get(word, f"was ended by signal {-int(word)}")


def label(own: int, count: int) -> str:
    """What stands before the lines of a process."""
    return f"process {own} of {count}: "


def end_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Has Linux send this process a signal when its parent is gone, however that ended.

    Args:
      parent: its process, which may be gone already.
      number: of the signal.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)
