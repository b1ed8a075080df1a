"""Labels of features, as the stages ``interpret``, ``explain`` and ``atlas`` write them and all pages read them.

A *sheet* is a .csv file with the columns feature, label, note, reviewer and dictionary, which a person fills in.
"""

import csv
import dataclasses
import io
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from absl import logging

from saejax.dictionaries.names import full_name, kind_and_member
from saejax.errors import UserError
from saejax.files import read_json
from saejax.results import from_json
from saejax.runner.stacks import is_of_trained, members, results_folder
from saejax.runner.workspace import SUMMARY

LABELS = "labels.json"
COLUMNS = ("feature", "label", "note", "reviewer")  # of a sheet; where it has several dictionaries, dictionary
EXPLAINED = "explained.json"  # how a language model judged labels, beside those that it wrote
FOUND = "detector"  # who gave a label that was found
INDEX = re.compile(r"\d{1,18}")  # of a feature, as a sheet writes it
_NAMED = 8  # lines, and dictionaries, that a warning names
# A dictionary's layer: "layer 3", "mlp_in.3", "topk/mlp_in.3-k32"; settings have numbers, too, but begin otherwise.
_LAYER = re.compile(r"(?:layer |(?:.*/)?[a-z_]+\.)(\d+)(?:-.*)?")


@dataclasses.dataclass(frozen=True)
class Label:
    """The label of a feature."""

    label: str  #: in words
    by: str  #: who says so: "detector", a language model's name, or a reviewer's
    note: str = ""  #: by the reviewer
    f1: float | None = None  #: of the detector on held-out text; None for a label by hand


def load_labels(path: Path) -> dict[int, Label]:
    """Read the labels in a file that a stage wrote, by feature; a ``UserError`` if it is missing or damaged."""
    return dict(from_json(dict[int, Label], read_json(path), path))


def labels_of_folders(folders: Iterable[str | Path]) -> dict[tuple[int, int], str]:
    """Return the labels of features of dictionaries, by layer and number; for the folders see ``trained_units``.

    Raises:
      UserError: a file of labels, or a unit's summary, is damaged.
    """
    labels: dict[tuple[int, int], str] = {}
    for layer, (workdir, name) in trained_units(folders).items():
        labels |= {(layer, feature): label.label for feature, label in labels_of(workdir, name).items()}
    return labels


def trained_units(folders: Iterable[str | Path]) -> dict[int, tuple[Path, str]]:
    """Return the dictionaries of train units, or of their members, by layer: workdir and name, as "topk/mlp_in.3".

    Folders are such as DIR/train/topk; others have none. A damaged summary is a ``UserError``.
    """
    return {layer: (workdir, name) for layer, (workdir, name, _) in _trained_members(folders).items()}


def _trained_members(folders: Iterable[str | Path]) -> dict[int, tuple[Path, str, str]]:
    """Return the dictionaries of ``trained_units``, each with the site that it reads."""
    trained: dict[int, tuple[Path, str, str]] = {}
    for folder in map(Path, folders):
        unit = next((path for path in (folder, folder.parent) if path.parent.name == "train"), None)
        if not unit or not (unit / SUMMARY).exists():
            continue
        for member in members(unit, layers=True):
            layer = member.site.rpartition(".")[2]
            if layer.isdigit() and folder in (unit, unit / member.name):
                trained[int(layer)] = unit.parent.parent, full_name(unit.name, member.name), member.site
    return trained


def labels_in(folders: Mapping[str, Path], dictionary: str) -> Mapping[int, Label]:
    """Return the labels of features, as ``labels_of``, if a run with these units' folders interpreted them."""
    kind, _ = kind_and_member(dictionary)
    unit = folders.get(f"interpret/{kind}")
    return labels_of(unit.parent.parent, dictionary) if unit else {}


def labels_of(workdir: Path | str, dictionary: str) -> Mapping[int, Label]:
    """Return the labels of a dictionary's features: those given by hand if there are any, else those that were found.

    The ``dictionary`` is such as "topk" or "topk/k32". There are none if it was not interpreted since it was trained.
    """
    for stage in ("atlas", "interpret"):
        path = results_folder(workdir, stage, dictionary) / LABELS
        if path.exists() and is_of_trained(workdir, stage, dictionary):
            return load_labels(path)
    return {}


