"""Summaries and results of finished units, read from their folders."""

import dataclasses
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from absl import logging

from saejax.errors import UserError, file_errors
from saejax.files import read_json, read_object
from saejax.links import resolve_links
from saejax.loaded_units import compare_results
from saejax.results import Devices, Settings, from_json
from saejax.runner.registry import all_stages
from saejax.runner.workspace import STACK, STARTED, SUMMARY
from saejax.short_reprs import has_short_repr


@has_short_repr
@dataclasses.dataclass(frozen=True)
class Summary:
    """Content of ``done.json``, which describes a finished unit."""

    schema_version: int  #: of the file
    stage: str  #: of the unit
    name: str  #: of the unit among the stage's; "" where there is one
    #: 16 hex digits: a hash of the unit's settings, of the fingerprints of the units it reads, and of the model's and
    #: corpus's files
    fingerprint: str
    config: Settings  #: every setting of the groups it read
    inputs: Mapping[str, str]  #: fingerprints of the units it read
    packages: Mapping[str, str]  #: versions
    devices: Devices | None  #: None if JAX was not used
    seeds: Mapping[str, Any]  #: by group
    start: str  #: UTC, ISO 8601
    seconds: float  #: how long it took, all attempts together; of a member of a stack: its share of the last attempt
    results: Any  #: the stage's; see ``Stage.results``
    files: Mapping[str, int]  #: every file of the unit with its size in bytes
    #: the most memory that the process held while it worked on the unit; None: the system did not tell
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None  #: the most that a device held by then, as JAX counts it; None on a CPU
    device_hours: float | None = None  #: of all attempts and processes together; None of a member of a stack


@file_errors()
def load_results(folder: str | Path, unit: str = "") -> Any:
    """Return the results of a finished unit, as the class that its stage returned.

    Args:
      folder: the unit's folder, such as "runs/demo/ablate/topk"; or a workdir.
      unit: name of a unit in that workdir, such as "ablate/topk".

    A warning is logged if the workdir has another dictionary by now in place of the one that the unit read, or if
    another one was loaded in this process.

    Raises:
      UserError: the unit is not finished, or its summary is damaged; the message names the file and the field.
    """
    place = resolve_links(Path(folder) / unit).resolve()
    summary = load_summary(place)
    for line in _replaced_dictionaries(place, summary):
        logging.warning("%s", line)
    return summary.results


def _replaced_dictionaries(folder: Path, summary: Summary) -> Iterator[str]:
    """Yield a line for each dictionary that a unit read and in whose place the workdir or this process has another one.

    Args:
      folder: the unit's own folder, such as DIR/evaluate/topk-<hash>.
      summary: of the unit.
    """
    depth = len(PurePath(summary.stage, summary.name).parts)
    root = Path(os.path.normpath(folder.joinpath(*[os.pardir] * depth)))
    parts = read_object(folder / STACK)["members"].values() if (folder / STACK).exists() else [folder.name]
    hashes = defaultdict[Path, set[str]](set)
    for part in parts:
        started = folder.with_name(part) / STARTED
        needs = read_object(started).get("depends_on", {}).get("needs", {}) if started.exists() else {}
        for need, mark in needs.items():
            if not need.startswith("train/"):
                continue
            hashes[root / "train" / PurePath(need).parts[1]].add(mark)  # members of a stack have its name
            current = resolve_links(root / need).resolve()
            if not current.is_dir():
                continue
            members = read_object(current / STACK)["members"].values() if (current / STACK).exists() else ()
            if mark not in {name.rpartition("-")[2] for name in (current.name, *members)}:
                yield (
                    f"{folder.with_name(part)} is of the dictionary {need}-{mark}, which {root / need} has no more: "
                    f"flags were changed since; run {summary.stage} again"
                )
    yield from filter(None, (compare_results(name, marks) for name, marks in hashes.items()))


def load_summary(folder: Path) -> Summary:
    """Return the whole summary of a finished unit; errors as in ``load_results``."""
    path = resolve_links(folder) / SUMMARY
    if not path.exists():
        raise UserError(
            f"{path} does not exist: expected the folder of a finished unit; "
            + (_units_inside(folder) or "run its stage, or name another")
        )
    summary = from_json(Summary, read_json(path), path)
    cls = results_class(summary.stage)
    return dataclasses.replace(summary, results=from_json(cls, summary.results, path, "results"))


def _units_inside(folder: Path) -> str:
    """Return which finished units stand in a folder, in words; "" if there are none."""
    units = {
        str(path.parent.relative_to(folder)) for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{SUMMARY}")
    }
    # A unit is a folder with a hash in its name, and a link without the hash to the current one.
    inside = sorted(unit for unit in units if not re.search("-[0-9a-f]{16}(/|$)", unit)) or sorted(units)
    return f"name one, such as {folder / inside[0]}, of {', '.join(inside)}" if inside else ""


def results_class(stage: str) -> Any:
    """Return the class of a stage's results; ``Any`` for one that has none."""
    results = all_stages()[stage].results if stage in all_stages() else None
    return results or Any
