"""Errors that a user can cause, all reported in the same way.

A ``UserError`` is one line: what was wrong, what was expected, what to do. Binaries print that line
and exit with status 2. Everything else that is raised is a bug and keeps its traceback.
"""

import errno
import os

NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}


class UserError(Exception):
    """Bad input or a missing resource; the message is one line that says what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


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
