"""A workdir in a bucket: a local folder in which the run works, and copies of its files as objects.

Files are mapped into memory, locked, renamed and written piece by piece, which objects cannot be; so a run works in a
*scratch folder* on this machine. What is whole there is copied to the bucket every half minute and when a unit is
done. ``.files.json`` in the bucket lists the files of one moment and is written after all of them: what it does not
name is not there, so that a copy that was cut off changes nothing. It also says whose copy it is. A scratch folder that
is not behind the bucket goes on as it is; any other one is emptied, and filled from the bucket.
"""

import contextlib
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from saejax.buckets.bucket import Bucket
from saejax.buckets.lease import LOCK, Lease, every, held
from saejax.buckets.listing import FILES, download, for_each, listed, parsed
from saejax.errors import UserError
from saejax.files import write_json

MARK, COPIED = ".scratch.json", ".copied.json"  # in the scratch folder
_LAST = "summary.json"  # is copied after the other files
_EVERY = 30.0  # seconds between copies
_LARGE = ("capture", "tokenize")  # stages whose files are brought where they are read
CHECKPOINTS = "checkpoints"  # of a unit, brought where it goes on
_UNFINISHED = re.compile(r"\.writing-|orbax-checkpoint-tmp")
_Stat = tuple[int, int]  # bytes, and nanoseconds of its last change


