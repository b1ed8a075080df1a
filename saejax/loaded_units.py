"""Dictionaries and results that this process has loaded, so that different runs are not mixed in silence.

A unit's folder is ``DIR/train/<name>-<hash>``. After a flag was changed, ``DIR/train/<name>`` links to another one than
the results of an earlier run were made with. What is loaded first is remembered, what is loaded next is compared.
Members of a stack have its name, each with a hash of its own, and go together.
"""

import os
import re
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from saejax.files import read_object
from saejax.links import resolve_links

STACK = "stack.json"  # in the folder of a stack: the folders of its members
_UNIT = re.compile(r"(.+)-([0-9a-f]{16})")
# By DIR/train/<name>: the hashes of loaded dictionaries, and hashes that loaded results were made with.
_dictionaries, _results = defaultdict[Path, set[str]](set), defaultdict[Path, set[str]](set)


def compare_dictionary(path: str | os.PathLike) -> str:
    """Remember the dictionary of a folder; return a warning if all loaded results are of others, else ""."""
    folder = resolve_links(path).resolve()
    for unit_folder in (folder, *folder.parents[:2]):
        if unit_folder.parent.name == "train" and (unit := _UNIT.fullmatch(unit_folder.name)):
            name = unit_folder.with_name(unit[1])
            _dictionaries[name].add(unit[2])
            return _compare(name, {unit[2]}, _results[name])
    return ""


def compare_results(name: Path, hashes: Collection[str]) -> str:
    """Remember what results were made with; return a warning if all loaded dictionaries are others, else "".

    Args:
      name: DIR/train/<name>.
      hashes: of the dictionary, or of the members of its stack that the results are of.
    """
    name = name.resolve().parent / name.name
    _results[name].update(hashes)
    return _compare(name, _dictionaries[name], set(hashes))


def _compare(name: Path, dictionaries: set[str], results: set[str]) -> str:
    if not dictionaries or not results or dictionaries & results:
        return ""
    for stack in name.parent.glob(f"{name.name}-*/{STACK}"):
        members = {folder.rpartition("-")[2] for folder in read_object(stack)["members"].values()}
        if members & dictionaries and members & results:
            return ""
    loaded, made_with = (
        " and ".join(f"{name.name}-{unit}" for unit in sorted(units)) for units in (dictionaries, results)
    )
    return (
        f"the dictionary {loaded} and results of {made_with} were loaded from {name.parent.parent}: flags were changed "
        "between them, and features of one mean nothing in the other"
    )
