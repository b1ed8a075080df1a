"""The folder of one run: units of work that are addressed by their content, appear whole and are never overwritten.

A *unit* is one finished piece of work, such as ``train/topk``. It is made in ``DIR/train/topk-<hash>/``, where the hash
covers everything that its result depends on (``workplan``), so other settings make another folder and setting a flag
back finds the earlier one. ``DIR/train/topk`` is a symbolic link to the current one; where a file system has no links,
``DIR/train/topk.current`` is a text file with the folder's name.

A unit may be a *stack* of members that are units themselves. Then its folder holds links to theirs: ``train/topk/k16``
is ``train/topk-<hash of k16>/``, which other stacks with such a member link to as well.

These files of a unit are ours, the rest is its stage's:

  started.json  settings, inputs and versions, written when the work begins
  claim.json    the process that is working on it; it goes when the process stops
  done.json     the summary, written last: a unit is finished when it exists
  stack.json    of a stack: its members' folders, and which of them are made together here
"""

import contextlib
import dataclasses
import datetime
import json
import os
import shutil
import socket
import time
import types
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from saejax.config import Configs
from saejax.errors import UserError
from saejax.files import (
    is_locked,
    locked_text,
    read_object,
    refuse_patterns,
    remove_unfinished,
    unfinished_path,
    write_json,
)
from saejax.links import STAND_IN, linked_folder, write_link
from saejax.loaded_units import STACK
from saejax.parallel.processes import ProcessShare
from saejax.results import to_json

T = TypeVar("T")
SCHEMA_VERSION = 1
_SAY_EVERY = 60.0  # seconds between lines that say how long a unit's items still take
SUMMARY, STARTED, CLAIM = "done.json", "started.json", "claim.json"
# Folders that users may delete when a unit is finished: checkpoints to resume from, and dictionaries saved on the way.
CHECKPOINTS, STEPS = "checkpoints", "steps"


