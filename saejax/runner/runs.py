"""The program ``runs``: the units of a workdir with their sizes, and the removal of units that nobody needs."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from saejax.errors import UserError, one_of
from saejax.files import WRITING, read_object, unfinished_path
from saejax.links import linked_folder
from saejax.runner import command, command_line
from saejax.runner.flag_files import read_flag_files
from saejax.runner.workspace import CHECKPOINTS, CLAIM, STACK, STARTED, SUMMARY, Workspace, hold_claim
from saejax.wording import counted

ABOUT = """\
runs: lists the units of a workdir: size, date, whether DIR/<unit> stands for it (current), for another (obsolete) or
for none (unlinked, as in a copy without links), and which units have read it.

  --workdir=DIR  folder of the run (required)
  --remove=WHAT  with commas between: obsolete (units of settings that were changed since, which no current unit has
      read), checkpoints (the optimizer's state of dictionaries that are finished), stores (activations whose readers
      are all finished; they are captured again if a unit that is new reads them); default: nothing
  --dry_run  say what would be removed, and remove nothing
  --debug  also show the traceback of bad input"""
_ASIDE = f".*-{'[0-9a-f]' * 16}.{WRITING}*"  # a unit's folder that is being removed
REMOVABLE = ("obsolete", "checkpoints", "stores")
STORES = ("capture",)  # stages whose units are stores of activations
_FOLDER_MARK = re.compile(r"-([0-9a-f]{16})\b")  # in the path of a unit's folder


@dataclasses.dataclass(frozen=True)
class KeptUnit:
    """A folder of a unit, or of a member of a stack, in a workdir."""

    name: str  #: such as "train/topk"
    fingerprint: str  #: 16 hexadecimal digits
    folder: Path
    state: str  #: current, member (of a current stack), obsolete, unlinked (DIR/<unit> leads nowhere), or unfinished
    size: int  #: bytes of its files
    date: str  #: when it was begun, ISO 8601
    reads: tuple[str, ...]  #: fingerprints of the units that it read
    readers: tuple[str, ...]  #: names of the units that have read it; obsolete units in brackets
    is_removed: bool  #: whether it is a store whose activations were removed


def run(argv: Sequence[str]) -> int:
    """Run the program and return its exit status."""
    flag_values = flags.FlagValues()
    command_line.define_common(flag_values, "dry_run", "debug")
    flags.DEFINE_list("remove", [], "", flag_values=flag_values)

    def work() -> None:
        rest = flag_values([argv[0], *read_flag_files(argv[1:])])
        if flag_values["help"].value:
            return command.show_text(ABOUT)
        root = Path(command_line.named_workdir(flag_values))
        if len(rest) > 1 or not root.is_dir():
            raise UserError(f"{rest[1]} is not a flag" if len(rest) > 1 else f"--workdir={root} is no folder")
        for name in (wanted := [*(flag_values["remove"].value or ())]):
            one_of(name, REMOVABLE, "thing to remove (--remove)")
        units = list_units(root)
        command.show_text("\n".join(describe_units(units)))
        dry_run = bool(flag_values["dry_run"].value)
        workspace = Workspace(root, read_only=dry_run or not wanted)
        if lines := remove(workspace, units, wanted, dry_run):
            command.show_text("\n".join(lines))

    return command.run_and_report(work, flag_values)


def list_units(root: Path) -> list[KeptUnit]:
    """Return the units whose folders are in a workdir, by name and date.

    Raises:
      UserError: a unit's file is damaged.
    """
    started, names = {}, {}
    for path in (path for pattern in ("*-*", "*/*-*") for path in root.glob(f"{pattern}/{STARTED}")):
        folder, about = path.parent, read_object(path, "fingerprint")
        name = folder.relative_to(root).as_posix().removesuffix(ending := f"-{about['fingerprint']}")
        # Not a link to a unit, whose name may have a dash, too, nor a unit of a workdir in this folder.
        if folder.name.endswith(ending) and about.get("depends_on", {}).get("unit", name) == name:
            started[folder], names[folder] = about, name
    current = {name: linked_folder(root / name) for name in names.values()}
    members = {name for folder in current.values() if folder for name in _members(folder)}
    reads = {folder: _reads(folder, about) for folder, about in started.items()}
    states = {}
    for folder, name in names.items():
        if not (folder / SUMMARY).exists():
            states[folder] = "unfinished"
        elif current[name] is None:
            states[folder] = "unlinked"
        elif current[name] == folder:
            states[folder] = "current"
        else:
            states[folder] = "member" if folder.name in members else "obsolete"
    units = []
    for folder, about in started.items():
        mark = str(about["fingerprint"])
        readers = sorted(
            f"({names[other]})" if states[other] == "obsolete" else names[other]
            for other, marks in reads.items()
            if mark in marks
        )
        files = {path.name for path in folder.iterdir()}
        removed = Workspace.REMOVED in files and files <= Workspace.LEFT  # a kill may have left the rest
        size, date = _size(folder), str(about.get("start", ""))
        read_by = (*dict.fromkeys(readers),)
        units.append(KeptUnit(names[folder], mark, folder, states[folder], size, date, reads[folder], read_by, removed))
    return sorted(units, key=lambda unit: (unit.name, unit.date, (unit.folder / STARTED).stat().st_mtime_ns))


def _reads(folder: Path, about: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the fingerprints of the units that a unit reads, and of the units that its own fingerprint covers.

    These differ where a unit depends on some sites of a store alone. Flags may name the folders of others.
    """
    done = read_object(folder / SUMMARY) if (folder / SUMMARY).exists() else {}
    by_name = about.get("depends_on", {}).get("needs", {}), about.get("inputs", {}), done.get("inputs", {})
    named = _FOLDER_MARK.findall(json.dumps(about.get("config", {})))
    return tuple(dict.fromkeys([*(mark for marks in by_name for mark in marks.values()), *named]))


