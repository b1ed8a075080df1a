"""Tables and figures' numbers as text.

A cell is plain text. Escaping is done on the way out, here for Markdown and in ``page.html.jinja`` for HTML, so that a
token such as ``<b>`` or ``|`` arrives on the page as itself. Numbers use a true minus sign and intervals read
``mean [low, high]``.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from saejax.results import Interval
from saejax.unicode import visible

MISSING = "–"


def number(value: float | None, digits: int = 2, scale: float = 1.0) -> str:
    """Return ``scale`` times a number, ``digits`` decimals; None and NaN are a dash. ``number(-0.5)`` is "−0.50"."""
    if value is None or math.isnan(value):
        return MISSING
    text = f"{scale * value:,.{digits}f}"
    return (text[1:] if float(text.replace(",", "")) == 0 and text.startswith("-") else text).replace("-", "−")


def significant(value: float | None, digits: int = 3) -> str:
    """Return a number with ``digits`` significant digits: ``significant(0.00123456)`` is "0.00123"."""
    if value is None or math.isnan(value) or value == 0 or math.isinf(value):
        return number(value, 0)
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return number(value, max(decimals, 0)) if decimals <= 6 else f"{value:.{digits - 1}e}".replace("-", "−")


def percent(share: float | None, digits: int = 0) -> str:
    """Return a share as a percentage: ``percent(0.875, 1)`` is "87.5 %", with a space that does not break."""
    text = number(share, digits, 100)
    return text if text == MISSING else text + "\u00a0%"


def interval(value: Interval | None, digits: int = 2, scale: float = 1.0) -> str:
    """Return an interval times ``scale``: "3.10 [2.80, 3.40]"; brackets stay on one line, None is a dash."""
    if value is None:
        return MISSING
    mean, low, high = (number(bound, digits, scale) for bound in (value.mean, value.low, value.high))
    return f"{mean} [{low},\u00a0{high}]"


def count(value: int | None) -> str:
    """Return a count: "1,234"; None is a dash."""
    return MISSING if value is None else f"{value:,}"


def answer(value: bool | None, unknown: str = MISSING) -> str:
    """Return a yes or no; ``unknown`` for None."""
    return unknown if value is None else "yes" if value else "no"


def escape_markdown(text: str) -> str:
    """Return the text on one line, so that CommonMark shows it literally, in a paragraph or in a table's cell."""
    text = re.sub(r"([\\`*\[\]<>|~$])", r"\\\1", visible(text).replace("&", "&amp;"))
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
    # At the start of a line # + - = would open a heading or a list, and so would "1. ".
    text = re.sub(r"^(\s*)([#+\-=])", r"\1\\\2", text)
    return re.sub(r"^(\s*\d+)([.)])(?=\s|$)", r"\1\\\2", text)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table."""

    caption: str  #: its content, one line
    columns: tuple[str, ...]  #: the headings
    #: plain text, as many cells in each as there are columns. The first cell names the row.
    rows: tuple[tuple[str, ...], ...]
    #: the indices of the columns that hold words and are set flush left; the others are numbers. The first always holds
    #: words.
    words: frozenset[int] = frozenset()
    #: on a narrow screen each row becomes a card of labelled lines; otherwise the table scrolls sideways and its first
    #: column stays. Cards suit a table of a few rows.
    stack: bool = True
    note: str = ""  #: a line below it
    kind = "table"

    @classmethod
    def of(
        cls,
        caption: str,
        items: Iterable[Sequence[Any]],
        columns: Mapping[str, Callable[..., str]],
        words: Collection[str] = (),
        stack: bool = True,
        note: str = "",
    ) -> "Table":
        """Return a row for each of some items.

        Args:
          caption: as above.
          items: what a cell's text is made from, as its arguments.
          columns: heading -> makes the text.
          words: headings of the columns, but the first, that hold words.
          stack: as above.
          note: as above.
        """
        rows = tuple(tuple(show(*item) for show in columns.values()) for item in items)
        flush_left = frozenset(place for place, heading in enumerate(columns) if heading in words)
        return cls(caption, tuple(columns), rows, flush_left, stack, note)

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.caption!r}: {len(self.columns)} columns, but a row of {len(row)}: {row}")

    def is_words(self, column: int) -> bool:
        """Return whether a column, by its index, holds words."""
        return column == 0 or column in self.words

    def markdown(self) -> str:
        """Return the table in GitHub's Markdown, caption above and note below."""
        rules = [":--" if self.is_words(i) else "--:" for i in range(len(self.columns))]
        lines = [[escape_markdown(cell) for cell in row] for row in (self.columns, *self.rows)]
        lines.insert(1, rules)
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        note = f"\n\n{escape_markdown(self.note)}" if self.note else ""
        return f"**{escape_markdown(self.caption)}**\n\n{table}{note}"