def scratch_folder(url: str, named: str = "") -> Path:
    """The local folder for a workdir in a bucket.

    Args:
      url: of the workdir.
      named: by the user; "": a folder of the user's cache.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(cache) / "saejax" / "workdirs" / re.sub(r"[^\w.-]+", "-", url.rstrip("/"))


@contextlib.contextmanager
def mirrored(
    bucket: Bucket, scratch: Path, break_lock: bool, whole: bool, say: Callable[[str], None]
) -> Iterator["Mirror"]:
    """Holds a bucket whose workdir is worked on in a folder, which this process has locked, and copies what is new.

    Args:
      bucket: of the workdir.
      scratch: the folder; it is emptied if it is behind the bucket.
      break_lock: whether to take the place of a run that gives no sign of life.
      whole: whether all files are brought at once, because other processes read them, too.
      say: prints a line.

    Raises:
      UserError: another run holds the bucket, the folder holds something else, or a copy fails.
    """
    mark = _mark(bucket, scratch)
    with held(bucket, mark["id"], break_lock, say) as lease:
        mirror = Mirror(bucket, scratch, lease, mark)
        if count := mirror.open(whole):
            say(f"{count} files of {bucket.url} were brought to {scratch}")
        with every(_EVERY, mirror.copy, say):
            try:
                yield mirror
            except BaseException:
                try:
                    mirror.copy("")
                except UserError as error:
                    say(str(error))
                raise
            mirror.copy("")


def _mark(bucket: Bucket, scratch: Path) -> dict[str, str]:
    """What a scratch folder says of itself.

    Raises:
      UserError: it is that of another workdir, or not one.
    """
    path = scratch / MARK
    if not path.exists():
        if any(child.name != LOCK for child in scratch.iterdir()):
            raise UserError(f"{scratch} holds files of something else: name an empty folder by --scratch")
        write_json(path, dict(url=bucket.url, id=uuid.uuid4().hex, serial=""))
    mark = _read(path)
    if mark.get("url") != bucket.url:
        raise UserError(f"{scratch} is the local folder of {mark.get('url')}: name another one by --scratch")
    return mark


class Mirror:
    """The files of a scratch folder, and those of the bucket; names are relative to both.

    Args:
      bucket: the bucket.
      scratch: the folder.
      lease: by which it is held.
      mark: what the folder says of itself.
    """

    def __init__(self, bucket: Bucket, scratch: Path, lease: Lease, mark: dict[str, str]):
        self._bucket, self._scratch, self._lease, self._mark = bucket, scratch, lease, mark
        self._sizes: dict[str, int] = {}  # of the files in the bucket
        self._same: dict[str, _Stat] = {}  # files that are the same here and there, and what they are here
        self._at_work = threading.Lock()

    @property
    def lost(self) -> bool:
        """Whether another run has taken the bucket."""
        return bool(self._lease.taken_by)

    def open(self, whole: bool) -> int:
        """Sees that the folder is not behind the bucket; the number of files that were brought."""
        found = listed(self._bucket) or dict(files={}, id="", serial="")
        self._sizes = found["files"]
        if self._mark["id"] == found["id"] or (found["serial"] and self._mark["serial"] == found["serial"]):
            copied = _read(self._scratch / COPIED) if (self._scratch / COPIED).exists() else {}
            here = dict(self._here())
            self._same = {name: here[name] for name, stat in copied.items() if here.get(name) == tuple(stat)}
        else:
            for child in self._scratch.iterdir():
                if child.name not in (LOCK, MARK):
                    shutil.rmtree(child) if child.is_dir() else child.unlink()
        count = self.bring("", lambda name: whole or not _is_large(name))
        self._remember(found["serial"])
        return count

    def size(self, name: str) -> int | None:
        """Bytes of a file of the bucket; None if it is not there."""
        return self._sizes.get(name)

    def bring(self, prefix: str, wanted: Callable[[str], bool] = lambda name: True) -> int:
        """Has the files under a prefix here; how many had to be brought."""
        with self._at_work:
            names = [name for name in self._sizes if name.startswith(prefix) and wanted(name)]
            names = [name for name in names if name not in self._same and not (self._scratch / name).exists()]
            for_each(self._bring, names)
            return len(names)

    def _bring(self, name: str) -> None:
        download(self._bucket, name, self._scratch / name)
        self._same[name] = _stat(self._scratch / name)

    def copy(self, done: str | None = None) -> None:
        """Copies to the bucket what is new here, and deletes there what is gone.

        Args:
          done: prefix of files at which nobody writes. Of others, one that was written since this began waits for the
            next time: it may rest on another one that was not seen.
        """
        with self._at_work:
            self._lease.check()
            began, here = time.time_ns(), dict(self._here())
            settled = [
                name for name, (_, at) in here.items() if at < began or (done is not None and name.startswith(done))
            ]
            changed = [name for name in settled if self._same.get(name) != here[name]]
            gone = [name for name in self._same if name not in here]
            if not changed and not gone:
                return
            for last in (False, True):
                for_each(self._copy, [name for name in changed if (PurePosixPath(name).name == _LAST) == last])
            for name in gone:
                del self._same[name]
                self._sizes.pop(name, None)
            self._list()
            self._bucket.delete(gone)

    def _copy(self, name: str) -> None:
        path = self._scratch / name
        try:
            stat = _stat(path)
            self._bucket.upload(path, name)
        except (FileNotFoundError, UserError):
            if not path.exists():  # gone meanwhile; it is deleted there the next time, if it was copied
                return
            raise
        self._same[name], self._sizes[name] = stat, stat[0]

    def move(self, old: str, new: str, rename: Callable[[], object]) -> None:
        """Moves the files under a prefix, in the bucket and here.

        Args:
          old, new: the prefixes.
          rename: does it here.
        """
        with self._at_work:
            self._lease.check()
            names = {name: new + name.removeprefix(old) for name in self._sizes if name.startswith(old)}
            for_each(lambda name: self._bucket.copy(name, names[name]), names)
            rename()
            both: tuple[dict[str, Any], ...] = (self._sizes, self._same)
            for known in both:
                known.update({names[name]: known.pop(name) for name in names if name in known})
            self._list()
            self._bucket.delete(list(names))

    def _list(self) -> None:
        """Writes the list of files."""
        serial = uuid.uuid4().hex
        data = dict(id=self._mark["id"], serial=serial, files=self._sizes)
        self._bucket.write(FILES, json.dumps(data).encode())
        self._remember(serial)

    def _remember(self, serial: str) -> None:
        self._mark = {**self._mark, "serial": serial}
        write_json(self._scratch / COPIED, self._same)
        write_json(self._scratch / MARK, self._mark)

    def _here(self) -> Iterator[tuple[str, _Stat]]:
        """The whole files of the folder, but those at its top, or at that of a workdir in it, that begin with a dot."""
        for folder, folders, files in os.walk(self._scratch):
            top = Path(folder) == self._scratch or LOCK in files
            kept = [name for name in folders if not (top and name.startswith(".")) and not _UNFINISHED.search(name)]
            folders[:] = kept
            for file in files:
                if not (top and file.startswith(".")) and not _UNFINISHED.search(file):
                    path = Path(folder) / file
                    with contextlib.suppress(FileNotFoundError):
                        yield path.relative_to(self._scratch).as_posix(), _stat(path)


def _is_large(name: str) -> bool:
    parts = PurePosixPath(name).parts
    if parts[-1] in ("started.json", _LAST):
        return False
    return parts[0] in (*_LARGE, "superseded") or CHECKPOINTS in parts


def _stat(path: Path) -> _Stat:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _read(path: Path) -> Any:
    return parsed(path.read_bytes(), str(path))
