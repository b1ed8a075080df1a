"""The dictionaries of a train unit: a single one, or the members of a stack, and how a flag names one of them.

A unit such as ``train/topk`` lists its members in ``done.json``. A single dictionary has the empty name and lies in
the unit's folder; members of a stack lie in folders of their names, such as ``train/topk/k16``. On the command line a
dictionary is "topk", or "topk/k16".
"""

import re
import types
from collections.abc import Mapping
from pathlib import Path

from jax.sharding import Mesh

from saejax.dictionaries import rescale
from saejax.dictionaries.formats import circuit_tracer, load_dictionary
from saejax.dictionaries.modules import Dictionary
from saejax.dictionaries.names import check_member, full_name, is_folder, kind_and_member
from saejax.dictionaries.results import TrainedMember
from saejax.errors import UserError
from saejax.files import read_json
from saejax.links import member_folder
from saejax.results import from_json
from saejax.runner.workspace import STARTED, SUMMARY

_UNIT = re.compile("(.+)-([0-9a-f]{16})")


def results_folder(workdir: Path | str, stage: str, name: str) -> Path:
    """Return the folder of what a stage made of the dictionary ``name``, such as "topk/k16", in a workdir.

    Units may be links or not; the folder may not exist.
    """
    kind, member = kind_and_member(name)
    return member_folder(member_folder(Path(workdir) / stage, kind), member)


def find_results(
    workdir: Path | str,
    stage: str,
    name: str,
    trained: Path | None = None,
    units: Mapping[str, Path] = types.MappingProxyType({}),
) -> Path | None:
    """Return the folder of what a stage made of a dictionary; None if there is none of this one.

    A dictionary that is trained anew has other features by the same numbers, and other stages may not have run since.
    DIR/<stage>/NAME may also stand for what a run with other flags has made. Results that do not name their dictionary
    pass, and their folder may not exist.

    Args:
      workdir: DIR.
      stage: such as "evaluate".
      name: of the dictionary, such as "topk/k16".
      trained: its folder; None: the one that DIR/train/NAME stands for now.
      units: folders of the units that a run reads, such as of "evaluate/topk": what DIR/evaluate/topk stands for may
        have been made with other settings since.
    """
    (kind, member), root = kind_and_member(name), Path(workdir)
    if read := units.get(f"{stage}/{kind}"):
        return place if (place := member_folder(read, member)).is_dir() else read
    place, unit = results_folder(root, stage, name), member_folder(root / stage, kind)
    match = _UNIT.fullmatch((trained or results_folder(root, "train", name)).resolve().name)
    if not match or _trained_mark(root, unit, match[1], member) in ("", match[2]):
        return place
    finished = [path.parent for path in (root / stage).glob(f"{match[1]}-*/{SUMMARY}")]
    for unit in sorted(finished, key=lambda unit: (unit / SUMMARY).stat().st_mtime_ns, reverse=True):
        if _trained_mark(root, unit, match[1], member) == match[2]:
            return place if (place := member_folder(unit, member)).is_dir() else unit  # of a member by itself
    return None


def _trained_mark(root: Path, unit: Path, kind: str, member: str) -> str:
    """Return the fingerprint of the dictionary that a unit of the workdir ``root`` is of; "" if it names none."""
    while True:
        paths = [path / STARTED for path in (member_folder(unit, member), unit) if (path / STARTED).is_file()]
        needs = read_json(paths[0]).get("depends_on", {}).get("needs", {}) if paths else {}
        if (mark := needs.get(f"train/{kind}", "")) or not (shown := needs.get(f"interpret/{kind}")):
            return mark
        unit = root / "interpret" / f"{kind}-{shown}"  # an atlas has labels of the unit that it shows


def members(unit: Path, layers: bool = False) -> tuple[TrainedMember, ...]:
    """Read the train stage's summary of each member of a unit, in its order.

    Raises:
      UserError: the unit is a cross-layer transcoder, whose ``layers`` are no dictionaries and are not accepted.
    """
    if not layers and circuit_tracer.is_cross_layer(Path(unit)):
        raise UserError(
            f"{unit} is a cross-layer transcoder, not dictionaries to take one by one: it can be evaluated, exported, "
            f"and traced with --graph.transcoders={unit}"
        )
    path = Path(unit) / SUMMARY
    return from_json(tuple[TrainedMember, ...], read_json(path)["results"]["members"], path, "results.members")


def load_trained(name: str, units: Mapping[str, Path], flag: str, mesh: Mesh | None = None) -> Dictionary:
    """Load the dictionary that a flag names, of this workdir or by its folder.

    Args:
      name: such as "topk" or "topk/k16", or a folder that ``load_dictionary`` reads.
      units: folders of units such as "train/topk" or "train/topk/k16", unless a folder is named.
      flag: for the message, such as "--ablate.dictionary".
      mesh: the devices, see ``load_dictionary``.

    Raises:
      UserError: the unit has no such member, or is a stack and the flag names none of its members.
    """
    if not is_folder(name):
        kind, member = kind_and_member(name)
        if member and (folder := units.get(f"train/{name}")):
            return load_dictionary(folder, mesh=mesh)
        unit = units[f"train/{kind}"]
        check_member(name, [entry.name for entry in members(unit)], flag)
        return load_dictionary(member_folder(unit, member), mesh=mesh)
    try:
        # A published dictionary may normalise tokens, which those trained here never do.
        return rescale.to_output_units(load_dictionary(name, mesh=mesh))
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None


def find_trained(name: str, units: Mapping[str, Path], flag: str) -> dict[str, Path]:
    """Return the folders of the trained dictionaries that a flag names, of a stack all members, by their full names.

    For the arguments see ``load_trained``; a ``UserError`` if there is no such member.
    """
    kind, member = kind_and_member(name)
    if member and f"train/{name}" in units:
        return {name: units[f"train/{name}"]}
    unit = units[f"train/{kind}"]
    names = [entry.name for entry in members(unit)]
    if member:
        check_member(name, names, flag)
    return {full_name(kind, of_member): member_folder(unit, of_member) for of_member in ([member] if member else names)}
