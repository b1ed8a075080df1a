"""Files written atomically (whole or not at all), JSON files, file hashes and lock files."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from saejax.errors import UserError

if TYPE_CHECKING:
    import numpy as np


WRITING = "writing-"  # in names of what is being written, before a random mark
_LONGEST = 100  # characters of a name that a user gives: names of files have more around it
_LOCK = ".lock"  # ending of the lock file of a folder that is being written


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def explain_bad_name(name: Any, marks: str = "._-") -> str:
    """Return what a name that a user gives has to be, so that files and folders can have it; "" if it is so.

    Args:
      name: the name.
      marks: signs that it may have besides letters and digits, but not first.
    """
    if isinstance(name, str) and len(name) <= _LONGEST and re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9{marks}]*", name):
        return ""
    *first, last = ["letters", "digits", *map(repr, marks)]
    return f"use {', '.join(first)} and {last}, at most {_LONGEST} in all, a letter or digit first"


def unfinished_path(path: Path) -> Path:
    """Return a new path next to a file, for its content until it is whole; ``remove_unfinished`` finds it."""
    return path.with_name(f".{path.name}.{WRITING}{uuid.uuid4().hex}")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path next to ``path`` to write to; it becomes ``path`` if the block succeeds, and is removed if not."""
    path = Path(path)
    temporary = unfinished_path(path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a write does not say of which file, and a cache may be full
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def unfinished_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder to write in, inside of ``folder``, which is made if missing; it is removed afterwards.

    What killed processes have left there is removed before: a cross-layer transcoder has gigabytes. Each has a lock
    file beside its folder, which counts wherever it ran: in containers, numbers of processes say nothing.
    """
    for lock in folder.glob(f".{WRITING}*{_LOCK}") if folder.is_dir() else ():
        if not is_locked(lock):
            shutil.rmtree(lock.with_name(lock.name.removesuffix(_LOCK)), ignore_errors=True)
            lock.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{WRITING}{uuid.uuid4().hex}"
    lock = unfinished.with_name(unfinished.name + _LOCK)
    with locked_text(lock, ""):
        try:
            unfinished.mkdir()
            yield unfinished
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            lock.unlink(missing_ok=True)


def refuse_patterns(folder: Path) -> None:
    """Raise a ``UserError`` for a folder in which Orbax would save arrays that nobody can read.

    It looks for the parts of what it saves by a pattern, where [ and ] are signs, and takes a backslash for a slash.
    """
    if signs := sorted({*str(folder.absolute())} & {*"[\\"}):
        raise UserError(f"{folder} has {' and '.join(signs)} in its path, which dictionaries cannot be saved below")


def remove_unfinished(folder: Path) -> None:
    """Remove files and folders that killed processes left half-written in a folder and below it."""
    for path in list(folder.rglob(f".*{WRITING}*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[IO[str]]:
    """Hold a lock file, which is made if it does not exist and is released when the process ends, however it ends.

    Args:
      path: the lock file, in a folder that exists.

    Returns:
      The open file, in which the holder can leave a message.
    """
    with open(path, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


@contextlib.contextmanager
def locked_text(path: Path, text: str) -> Iterator[None]:
    """Create a text file, which must not exist, and hold a lock on it until the block or the process ends.

    Where the file system has no locks, nothing is held, and ``is_locked`` says that it is.
    """
    with open(path, "x", encoding="utf-8") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            file.write(text)
            file.flush()
        except OSError:  # a full disk: what is cut off would be a lock of nobody
            path.unlink()
            raise
        yield


def is_locked(path: Path) -> bool:
    """Return whether a process holds a file by ``locked_text``, or may hold it; False if the file is gone."""
    try:
        with open(path, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except FileNotFoundError:
        return False
    except OSError:  # it is held, or there are no locks here
        return True


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file atomically. NaN is refused (``ValueError``): JSON has none."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write a file atomically, with a line of JSON for each row."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_lines(path: Path) -> list[Any]:
    """Return the rows that ``write_lines`` wrote; texts in them may contain Unicode's other line separators."""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def write_array(path: Path, array: "np.ndarray") -> None:
    """Write a ``.npy`` file atomically."""
    import numpy as np

    buffer = io.BytesIO()  # numpy writing to a file itself loses the error number of a full disk
    np.save(buffer, array)
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def _read_text(path: Path) -> str:
    """Return the text of a file; a ``UserError`` if there is none, or it cannot be read."""
    try:
        if Path(path).is_fifo():  # which would wait for somebody to write
            raise UserError(f"{path} is a pipe: expected a file")
        return Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        reason = str(error.strerror).lower()
        raise UserError(f"{path} cannot be read ({reason}): expected a file that can be read") from error


def read_json(path: Path) -> Any:
    """Read JSON; a missing or damaged file is a ``UserError`` that names it."""
    try:
        return json.loads(_read_text(path))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise UserError(f"{path} is not valid JSON: it is damaged; delete its folder and run the stage again") from None


def read_foreign(path: Path, expected: str) -> dict[str, Any]:
    """Return the JSON object in a file that people or other programs wrote.

    Args:
      path: the file.
      expected: what it should hold, for messages, such as "a model's settings".

    Raises:
      UserError: the file is missing, is not valid JSON, or holds another value.
    """
    try:
        content = json.loads(_read_text(path))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise UserError(f"{path} is not valid JSON: expected {expected}; fetch it again") from None
    if not isinstance(content, dict):
        kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
        held = kinds.get(type(content), "a number")
        raise UserError(f"{path} holds {held}, no JSON object: expected {expected}; fetch it again")
    return content


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """Return a JSON object with these keys; anything else is a ``UserError`` that names the file."""
    content = read_json(path)
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing or not isinstance(content, dict):
        problem = f"has no {missing[0]}" if missing else "is no JSON object"
        raise UserError(f"{path} {problem}: it is damaged; delete its folder and run the stage again")
    return content


def fingerprint(data: Any) -> str:
    """Return a hash, 16 hexadecimal digits, of JSON data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
