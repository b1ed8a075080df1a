"""Errors that a user can cause, all reported in the same way.

A ``UserError`` is one line: what was wrong, what was expected, what to do. Binaries print that line
and exit with status 2. Everything else that is raised is a bug and keeps its traceback.
"""

import contextlib
import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator

_TOLD, _NAMED = 20, 100  # faults of a file that a message tells; further places that it names
# What a file system refuses, whichever code asks: a user can mend all of these, and a missing file may be a bug.
REFUSED = {
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE),
}
NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}


class UserError(Exception):
    """Bad input or a missing resource; the message is one line that says what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class Faults:
    """Faults of a file that a user wrote, collected so that one message names them all.

    Args:
      path: the file.
      wrong: what is wrong with its lines, such as "are no prompts".
      unit: what its faults are in, such as "lines".
    """

    def __init__(self, path: object, wrong: str, unit: str = "lines"):
        self._path, self._wrong, self._unit = " ".join(str(path).split()), wrong, unit
        self._errors: dict[str, UserError] = {}  # by place

    @contextlib.contextmanager
    def collect(self, place: int | str) -> Iterator[None]:
        """Keep the ``UserError`` of one place, such as the number of a line, if one is raised."""
        try:
            yield
        except UserError as error:
            self._errors[str(place)] = error

    @property
    def count(self) -> int:
        """Number of places with a fault so far."""
        return len(self._errors)

    def refuse(self) -> None:
        """Raise a ``UserError`` with all faults; of places with the same fault the first is told, others are named."""
        if len(self._errors) < 2:
            for error in self._errors.values():
                raise error
            return
        texts = {place: str(error).removeprefix(self._path).lstrip(",: ") for place, error in self._errors.items()}
        first_with: dict[str, str] = {}
        for place, text in texts.items():
            first_with.setdefault(re.sub(r"\b(line|row) [0-9]+", "", text, count=1), place)
        listed = list(first_with.values())[:_TOLD]
        message = "; ".join(texts[place] for place in listed)
        if others := [place for place in texts if place not in listed]:
            more = f" and {len(others) - _NAMED:,} more" if len(others) > _NAMED else ""
            unit = self._unit if len(others) > 1 else re.sub(r"s\b", "", self._unit)
            message += f"; and so in the {unit} {', '.join(others[:_NAMED])}{more}"
        raise UserError(f"{self._path}: {len(texts):,} {self._unit} {self._wrong}: {message}")


class CheckFailed(Exception):
    """A requested check failed; the message is one line. Binaries exit with status 1."""


class Interrupted(Exception):
    """The process was asked to stop (SIGTERM) and has saved its work."""


class OtherFailed(Exception):
    """Another process of the run has failed, so this one ends, too.

    Args:
      rank: number of the process.
      status: its exit status.
    """

    def __init__(self, rank: int, status: int):
        reasons = {1: "failed", 2: "was given bad input", 143: "was stopped"}
        super().__init__(f"process {rank} {reasons.get(status, f'ended with status {status}')}, so this one ends")
        self.status = status


def out_of_room(error: BaseException) -> str:
    """Return which of ``NO_ROOM`` an error reports, by its number or (TensorStore) in words; "" if none."""
    for number, reason in NO_ROOM.items():
        if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
            return reason
    return ""


@contextlib.contextmanager
def file_errors() -> Iterator[None]:
    """Turn what a file system refuses, such as a file without permission, into a ``UserError`` that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSED or not error.filename:
            raise
        reason = str(error.strerror).lower()
        raise UserError(f"{error.filename} cannot be used ({reason}): expected a file that can be read") from error


def nearest_names(wanted: str, names: Iterable[str]) -> list[str]:
    """Return at most three names that somebody may have meant, the likeliest first.

    They are written nearly like it (bach, batch), share a word with it (batch_size, batch) or have it as their initials
    (lr, learning_rate).
    """
    words = set(wanted.lower().split("_"))
    likeness = {}
    for name in names:
        parts = name.lower().split("_")
        is_abbreviated = wanted.lower() == "".join(part[:1] for part in parts)
        shared = 1.0 if is_abbreviated else len(words.intersection(parts)) / len(parts)
        alike = difflib.SequenceMatcher(None, wanted.lower(), name.lower()).ratio()
        if shared or alike > 0.75:
            likeness[name] = (shared, alike)
    return sorted(likeness, key=likeness.__getitem__, reverse=True)[:3]


def one_of(wanted: str, names, what: str) -> str:
    """Return ``wanted`` if it is among ``names``; otherwise raise a ``UserError`` that lists them.

    Args:
      wanted: the name asked for.
      names: the names that exist, in the order in which to list them.
      what: what the names are, for the message, such as "stage".
    """
    names = list(names)
    if wanted not in names:
        raise UserError(f"unknown {what} {wanted!r}: expected one of {', '.join(map(str, names))}")
    return wanted
