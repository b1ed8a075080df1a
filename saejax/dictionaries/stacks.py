"""The dictionaries of a train unit: one alone, or the members of a stack, and how a flag names one of them.

A unit such as ``train/topk`` lists its members in ``summary.json``. One that is alone has the empty name and stands in
the unit's folder; those of a stack stand in folders of their names, such as ``train/topk/k16``. On the command line a
dictionary is "topk", or "topk/k16".
"""

from pathlib import Path

from saejax.dictionaries.formats import load_dictionary
from saejax.dictionaries.modules import Dictionary
from saejax.dictionaries.results import TrainedMember
from saejax.errors import UserError
from saejax.results import from_json
from saejax.workspace import SUMMARY, read_json


def kind_and_member(name: str) -> tuple[str, str]:
    """The parts of a dictionary's name: ("topk", "k16") of "topk/k16", ("topk", "") of "topk"."""
    kind, _, member = name.partition("/")
    return kind, member


def full_name(kind: str, member: str) -> str:
    """The name of a dictionary by its kind and member: "topk/k16", or "topk" for one that is alone."""
    return f"{kind}/{member}" if member else kind


def members(unit: Path) -> tuple[TrainedMember, ...]:
    """What the train stage said of each member, in its order."""
    path = Path(unit) / SUMMARY
    return from_json(tuple[TrainedMember, ...], read_json(path)["results"]["members"], path, "results.members")


def load_member(unit: Path, name: str, flag: str) -> Dictionary:
    """Loads the dictionary that a flag names.

    Args:
      unit: folder of its train unit.
      name: in full, such as "topk/k16".
      flag: for the message, such as "--ablate.dictionary".

    Raises:
      UserError: the unit has no such member, or is a stack and the flag names none of its members.
    """
    check_member(name, [entry.name for entry in members(unit)], flag)
    return load_dictionary(Path(unit) / kind_and_member(name)[1])


def check_member(name: str, known: list[str], flag: str) -> None:
    """A ``UserError`` that names the flag unless the dictionary ``name`` is one of a unit's members, ``known``."""
    kind, member = kind_and_member(name)
    if member in known:
        return
    if known == [""]:
        raise UserError(f"{flag}={name}, but {kind} is one dictionary and no stack: give {flag}={kind}")
    told = f"there is no member {member}" if member else f"{kind} is a stack of {len(known)} dictionaries"
    raise UserError(f"{flag}={name}: {told}: name one, such as {flag}={kind}/{known[0]}, of {', '.join(known)}")
