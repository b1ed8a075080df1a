"""A table of a study's report: a list of figures, shown on the page, and as CSV beside it.

The class of a line says how it is shown: a field made by ``column`` or ``joined`` is a column of the table, in the
order of fields; others are in the files alone.
"""

import csv
import dataclasses
import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar, dataclass_transform, get_args, get_type_hints

from saejax.page.tables import MISSING, Table, interval, significant
from saejax.results import Interval, to_json

T = TypeVar("T", bound="Figures")
_NUMBERS = {int, float, Interval}


def column(heading: str, show: Callable[[Any], str] = str) -> Any:
    """Return a dataclass field that is a column of a table; numbers and intervals are set flush right.

    Args:
      heading: of the column.
      show: returns a cell's text of the field's value.
    """
    return dataclasses.field(metadata=dict(heading=heading, show=show))


def joined(heading: str, show: Callable[[Any], str], words: bool = False) -> Any:
    """Return a dataclass field whose column puts several fields together.

    Args:
      heading: of the column.
      show: returns a cell's text of the whole line.
      words: whether it is set flush left, as words.
    """
    return dataclasses.field(metadata=dict(heading=heading, show=show, words=words))


@dataclass_transform(frozen_default=True, field_specifiers=(column, joined))
class Figures:
    """A line of a table, a frozen dataclass: the docstring of a subclass is the table's caption and its note.

    Its argument ``cards`` says that lines become cards on a narrow screen, which suits a few columns of words.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    _cards: ClassVar[bool]

    def __init_subclass__(cls, cards: bool = False) -> None:
        dataclasses.dataclass(frozen=True)(cls)
        cls._cards = cards

    @classmethod
    def table(cls, lines: Sequence[Any]) -> Table:
        """Return the lines as text."""
        columns, words, hints = dict[str, Callable[[Any], str]](), set(), get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if how := field.metadata:
                is_joined = "words" in how
                columns[how["heading"]] = how["show"] if is_joined else _shows(field.name, how["show"])
                if how["words"] if is_joined else not _NUMBERS & _types(hints[field.name]):
                    words.add(how["heading"])
        caption, _, note = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")
        note = note.replace("\n", " ")
        return Table.of(caption.removesuffix("."), [(line,) for line in lines], columns, words, cls._cards, note)


def select(lines: Sequence[T], **fields: str) -> list[T]:
    """Return the lines whose fields have these values."""
    return [line for line in lines if all(getattr(line, name) == value for name, value in fields.items())]


def as_csv(lines: Sequence[Figures]) -> str:
    """Return all fields of the lines, at least one; an interval is three columns, what is not known is empty."""
    hints, names = get_type_hints(type(lines[0])), list[str]()
    for field in dataclasses.fields(lines[0]):
        ends = [end.name for end in dataclasses.fields(Interval)] if Interval in _types(hints[field.name]) else []
        names += [f"{field.name}.{end}" for end in ends] or [field.name]
    text = io.StringIO()
    # An interval that is not known is one empty field, in place of the three columns.
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(_flat(to_json(line)) for line in lines)
    return text.getvalue()


def _types(hint: Any) -> set[Any]:
    return {hint, *get_args(hint)}


def _shows(name: str, show: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda line: show(getattr(line, name))


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


def duration(seconds: float) -> str:
    """Return a time in words: "50 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
