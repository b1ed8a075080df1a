"""A table of a study's report: a list of figures, shown on the page, and as CSV beside it."""

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from saejax.page.tables import MISSING, Table, interval, significant
from saejax.results import Interval, to_json
from saejax.studies.results import StudyFigures


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table of a report.

    Attributes:
      name: of its field in ``StudyFigures``, and of its CSV file.
      caption: what it shows.
      columns: heading -> a cell's text, of a figure.
      words: headings of the columns that hold words.
      note: a line below.
      cards: whether rows become cards on a narrow screen, which suits a few columns of words.
    """

    name: str
    caption: str
    columns: Mapping[str, Callable[[Any], str]]
    words: frozenset[str] = frozenset()
    note: str = ""
    cards: bool = False

    def table(self, figures: StudyFigures) -> Table:
        """Return the rows as text."""
        rows = [(figure,) for figure in getattr(figures, self.name)]
        return Table.of(self.caption, rows, self.columns, self.words, self.cards, self.note)

    def csv(self, figures: StudyFigures) -> str:
        """Return all fields of the figures; an interval is three columns, what is not known is empty."""
        lines = [_flat(to_json(figure)) for figure in getattr(figures, self.name)]
        names = list(dict.fromkeys(name for line in lines for name in line))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return text.getvalue()


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping):
            cells |= {f"{name}.{end}": inner for end, inner in value.items()}
        else:
            cells[name] = ",".join(map(str, value)) if isinstance(value, Sequence) and type(value) is not str else value
    return cells


def listed(items: Sequence[str]) -> str:
    """Return names in a cell; of a long list the ends."""
    items = [*items[:2], "...", items[-1]] if len(items) > 4 else list(items)
    return ", ".join(items) or MISSING


def quoted(words: Sequence[str]) -> str:
    """Return words in quotation marks."""
    return ", ".join(f"\u201c{word}\u201d" for word in words) or MISSING


def points(value: Interval | None) -> str:
    """Return an interval of shares, in percentage points."""
    return interval(value, 1, 100)


def size(value: int | None) -> str:
    """Return a number of bytes as a cell's text."""
    if value is None:
        return MISSING
    unit, scale = ("GB", 1e9) if value >= 1e9 else ("MB", 1e6) if value >= 1e6 else ("kB", 1e3)
    return f"{significant(value / scale)} {unit}"