class Workspace:
    """The folder of one run.

    Args:
      root: the folder, made if it does not exist.
      read_only: whether it is only looked at, and not made.

    Raises:
      UserError: it cannot be made or written to.
    """

    REMOVED = "removed.json"  # marks a finished unit whose files were removed, because nobody reads them any more
    LEFT = frozenset({STARTED, SUMMARY, CLAIM, REMOVED})  # the files that such a unit has

    def __init__(self, root: str | os.PathLike, read_only: bool = False):
        self.root = Path(root)
        if "://" in str(root):
            raise UserError(
                f"--workdir={root} is an address: expected a folder; mount the bucket (gcsfuse, s3fs) and name the "
                "folder that it is mounted at"
            )
        if read_only:
            return
        refuse_patterns(self.root)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            # Permission bits do not tell: the folder may be on a full or read-only disk.
            probe = self.root / f".writable-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"--workdir={self.root} cannot be written to ({error.strerror}): name a writable folder"
            ) from None

    def folder(self, unit: str, mark: str) -> Path:
        """Return the folder of a unit, such as "train/topk", with a fingerprint."""
        return self.root / f"{unit}-{mark}"

    def current(self, unit: str) -> Path | None:
        """Return the folder that ``DIR/<unit>`` stands for; None if there is none."""
        return linked_folder(self.root / unit)

    def is_done(self, unit: str, mark: str) -> bool:
        """Return whether the unit is finished.

        Raises:
          UserError: it is, but a file that its summary lists is missing or has another size.
        """
        folder = self.folder(unit, mark)
        if not (folder / SUMMARY).exists() or self.is_removed(unit, mark):
            return False
        for file, size in read_object(folder / SUMMARY, "files")["files"].items():
            path = folder / file
            if not path.exists() or path.stat().st_size != size:
                raise UserError(
                    f"{path} is missing or not {size} bytes, though {folder / SUMMARY} says it is done: "
                    f"delete {folder} to make it again"
                )
        return True

    def is_removed(self, unit: str, mark: str) -> bool:
        """Return whether the unit was finished, and its files were removed since."""
        return (self.folder(unit, mark) / self.REMOVED).exists()

    def remove_files(self, unit: str, mark: str) -> None:
        """Remove the files of a finished unit, but what says that and how it was made; ``begin`` makes them anew."""
        folder = self.folder(unit, mark)
        write_json(folder / self.REMOVED, dict(removed=now()))
        for path in folder.iterdir():
            if path.name not in self.LEFT:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    @contextlib.contextmanager
    def claim(self, unit: str, mark: str, take_over: bool = False) -> Iterator[Path]:
        """Hold the unit's folder, which is made if need be, while this process works on it.

        A claim whose process on this machine has ended, or that an earlier start of the same batch job left on any, is
        replaced.

        Args:
          unit: such as "train/topk".
          mark: its fingerprint.
          take_over: replace the claim of any other process.

        Yields:
          The folder.

        Raises:
          UserError: another process is working on it, or a file of somebody else is in the way.
        """
        folder = self.folder(unit, mark)
        self._check_place(unit)
        if folder.is_symlink() and not folder.exists():  # a store, perhaps, that was moved to another disk
            raise UserError(
                f"{folder} leads to {os.readlink(folder)}, which is not there: mount its disk, or delete it"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with hold_claim(folder, unit, take_over):
            yield folder

    def is_claimed(self, unit: str, mark: str, take_over: bool = False) -> bool:
        """Return whether another process works on the unit.

        Args:
          unit: such as "train/topk".
          mark: its fingerprint.
          take_over: do not count a process of another host, which may be gone.
        """
        path, this = self.folder(unit, mark) / CLAIM, _Claimant.this()
        holder = _Claimant.read(path)
        return holder is not None and not holder.is_gone(this, path) and not (take_over and holder.host != this.host)

    def _check_place(self, unit: str) -> None:
        place = self.root / unit
        if not place.is_dir() or place.is_symlink():
            return
        if (place / STARTED).exists():
            raise UserError(
                f"{place} is a folder where saejax keeps a link: if it came from copying a workdir, delete it and copy "
                "with links (cp -a, rsync -a); if it is from an earlier version, use another --workdir"
            )
        # The folders in it belong to units, such as train/topk-<hash> in train.
        if any(path.is_file() for path in place.iterdir()):
            raise UserError(
                f"{place} is a folder with files that this version of saejax did not write: move it away, or use "
                "another --workdir"
            )

    def begin(
        self, unit: str, mark: str, about: Mapping[str, Any] = types.MappingProxyType({}), current: bool = True
    ) -> bool:
        """Prepare a claimed folder for work; files that a killed process left half-written are removed.

        Args:
          unit: such as "train/topk".
          mark: its fingerprint.
          about: what else ``started.json`` says where the work is new.
          current: whether ``DIR/<unit>`` shall stand for it if it stands for none; not for a member of a stack.

        Returns:
          Whether the work was begun before and goes on.
        """
        folder = self.folder(unit, mark)
        remove_unfinished(folder)
        if self.is_removed(unit, mark):
            (folder / SUMMARY).unlink(missing_ok=True)
            (folder / self.REMOVED).unlink()
        resumed = (folder / STARTED).exists()
        if not resumed:
            write_json(folder / STARTED, dict(fingerprint=mark, **about))
        if current and self.current(unit) is None:
            self.point(unit, mark)
        return resumed

    def discard_if_empty(self, unit: str, mark: str) -> None:
        """Remove a claimed folder in which nothing was made, and the link to it."""
        files = [path for path in self.folder(unit, mark).rglob("*") if path.is_file()]
        if all(path.name in (STARTED, CLAIM, STACK) for path in files):
            self.discard(unit, mark)

    def discard(self, unit: str, mark: str) -> None:
        """Remove the folder of a unit that is not finished, and the link to it."""
        folder = self.folder(unit, mark)
        if self.current(unit) == folder:
            for path in (self.root / unit, (self.root / unit).with_name((self.root / unit).name + STAND_IN)):
                if path.is_symlink() or path.is_file():
                    path.unlink()
        shutil.rmtree(folder, ignore_errors=True)

    def finish(self, unit: str, mark: str, summary: Mapping[str, Any], current: bool = True) -> None:
        """Write the unit's ``done.json``, last. Checkpoints and what was saved midway are not among its files.

        Args:
          unit: such as "train/topk".
          mark: its fingerprint.
          summary: what ``done.json`` says.
          current: whether ``DIR/<unit>`` shall stand for it from now on; not for a member of a stack.
        """
        folder = self.folder(unit, mark)
        files = {
            str(path.relative_to(folder)): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
            and path.name not in (STARTED, SUMMARY, CLAIM, STACK)
            and not {CHECKPOINTS, STEPS} & {*path.relative_to(folder).parts}
        }
        stage, _, name = unit.partition("/")
        about = dict(schema_version=SCHEMA_VERSION, stage=stage, name=name, fingerprint=mark)
        write_json(folder / SUMMARY, about | dict(summary) | dict(files=files))
        if current:
            self.point(unit, mark)

    def point(self, unit: str, mark: str) -> None:
        """Let ``DIR/<unit>`` stand for the folder with this fingerprint."""
        if self.current(unit) != self.folder(unit, mark):
            write_link(self.root / unit, self.folder(unit, mark).name)

    def log(self, unit: str, text: str, rank: int = 0) -> None:
        """Append a line to ``DIR/logs/<stage>-<name>.log``; a log that cannot be written stops no run.

        Args:
          unit: such as "train/topk".
          text: the line, before which the time is written.
          rank: number of the process; others than the first have files of their own.
        """
        path = self.root / "logs" / (unit.replace("/", "-") + (f".{rank}" if rank else "") + ".log")
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{now()} {text}\n")


@contextlib.contextmanager
def hold_claim(folder: Path, what: str, take_over: bool = False) -> Iterator[None]:
    """Hold a folder by creating its ``claim.json`` exclusively; see ``Workspace.claim``.

    Args:
      folder: an existing folder.
      what: name of what is made there, for the message.
      take_over: replace the claim of any other process.

    Raises:
      UserError: another process holds it.
    """
    path, claimant = folder / CLAIM, _Claimant.this()
    with contextlib.ExitStack() as lock:
        while not _create(path, json.dumps(dataclasses.asdict(claimant)), lock):
            holder = _Claimant.read(path)
            if holder is None:
                continue  # it went meanwhile
            if not take_over and not holder.is_gone(claimant, path):
                raise UserError(
                    f"{what} is being made by process {holder.process} on {holder.host} since {holder.time}: wait for "
                    "it, or, if you know that it is gone, add --take_over"
                )
            with contextlib.suppress(FileNotFoundError):  # of several that find it gone, one moves it away
                aside = unfinished_path(path)
                os.rename(path, aside)
                if _Claimant.read(aside) != holder:  # another process has replaced it meanwhile: restore that claim
                    os.rename(aside, path)
                else:
                    aside.unlink()
        try:
            yield
        finally:
            if _Claimant.read(path) == claimant:  # otherwise another process has taken it over
                path.unlink(missing_ok=True)


def current_units(root: Path) -> dict[str, Path]:
    """Return the folders of the current units in a workdir, by name, or in a study's folder, by row and name."""
    units = {}
    for folder, folders, files in os.walk(root):
        stand_ins = [file.removesuffix(STAND_IN) for file in files if file.endswith(STAND_IN)]
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        folders[:] = sorted(name for name in folders if name not in links and not name.startswith("."))
        if STARTED in files:  # inside of a unit there are no others
            folders.clear()
            continue
        for name in sorted([*links, *stand_ins]):
            target = linked_folder(Path(folder) / name)
            if target and (target / STARTED).exists():
                units[(Path(folder) / name).relative_to(root).as_posix()] = target
    return units


@dataclasses.dataclass(frozen=True)
class _Claimant:
    """A process that works on a unit."""

    host: str
    process: int
    key: str  #: drawn at random: containers may have the same host, process number and time
    job: str  #: of the batch system, with the number of its restarts; "" outside of one
    time: str  #: when it claimed the unit, ISO 8601

    @classmethod
    def this(cls) -> "_Claimant":
        job = os.environ.get("SLURM_JOB_ID", "")
        job = f"{job} restart {os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else ""
        return cls(socket.gethostname(), os.getpid(), uuid.uuid4().hex, job, now())

    @classmethod
    def read(cls, path: Path) -> "_Claimant | None":
        """Return what a file says; None if it is gone."""
        # A full disk may have cut it off, or another process be writing it where there are no hard links.
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            try:
                claimant = cls(**json.loads(path.read_text("utf-8")))
                int(claimant.job.partition(" restart ")[2] or 0)  # a number, or the claim is damaged
                return claimant
            except FileNotFoundError:
                if not path.is_symlink():  # a link that leads nowhere is in the claim's place
                    return None
        return cls("an unknown host", 0, "", "", "an unknown time")

    def is_gone(self, observer: "_Claimant", path: Path) -> bool:
        """Return whether this process, whose claim is the file ``path``, has ended, as far as another one can tell."""
        # A job that was requeued has ended before. One allocation may hold several runs, on hosts of its own each.
        (job, _, before), (job_now, _, restarts) = self.job.partition(" restart "), observer.job.partition(" restart ")
        if job and job == job_now and int(before or 0) < int(restarts or 0):
            return True
        # Its number says nothing: containers of one host do not see each other's processes, and numbers come again.
        return self.host == observer.host and not is_locked(path)


def _create(path: Path, text: str, lock: contextlib.ExitStack) -> bool:
    """Create a file, locked until ``lock`` ends; return False if it exists already."""
    temporary = unfinished_path(path)
    try:
        lock.enter_context(locked_text(temporary, text))
        try:
            os.link(temporary, path)  # whole at once
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                lock.enter_context(locked_text(path, text))
            except FileExistsError:
                return False
        return True
    finally:
        temporary.unlink(missing_ok=True)


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Stack:
    """The members of a unit that is a stack, each a unit of its own, as a run finds, makes and finishes them.

    Args:
      workspace: the folder of the run.
      unit: such as "train/topk".
      mark: its fingerprint.
      marks: the fingerprints of its members, by name.
      describe: returns what a member's summary says besides times and results, given its name; None in a process that
        writes no summaries.
    """

    def __init__(
        self,
        workspace: Workspace,
        unit: str,
        mark: str,
        marks: Mapping[str, str],
        describe: Callable[[str], Mapping[str, Any]] | None = None,
    ):
        self.marks = marks
        self.folders = {member: workspace.folder(unit, fingerprint) for member, fingerprint in marks.items()}
        self.together: Sequence[str] = ()  # names of members that are computed in one program
        self.missing: Sequence[str] = ()  # names of the members that are not finished
        self._workspace, self._unit, self._folder = workspace, unit, workspace.folder(unit, mark)
        self._describe = describe
        self._start, self._clock = now(), time.monotonic()
        self._seconds: list[float] = []  # of the members that are finished

    def find_missing(self) -> None:
        """Find the members that are to be made, and record them in the claimed folder of the stack.

        Members that are not finished are made together. A killed run goes on with the members that it began with, even
        if some of them are finished: the bits of a member may depend on which others are in the program.
        """
        missing = tuple(name for name, mark in self.marks.items() if not self._workspace.is_done(self._unit, mark))
        path = self._folder / STACK
        together = tuple(read_object(path, "together")["together"]) if path.exists() else ()
        if not {*missing} <= {*together}:
            for file in self._folder.iterdir():  # work on other members
                if file.name not in (STARTED, CLAIM):
                    shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
            together = missing
        self.together, self.missing = together if missing else (), missing
        names = {member: folder.name for member, folder in self.folders.items()}
        write_json(path, dict(members=names, together=self.together))

    def finish(self, member: str, results: Any) -> None:
        """Write the summary of a member whose files are written; it and the members left share the time so far."""
        if self._describe is None or member not in self.missing:
            return
        left = len(self.missing) - len(self._seconds)
        seconds = (time.monotonic() - self._clock - sum(self._seconds)) / left
        self._seconds.append(seconds)
        summary = {**self._describe(member), "start": self._start, "seconds": round(seconds, 2)}
        self._workspace.finish(self._unit, self.marks[member], summary | dict(results=to_json(results)), current=False)

    def link(self) -> None:
        """Link the finished members from the folder of the stack."""
        for member, folder in self.folders.items():
            write_link(self._folder / member, f"../{folder.name}")


@dataclasses.dataclass(frozen=True)
class Run:
    """The context in which a stage runs."""

    stage: str  #: its name
    name: str  #: the unit's name where a stage has several, such as "topk"; otherwise ""
    folder: Path  #: where it writes; holds what an interrupted run of the same work left there
    configs: Configs  #: the groups of configuration by name
    inputs: Mapping[str, Path]  #: the folders of the finished units it reads, by "stage" or "stage/name"
    say: Callable[[str], None] = print  #: prints one line of progress
    #: whether the process was asked to stop; the stage then saves and raises ``Interrupted``.
    stopping: Callable[[], bool] = lambda: False
    share: ProcessShare = dataclasses.field(default_factory=ProcessShare)  #: the processes among which items are split
    #: the members of a unit that is a stack; None for any other unit, whose parts are folders in its own.
    stack: Stack | None = None

    def member_folder(self, name: str) -> Path:
        """Return the folder in which a member's files are; the unit's own for the one member ""."""
        return self.stack.folders[name] if self.stack else self.folder / name

    def make_each(
        self, items: Sequence[T], file: Callable[[T], Path], make: Callable[[T], None], last: bool = True
    ) -> None:
        """Make every item whose file is not there; of several processes each makes a fixed part.

        Args:
          items: in an order that is the same in all processes.
          file: returns the file of an item, which is written last and atomically.
          make: makes an item and its file.
          last: whether the first process alone continues after this; the others leave the stage here.
        """
        left = [item for item in self.share.of(items) if not file(item).exists()]
        start = last_line = time.monotonic()
        for number, item in enumerate(left):
            make(item)
            if (moment := time.monotonic()) - last_line > _SAY_EVERY and number + 1 < len(left):
                last_line, minutes = moment, (moment - start) / (number + 1) * (len(left) - number - 1) / 60
                self.say(f"{number + 1} of {len(left)} items, about {minutes:.0f} minutes to go")
        self.share.join([file(item) for item in items], last)
