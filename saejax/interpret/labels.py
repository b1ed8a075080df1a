"""When a detector is a label, and labels that are given by hand."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from saejax.dictionaries.labels import Label
from saejax.errors import UserError

_COLUMNS = ("feature", "label", "note", "reviewer")
_NEAR = 100  # random directions whose firing rates are nearest, which a feature's label has to beat
_LEVEL = 0.95  # of them, so many


def bars(rate: np.ndarray, random_rate: np.ndarray, random_f1: np.ndarray) -> np.ndarray:
    """The F1 that a detector has to beat: what 95 % of the random directions that fire about as often stay below.

    Args:
      rate: how often each feature fires.
      random_rate, random_f1: of the random directions, with the F1 of the detector chosen for each.
    """
    if not len(random_rate):
        return np.ones(len(rate))
    order = np.argsort(random_rate, kind="stable")
    sorted_rate, sorted_f1 = random_rate[order], random_f1[order]
    near = min(_NEAR, len(order))
    start = np.clip(np.searchsorted(sorted_rate, rate) - near // 2, 0, len(order) - near)
    return np.quantile(sorted_f1[start[:, None] + np.arange(near)], _LEVEL, axis=1, method="higher")


def partners(rate: np.ndarray, labelled: Sequence[bool]) -> np.ndarray:
    """For every feature, another one with a detector whose firing rate is next to its own; -1 where there is none."""
    order = np.argsort(rate, kind="stable")
    has = np.flatnonzero(np.asarray(labelled)[order])
    found = np.full(len(rate), -1)
    if len(has) > 1:
        after = has[np.searchsorted(has, np.arange(len(order)), side="right") % len(has)]
        found[order] = order[after]
    return found


def read_labels(
    path: Path, dictionary: str, features: int, several: bool, flag: str = "--atlas.labels"
) -> dict[int, Label]:
    """Labels given by hand.

    Args:
      path: a .csv file with the columns feature, label, note, reviewer and, where there are several dictionaries,
        dictionary.
      dictionary: whose labels are wanted, such as "topk/k32".
      features: how many it has.
      several: whether others are interpreted, too.
      flag: that names the file, for messages.

    Raises:
      UserError: the file cannot be read, a column is missing, or a feature does not exist or comes twice.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "it is not a .csv file in UTF-8"
        raise UserError(f"{flag}={path} cannot be read ({reason}): name a .csv file") from None
    wanted = (*_COLUMNS, "dictionary") if several else _COLUMNS
    missing = [name for name in wanted if rows and name not in rows[0]]
    if missing:
        raise UserError(f"{flag}={path} has no column {', '.join(missing)}: expected {', '.join(wanted)}")
    found: dict[int, Label] = {}
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise UserError(f"{path}, line {number} has not as many cells as there are columns: quote commas in it")
        if (row.get("dictionary") or dictionary) != dictionary:
            continue
        text = row["feature"].strip()
        if not text.isdecimal() or int(text) >= features:
            raise UserError(
                f"{path}, line {number}: there is no feature {text!r} in {dictionary}: expected 0 to {features - 1}"
            )
        if int(text) in found:
            raise UserError(f"{path}, line {number}: feature {text} has a label already: keep one line of it")
        if row["label"].strip():
            found[int(text)] = Label(row["label"].strip(), row["reviewer"].strip() or "by hand", row["note"].strip())
    return found
