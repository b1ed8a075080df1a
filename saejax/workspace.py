"""The folder of one run: units of work that appear whole, are found again, and never overwrite silently.

A *unit* is one output folder, ``DIR/<stage>/`` or ``DIR/<stage>/<name>/``. Its ``started.json`` says
which work is being done there, its ``summary.json``, written last, that it is done. Both carry the
unit's *fingerprint*: a hash of everything its result depends on. A unit whose fingerprint has changed is
moved to ``DIR/superseded/``, never deleted.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from saejax.buckets.bucket import Bucket, is_bucket
from saejax.buckets.mirror import CHECKPOINTS, Mirror, mirrored, scratch_folder
from saejax.config import Configs
from saejax.errors import UserError
from saejax.files import locked, read_object, remove_unfinished, write_json
from saejax.parallel.teams import Team

T = TypeVar("T")
SCHEMA_VERSION = 1
SUMMARY, STARTED = "summary.json", "started.json"
_PACKAGES = ("saejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "torch", "numpy")


def fingerprint(data: Any) -> str:
    """A hash, 16 hexadecimal digits, of JSON data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


class Workspace:
    """The folder of one run.

    Args:
      root: the folder, made if it does not exist; or a folder of a bucket, such as "s3://bucket/run".
      scratch: of a bucket, the local folder to work in; "": one of the user's cache.
      break_lock: of a bucket, whether to take the place of a run that gives no sign of life.

    Attributes:
      root: the folder, of a bucket the local one.
      url: as it was named.

    Raises:
      UserError: it cannot be made or written to.
    """

    def __init__(self, root: str | os.PathLike, scratch: str = "", break_lock: bool = False):
        self._bucket = Bucket(str(root)) if is_bucket(root) else None
        self._mirror: Mirror | None = None  # while a workdir in a bucket is held
        self._break_lock, self.url = break_lock, str(root)
        self.root = scratch_folder(str(root), scratch) if self._bucket else Path(root)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            flag = "scratch" if self._bucket else "workdir"
            raise UserError(
                f"--{flag}={self.root} cannot be written to ({error.strerror}): name a writable folder"
            ) from None

    def folder(self, stage: str, name: str = "") -> Path:
        """The unit's folder."""
        return self.root / stage / name

    @contextlib.contextmanager
    def lock(self, say: Callable[[str], None] = print, whole: bool = False) -> Iterator[None]:
        """Holds the workdir; a second run at the same time is a ``UserError``. Freed when the process dies.

        A workdir in a bucket is brought here, and what is new is copied there until the block ends.

        Args:
          whole: of a bucket, whether all files are brought at once, because other processes read them.
        """
        with contextlib.ExitStack() as held:
            try:
                file = held.enter_context(locked(self.root / ".lock", wait=False))
            except OSError:
                holder = (self.root / ".lock").read_text().strip() or "another process"
                raise UserError(f"{self.root} is in use by {holder}: wait for it, or use another --workdir") from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            if self._bucket:
                self._mirror = held.enter_context(mirrored(self._bucket, self.root, self._break_lock, whole, say))
            yield

    @property
    def lost(self) -> bool:
        """Whether another run has taken the workdir, which lies in a bucket."""
        return self._mirror is not None and self._mirror.lost

    def bring(self, stage: str, name: str, whole: bool = False) -> Path:
        """The unit's folder, with its files; of a bucket without its checkpoints, unless the whole is asked for."""
        folder = self.folder(stage, name)
        if self._mirror:
            self._mirror.bring(f"{self._name(folder)}/", lambda file: whole or f"/{CHECKPOINTS}/" not in file)
        return folder

    def _name(self, path: Path) -> str:
        """Of a file in the bucket; with "/" after it, the beginning of the names in a folder."""
        return path.relative_to(self.root).as_posix()

    def is_free(self) -> bool:
        """Whether no process holds the workdir."""
        with contextlib.suppress(OSError), locked(self.root / ".lock", wait=False):
            return True
        return False

    def finished(self, stage: str, name: str, mark: str) -> bool:
        """Whether the unit is done with this fingerprint and all the files it listed are there whole."""
        folder = self.folder(stage, name)
        if not (folder / SUMMARY).exists():
            return False
        summary = read_object(folder / SUMMARY, "fingerprint", "files")
        if summary["fingerprint"] != mark:
            return False
        for file, size in summary["files"].items():
            if CHECKPOINTS in file.split("/"):  # listed once; whoever needs the room may delete them
                continue
            path = folder / file
            here = path.stat().st_size if path.exists() else self._mirror and self._mirror.size(self._name(path))
            if here != size:
                raise UserError(
                    f"{path} is missing or not {size} bytes, though {folder / SUMMARY} says it is done: "
                    f"delete {folder} to make it again"
                )
        return True

    def begin(
        self, stage: str, name: str, mark: str, about: Mapping[str, Any] = types.MappingProxyType({})
    ) -> tuple[Path, str]:
        """Prepares the unit's folder for work with this fingerprint.

        Args:
          stage, name: of the unit.
          mark: the fingerprint.
          about: what else its ``started.json`` says, where the work is new.

        Returns:
          The folder, and what was found there: "" (nothing), "resumed" (the same work, unfinished), or
          where other work was moved to.
        """
        folder, found = self.folder(stage, name), ""
        if (folder / STARTED).exists():
            old = read_object(folder / STARTED, "fingerprint")["fingerprint"]
            if old != mark and [path.name for path in folder.rglob("*")] == [STARTED]:
                (folder / STARTED).unlink()  # a start that was refused made nothing
            else:
                found = "resumed" if old == mark else str(self._set_aside(folder, stage, name, old))
            if found == "resumed":
                self.bring(stage, name, whole=True)
                remove_unfinished(folder)
        elif folder.exists() and any(folder.iterdir()) and not _holds_units(folder):
            raise UserError(f"{folder} holds files that saejax did not write: move them away, or use another --workdir")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SUMMARY).unlink(missing_ok=True)
        if found != "resumed":
            write_json(folder / STARTED, dict(fingerprint=mark, **about))
        return folder, found

    def put_back(self, stage: str, name: str, moved: Path) -> bool:
        """Puts what ``begin`` moved away back in its place, if nothing was written there since; whether it did.

        Args:
          stage, name: of the unit.
          moved: where the old result is.
        """
        folder = self.folder(stage, name)
        if any(path.is_file() and path != folder / STARTED for path in folder.rglob("*")):
            return False
        shutil.rmtree(folder)
        self._move(moved, folder)
        return True

    def _move(self, old: Path, new: Path) -> None:
        if self._mirror:
            self._mirror.move(f"{self._name(old)}/", f"{self._name(new)}/", lambda: os.replace(old, new))
        else:
            os.replace(old, new)

    def _set_aside(self, folder: Path, stage: str, name: str, mark: str) -> Path:
        target = self.root / "superseded" / f"{stage}{'-' + name if name else ''}-{mark}"
        for suffix in ("", *(f".{i}" for i in range(1, 1000))):
            free = target.with_name(target.name + suffix)
            if not free.exists():
                free.parent.mkdir(exist_ok=True)
                self._move(folder, free)
                return free
        raise UserError(f"{target.parent} holds a thousand copies of {target.name}: delete some")

    def finish(self, stage: str, name: str, mark: str, summary: Mapping[str, Any]) -> None:
        """Writes the unit's ``summary.json``, last. Checkpoints, from which it went on, are not among its files."""
        folder = self.folder(stage, name)
        found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
        files = {
            str(file): path.stat().st_size
            for file, path in found.items()
            if path.name not in (STARTED, SUMMARY) and CHECKPOINTS not in file.parts
        }
        write_json(
            folder / SUMMARY,
            dict(schema_version=SCHEMA_VERSION, stage=stage, name=name, fingerprint=mark, **summary, files=files),
        )
        if self._mirror:
            self._mirror.copy(f"{self._name(folder)}/")


