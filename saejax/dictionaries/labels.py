"""Labels of features, as the stages ``interpret``, ``explain`` and ``atlas`` write them and all pages read them.

A *sheet* is a .csv file with the columns feature, label, note, reviewer and dictionary, which a person fills in.
"""

import csv
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import logging

from saejax.errors import Faults, UserError
from saejax.files import read_json
from saejax.results import from_json

LABELS = "labels.json"
COLUMNS = ("feature", "label", "note", "reviewer")  # of a sheet; where it has several dictionaries, dictionary
EXPLAINED = "explained.json"  # how a language model judged labels, beside labels that it wrote
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


def labels_of_sheets(
    path: Path, flag: str, trained: Mapping[int, tuple[str, str]] | None = None
) -> dict[tuple[int, int], str]:
    """Return the labels of a sheet, or of all in a folder, by layer and number; lines without a label have none.

    Of a layer whose dictionary was trained in a workdir, labels of other dictionaries are not used; a warning names
    these lines.

    Args:
      path: a .csv file, or a folder of such. The column dictionary names the layer, as "layer 3" or "topk/mlp_in.3",
        or one of ``trained``, as "topk/k32".
      flag: flag that names it, for messages.
      trained: name and site of the dictionaries that were trained in a workdir, by layer.

    Raises:
      UserError: a file cannot be read, lacks a column, or a line names no layer and feature; there is no file in the
        folder; or two labels of a feature differ.
    """
    labels: dict[tuple[int, int], str] = {}
    trained, unused = trained or {}, list[str]()
    layer_of = {name: layer for layer, (name, _) in trained.items()}
    for file in sheets_in(path, flag):
        faults = Faults(file, "are no labels")
        for number, row in enumerate(read_sheet(file, (*COLUMNS, "dictionary"), flag), 2):
            with faults.collect(number):
                dictionary, feature = row["dictionary"].strip(), row["feature"].strip()
                named = _LAYER.fullmatch(dictionary)
                layer = layer_of.get(dictionary, int(named[1]) if named else None)
                if layer is None or not INDEX.fullmatch(feature):
                    raise UserError(
                        f"{file}, line {number}: {row['dictionary']!r} and {feature!r} name no layer and feature: "
                        "expected such as layer 3 and 17"
                    )
                key, label = (layer, int(feature)), row["label"].strip()
                name, site = trained.get(layer, (dictionary, ""))
                # Another site's, kind's or setting's: its feature of this number is another one.
                if dictionary not in (name, name.partition("/")[2], site, f"layer {layer}"):
                    unused += [f"{file.name}, line {number} ({dictionary})"] if label else []
                elif label and labels.setdefault(key, label) != label:
                    raise UserError(
                        f"{file}, line {number}: feature {feature} of {row['dictionary']} is {label!r}, and "
                        f"{labels[key]!r} in an earlier line: keep one of them"
                    )
        faults.refuse()
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
    faults = Faults(path, "are no labels")
    for number, row in enumerate(rows, 2):
        with faults.collect(number):
            if None in row or None in row.values():
                raise UserError(f"{path}, line {number} has not as many cells as there are columns: quote commas in it")
    faults.refuse()
    return rows