def names_of_layers(folders: Iterable[str | Path], layers: Collection[int]) -> dict[int, str]:
    """Return the names of the dictionaries of layers, as a sheet has them: "topk/mlp_in.3", or "layer 3" if others."""
    trained = trained_units(folders)
    return {layer: trained[layer][1] if layer in trained else f"layer {layer}" for layer in layers}


def labels_of_sheets(path: Path, flag: str, folders: Iterable[str | Path] = ()) -> dict[tuple[int, int], str]:
    """Return the labels of a sheet, or of all in a folder, by layer and number; lines without a label have none.

    Of a layer whose dictionary was trained in a workdir, labels of other dictionaries are not used; a warning names
    these lines.

    Args:
      path: a .csv file, or a folder of such. The column dictionary names the layer, as "layer 3" or "topk/mlp_in.3",
        or one of ``folders``, as "topk/k32".
      flag: flag that names it, for messages.
      folders: as for ``trained_units``.

    Raises:
      UserError: a file cannot be read, lacks a column, or a line names no layer and feature; there is no file in the
        folder; or two labels of a feature differ.
    """
    labels: dict[tuple[int, int], str] = {}
    trained, unused = _trained_members(folders), list[str]()
    layer_of = {name: layer for layer, (_, name, _) in trained.items()}
    for file in sheets_in(path, flag):
        for number, row in enumerate(read_sheet(file, (*COLUMNS, "dictionary"), flag), 2):
            dictionary, feature = row["dictionary"].strip(), row["feature"].strip()
            named = _LAYER.fullmatch(dictionary)
            layer = layer_of.get(dictionary, int(named[1]) if named else None)
            if layer is None or not INDEX.fullmatch(feature):
                raise UserError(
                    f"{file}, line {number}: {row['dictionary']!r} and {feature!r} name no layer and feature: expected "
                    "such as layer 3 and 17"
                )
            key, label = (layer, int(feature)), row["label"].strip()
            _, name, site = trained.get(layer, ("", dictionary, ""))
            # Another site's, kind's or setting's: its feature of this number is another one.
            if dictionary not in (name, name.partition("/")[2], site, f"layer {layer}"):
                unused += [f"{file.name}, line {number} ({dictionary})"] if label else []
                continue
            if label and labels.setdefault(key, label) != label:
                raise UserError(
                    f"{file}, line {number}: feature {feature} of {row['dictionary']} is {label!r}, and "
                    f"{labels[key]!r} in an earlier line: keep one of them"
                )
    if unused:
        logging.warning("%s", unused_labels(f"{flag}={path}", unused, list(layer_of)))
    return labels


def unused_labels(where: str, lines: Sequence[str], names: Sequence[str]) -> str:
    """Return the warning that labels in these lines are of no dictionary with these names."""
    listed, named = (
        ", ".join(some[:_NAMED]) + (f" and {len(some) - _NAMED} more" if len(some) > _NAMED else "")
        for some in (lines, names)
    )
    return f"{where}: no dictionary here has the name in {listed}: these labels are not used; expected {named}"


def sheets_in(path: Path, flag: str) -> list[Path]:
    """Return a sheet, or those in a folder; a folder without any is a ``UserError`` that names the flag."""
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{flag}={path} is a folder without .csv files: name one with sheets that were filled in")
    return files


def read_sheet(path: Path, wanted: Sequence[str], flag: str) -> list[dict[str, str]]:
    """Return the lines of a sheet, which has these columns and perhaps others.

    Raises:
      UserError: it cannot be read, a column is missing, or a line has another number of cells.
    """
    try:
        # utf-8-sig: spreadsheets put a byte order mark at the start.
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "it is not a .csv file in UTF-8"
        raise UserError(f"{flag}={path} cannot be read ({reason}): name a .csv file") from None
    missing = [name for name in wanted if rows and name not in rows[0]]
    if missing:
        raise UserError(f"{flag}={path} has no column {', '.join(missing)}: expected {', '.join(wanted)}")
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise UserError(f"{path}, line {number} has not as many cells as there are columns: quote commas in it")
    return rows
