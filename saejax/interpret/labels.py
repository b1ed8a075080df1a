"""The rule that makes a detector a label, files of labels written by hand, and explanations from Neuronpedia."""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saejax.dictionaries.labels import COLUMNS, INDEX, Label, read_sheet, sheets_in
from saejax.errors import Faults, UserError
from saejax.files import locked, write_text
from saejax.tasks.files import opened, read_lines, text_lines

_NEAR = 100  # random directions of the most similar firing rates, which a feature's label has to exceed
_LEVEL = 0.95  # share of these that it exceeds
_EXPLANATION = '{"layer": "6-res-jb", "index": "17", "description": "names of rivers"}'


def bars(rate: np.ndarray, random_rate: np.ndarray, random_f1: np.ndarray) -> np.ndarray:
    """Return the F1 that a label has to exceed: the 95 % quantile of random directions that fire about as often.

    Args:
      rate: firing rate of each feature.
      random_rate: firing rates of the random directions.
      random_f1: F1 of the detector chosen for each of them.
    """
    # Without random directions nothing shows that a label is better than chance: none can pass.
    if not len(random_rate):
        return np.ones(len(rate))
    order = np.argsort(random_rate, kind="stable")
    sorted_rate, sorted_f1 = random_rate[order], random_f1[order]
    near = min(_NEAR, len(order))
    # F1 depends on the rate, so a label is compared with directions that fire about as often.
    start = np.clip(np.searchsorted(sorted_rate, rate) - near // 2, 0, len(order) - near)
    # An observed value, without interpolation: at least 95 % of the directions do not exceed it.
    return np.quantile(sorted_f1[start[:, None] + np.arange(near)], _LEVEL, axis=1, method="higher")


def partners(rate: np.ndarray, labelled: Sequence[bool]) -> np.ndarray:
    """Return for every feature another one with a detector and the next larger firing rate; -1 where there is none.

    The partner of the feature that fires most is the feature with the next smaller rate.
    """
    order = np.argsort(rate, kind="stable")
    has = np.flatnonzero(np.asarray(labelled)[order])
    partner = np.full(len(rate), -1)
    if len(has) > 1:
        place = np.arange(len(order))
        after = has[np.minimum(np.searchsorted(has, place, side="right"), len(has) - 1)]
        # Not the rarest one: its label is no control for the most frequent feature, which any generic label finds.
        partner[order] = order[np.where(after == place, has[-2], after)]
    return partner


def read_labels(
    path: Path, dictionary: str, features: int, several: bool, flag: str = "--atlas.labels"
) -> dict[int, Label]:
    """Return the labels of a file written by hand, by feature.

    Args:
      path: a .csv file with the columns feature, label, note, reviewer and, where there are several dictionaries,
        dictionary; or a folder of such files, such as filled sheets of several behaviours.
      dictionary: name of the dictionary, such as "topk/k32".
      features: number of its features.
      several: whether other dictionaries are interpreted, too.
      flag: flag that names the file, for messages.

    Raises:
      UserError: a file cannot be read, a column is missing, a feature does not exist, or two labels of it differ.
    """
    label_of: dict[int, Label] = {}
    columns = (*COLUMNS, "dictionary") if several else COLUMNS
    for file in sheets_in(path, flag):
        faults = Faults(file, "are no labels")
        for number, row in enumerate(read_sheet(file, columns, flag), 2):
            text, label = row["feature"].strip(), row["label"].strip()
            if not _is_of(row, dictionary):
                continue
            with faults.collect(number):
                if not INDEX.fullmatch(text) or int(text) >= features:
                    raise UserError(
                        f"{file}, line {number}: there is no feature {text!r} in {dictionary}: expected 0 to "
                        f"{features - 1}"
                    )
                entry = Label(label, row["reviewer"].strip() or "by hand", row["note"].strip())
                if label and label_of.setdefault(int(text), entry).label != label:
                    raise UserError(
                        f"{file}, line {number}: feature {text} is {label!r}, and {label_of[int(text)].label!r} in an "
                        "earlier line: keep one of them"
                    )
        faults.refuse()
    return label_of


def label_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the sheets, and the files of explanations from Neuronpedia, that a path names or that its folder has."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    exported = [file for file in files if file.name.endswith((".jsonl", ".jsonl.gz"))]
    return [file for file in files if file.suffix == ".csv"], exported


def read_explanations(files: Sequence[Path], features: int, flag: str = "--atlas.labels") -> dict[int, Label]:
    """Return the explanations of a dictionary's features that Neuronpedia exported, by feature.

    Of several explanations of a feature the one with the highest score is taken, else the first.

    Args:
      files: JSON lines, perhaps compressed, with the fields index, description and layer, which names the dictionary,
        and perhaps scoreV2, explanationModelName and typeName.
      features: number of features of the dictionary.
      flag: flag that names them, for messages.

    Raises:
      UserError: a file cannot be read, a line is no explanation, a feature does not exist, or the lines are of several
        dictionaries.
    """
    label_of: dict[int, Label] = {}
    best: dict[int, float] = {}
    sources = set[str]()

    def read(record: Any, where: str) -> None:
        """Keep a line's explanation, if it is the best of its feature."""
        fields = record if isinstance(record, dict) else {}
        text, description = str(fields.get("index", "")), fields.get("description")
        if not INDEX.fullmatch(text) or not isinstance(description, str):
            raise UserError(f"{where} is no explanation: expected an object such as {_EXPLANATION}")
        if int(text) >= features:
            raise UserError(f"{where}: there is no feature {text}: expected 0 to {features - 1}")
        sources.add(str(fields.get("layer", "")))
        score = fields.get("scoreV2")
        score = float(score) if isinstance(score, int | float) else -math.inf
        if description.strip() and (int(text) not in label_of or score > best[int(text)]):
            by = fields.get("explanationModelName") or fields.get("typeName")
            label_of[int(text)] = Label(description.strip(), f"Neuronpedia, {by}" if by else "Neuronpedia")
            best[int(text)] = score

    for file in files:
        with opened(file, flag, "name a file of explanations that Neuronpedia exported") as content:
            read_lines(text_lines(content, file), file, _EXPLANATION, read, "are no explanations")
    if len(sources) > 1:
        named = ", ".join(sorted(sources)[:4])
        raise UserError(f"{flag} has explanations of several dictionaries ({named}): name the files of one")
    return label_of


def unused_lines(path: Path, names: Sequence[str], kinds: Sequence[str], flag: str = "--atlas.labels") -> list[str]:
    """Return the lines of a file of labels, or of a folder of such, whose labels are of no dictionary, in words.

    Args:
      path: as for ``read_labels``, which reads it first.
      names: names of dictionaries, such as "topk/k32".
      kinds: kinds of further dictionaries; all of their members' names pass.
      flag: flag that names the file, for messages.
    """
    return [
        f"{file.name}, line {number} ({row['dictionary'].strip()})"
        for file in sheets_in(path, flag)
        for number, row in enumerate(read_sheet(file, COLUMNS, flag), 2)
        if row["label"].strip()
        and not any(_is_of(row, name) for name in names)
        and row["dictionary"].strip().partition("/")[0] not in kinds
    ]


def write_label(path: Path, dictionary: str, feature: int, label: str, reviewer: str, flag: str) -> None:
    """Write a label to a file that ``read_labels`` reads; other lines and columns stay. Several processes may write.

    Args:
      path: the .csv file; made, with its folder, if it does not exist.
      dictionary: name of the dictionary, such as "topk/mlp_in.3".
      feature: index of the feature.
      label: the label; "" removes the line.
      reviewer: who wrote it.
      flag: flag that names the file, for messages.

    Raises:
      UserError: the existing file is not a file of labels; it is left unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may write labels at once: the lock spans reading and writing.
    with locked(path.with_name(f".{path.name}.lock")):
        rows = read_sheet(path, COLUMNS, flag) if path.exists() else []
        old = [row for row in rows if _means(row, dictionary, feature)]
        rows = [row for row in rows if not _means(row, dictionary, feature)]
        if label:
            entry = dict(feature=str(feature), label=label, reviewer=reviewer, dictionary=dictionary)
            rows.append((old[0] if old else {}) | entry)
        columns = list(dict.fromkeys([*COLUMNS, "dictionary", *(name for row in rows for name in row)]))
        write_sheet(path, rows, columns)


def write_sheet(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write lines with these columns to a .csv file; a column that a line does not have is empty there."""
    # Of the ends of lines in a cell, Python quotes its own alone: another one would cut the line.
    plain = [{name: re.sub("\r\n?", "\n", str(value)) for name, value in row.items()} for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())


def _means(row: Mapping[str, str], dictionary: str, feature: int) -> bool:
    """Return whether a line is of this feature; a line without a dictionary is of any."""
    return row["feature"].strip() == str(feature) and _is_of(row, dictionary)


def _is_of(row: Mapping[str, str], dictionary: str) -> bool:
    """Return whether a line is of a dictionary's feature; a line without a dictionary is of any."""
    return (row.get("dictionary") or "").strip() in ("", dictionary)
