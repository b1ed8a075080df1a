"""Links to folders: symbolic ones, or text files with the folder's name where a file system has none."""

import os
import uuid
from pathlib import Path

from saejax.files import write_text

STAND_IN = ".current"  # ending of the text file that stands for a link


def write_link(place: Path, target: str) -> None:
    """Make a path a symbolic link, or a text file in its place where there are no links; replace an earlier one."""
    temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    try:
        os.symlink(target, temporary)
        os.replace(temporary, place)
    except OSError:  # no links here, or a folder of units in the link's place
        temporary.unlink(missing_ok=True)
        write_text(place.with_name(place.name + STAND_IN), target + "\n")


def linked_folder(path: Path) -> Path | None:
    """Return the folder that a path such as DIR/train/topk stands for; None if it stands for none."""
    stand_in = path.with_name(path.name + STAND_IN)
    if path.is_symlink():
        target = os.readlink(path)
    else:
        target = stand_in.read_text("utf-8").strip() if stand_in.is_file() else ""
    # A text file that a full disk left empty would lead to the folder that it lies in.
    return path.parent / target if target and (path.parent / target).exists() else None


def resolve_links(path: str | os.PathLike) -> Path:
    """Return the folder that a path leads to through text files that stand for links; any other path as it is."""
    path = Path(path)
    if path.is_symlink() or not path.name:
        return path
    place = path if path.parent.is_dir() else resolve_links(path.parent) / path.name
    return linked_folder(place) or place


def member_folder(unit: Path, member: str) -> Path:
    """Return the folder of a member of a stack, given the stack's folder; the folder itself for the one member ""."""
    place = unit / member
    return place if place.is_dir() or not member else linked_folder(place) or place