def _holds_units(folder: Path) -> bool:
    return any((child / STARTED).exists() for child in folder.iterdir() if child.is_dir())


def package_versions() -> dict[str, str]:
    """The installed versions of what results depend on."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a stage is given.

    Attributes:
      stage: its name.
      name: the unit's name where a stage has several, such as "topk"; otherwise "".
      folder: where it writes; holds what an interrupted run of the same work left there.
      configs: the groups of configuration by name.
      inputs: the folders of the finished units it reads, by "stage" or "stage/name".
      say: prints one line of progress.
      stopping: whether the process was asked to stop; the stage then saves and raises ``Interrupted``.
      team: the processes among which items are dealt out.
    """

    stage: str
    name: str
    folder: Path
    configs: Configs
    inputs: Mapping[str, Path]
    say: Callable[[str], None] = print
    stopping: Callable[[], bool] = lambda: False
    team: Team = dataclasses.field(default_factory=Team)

    def each(self, items: Sequence[T], file: Callable[[T], Path], make: Callable[[T], None], last: bool = True) -> None:
        """Has every item made whose file is not there; of several processes each makes some.

        Args:
          items: in any order that is the same in all processes; their names, by ``str``, differ.
          file: of an item, which is written last and whole.
          make: makes an item and its file.
          last: whether what follows is done once, by the first process alone; the others leave the stage here.
        """
        for item in self.team.take(items):
            if not file(item).exists():
                make(item)
        self.team.join([file(item) for item in items], last)