def _members(folder: Path) -> Iterator[str]:
    """Yield the names of the folders of a stack's members."""
    if (folder / STACK).exists():
        yield from read_object(folder / STACK, "members")["members"].values()


def _size(folder: Path) -> int:
    size = 0
    for path in (Path(place) / name for place, _, names in os.walk(folder) for name in names):
        with contextlib.suppress(FileNotFoundError):  # a run that goes on has renamed it
            size += 0 if path.is_symlink() else path.lstat().st_size
    return size


def describe_units(units: Sequence[KeptUnit]) -> list[str]:
    """Return a table: a line for each unit, and their number and size."""
    width = max((len(unit.name) for unit in units), default=4)
    lines = [f"{'unit':{width}}  {'fingerprint':16}  {'state':10}  {'size':>10}  {'begun':16}  read by"]
    for unit in units:
        readers = ", ".join(unit.readers) + (" (activations removed)" if unit.is_removed else "")
        date = unit.date[:16].replace("T", " ")
        size = _words(unit.size)
        lines.append(
            f"{unit.name:{width}}  {unit.fingerprint}  {unit.state:10}  {size:>10}  {date:16}  {readers}".rstrip()
        )
    return [*lines, f"{counted(len(units), 'unit')}, {_words(sum(unit.size for unit in units))}"]


def _words(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 999.5:  # above, three digits are 1e+03
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def remove(workspace: Workspace, units: Sequence[KeptUnit], wanted: Sequence[str], dry_run: bool = False) -> list[str]:
    """Remove what is wanted, and return a line for each thing removed.

    Args:
      workspace: the folder of the run.
      units: its units, as ``list_units`` gives them.
      wanted: of ``REMOVABLE``.
      dry_run: remove nothing.

    Raises:
      UserError: a process works on a unit, and may need others later.
    """
    doomed: dict[Path, tuple[str, KeptUnit]] = {}
    if "obsolete" in wanted:
        kept = _needed(units)
        doomed |= {u.folder: ("obsolete", u) for u in units if u.state == "obsolete" and u.fingerprint not in kept}
    for unit in units:
        if unit.folder in doomed or unit.state == "unfinished":
            continue
        if "checkpoints" in wanted:
            doomed |= {path: ("checkpoints", unit) for path in unit.folder.rglob(CHECKPOINTS) if path.is_dir()}
        if "stores" in wanted and unit.name.partition("/")[0] in STORES and not unit.is_removed:
            readers = {other.state for other in units if unit.fingerprint in other.reads}
            if readers and "unfinished" not in readers:
                doomed[unit.folder] = ("store", unit)
    for unit in units if doomed else ():
        # A kill may leave the claim of a finished unit.
        if unit.state == "unfinished" and workspace.is_claimed(unit.name, unit.fingerprint):
            raise UserError(
                f"{unit.name} is being made by another process, whose run may read later what is to go: wait for it, "
                f"or, if you know that it is gone, delete {unit.folder / CLAIM}"
            )
    for pattern in () if dry_run else (_ASIDE, f"*/{_ASIDE}"):  # what a kill has left of removed units
        for path in workspace.root.glob(pattern):
            _remove_folder(path)
    lines = []
    for path, (what, unit) in doomed.items():
        size = unit.size if what == "obsolete" else _size(path)
        if not dry_run:
            # Held meanwhile: a run that starts now would make anew what is being removed.
            with hold_claim(unit.folder, unit.name):
                if what == "store":
                    workspace.remove_files(unit.name, unit.fingerprint)
                else:  # at once: a run would go on from what a kill leaves of it
                    path.rename(aside := unfinished_path(path))
            # NFS keeps the claim, which is open, under another name until it is closed.
            if what != "store":
                _remove_folder(aside)
        lines.append(
            f"{'would remove' if dry_run else 'removed'} {what}: {unit.name}-{unit.fingerprint}, {_words(size)}"
        )
    return lines


def _remove_folder(path: Path) -> None:
    """Remove a folder; of a link that a user left for a folder on another disk, remove that folder and the link."""
    shutil.rmtree(path.resolve())
    path.unlink(missing_ok=True)


def _needed(units: Sequence[KeptUnit]) -> set[str]:
    """Return the fingerprints of units that are current or unfinished, and of all that those have read."""
    by_mark: Mapping[str, KeptUnit] = {unit.fingerprint: unit for unit in units}
    waiting = [unit.fingerprint for unit in units if unit.state != "obsolete"]
    needed = set[str]()
    while waiting:
        mark = waiting.pop()
        if mark not in needed:
            needed.add(mark)
            waiting += by_mark[mark].reads if mark in by_mark else ()
    return needed
