"""Names of dictionaries: "topk", or "topk/k16" for a member of a stack, or a folder."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from saejax.dictionaries.kinds import unit_names
from saejax.errors import UserError

_LONGEST = 100  # bytes of the name of a folder's unit


def folder_name(dictionary: str) -> str:
    """Return the unit name of a dictionary: "topk-k32" for "topk/k32", "runs-demo-train-topk" for a folder.

    Letters of all scripts stay, with their vowel signs and accents. A name that is too long for a folder keeps its
    end, behind a hash of the whole.
    """
    kept = (char if char == "." or char.isalnum() or _is_mark(char) else "-" for char in dictionary)
    name = re.sub("-+", "-", "".join(kept)).strip("-.") or "dictionary"
    if len(name.encode()) <= _LONGEST:
        return name
    end = name.encode()[-_LONGEST:].decode(errors="ignore").lstrip("-.")
    return f"{hashlib.sha256(dictionary.encode()).hexdigest()[:8]}-{end}"


def unique_folder_name(*names: str) -> str:
    """Return a folder's name for one or several names, such as "runs-a" for "runs/a", that no other names have.

    It is ``folder_name`` where hyphens stand for slashes alone; else a hash follows: "runs-a-0a1b2c3d" for "runs-a".
    """
    joined = "+".join(names)
    name = folder_name(joined)
    if name == joined.replace("/", "-") and "-" not in joined:
        return name
    return f"{name}-{hashlib.sha256(joined.encode()).hexdigest()[:8]}"


def _is_mark(char: str) -> bool:
    """Return whether a character is part of a word though no letter: "_", an accent, a vowel sign of Hindi or Thai."""
    return char == "_" or unicodedata.category(char) in ("Mn", "Mc")


def is_folder(dictionary: str) -> bool:
    """Return whether a flag names a dictionary by its folder, and not by its kind as "topk" or "topk/k32" do."""
    if dictionary.partition("/")[0] in unit_names():
        return False
    return "/" in dictionary or Path(dictionary).is_dir()


def check_member(name: str, members: Sequence[str], flag: str) -> None:
    """Raise a ``UserError`` that names the flag unless the dictionary ``name`` is one of a unit's ``members``."""
    kind, _, member = name.partition("/")
    if member in members:
        return
    if list(members) == [""]:
        raise UserError(f"{flag}={name}, but {kind} is one dictionary and no stack: give {flag}={kind}")
    problem = f"there is no member {member}" if member else f"{kind} is a stack of {len(members)} dictionaries"
    raise UserError(f"{flag}={name}: {problem}: name one, such as {flag}={kind}/{members[0]}, of {', '.join(members)}")


def kind_and_member(name: str) -> tuple[str, str]:
    """Split a dictionary's name: ("topk", "k16") of "topk/k16", ("topk", "") of "topk"."""
    kind, _, member = name.partition("/")
    return kind, member


def full_name(kind: str, member: str) -> str:
    """Join a dictionary's name from kind and member: "topk/k16", or "topk" for a single dictionary."""
    return f"{kind}/{member}" if member else kind
