"""The binary ``compare``: what differs between two workdirs, or two studies, in settings, figures and verdicts.

Units are compared by their place, such as "ablate/topk", and their results field by field, as the classes that their
stages returned. Two figures with intervals are *apart* if these do not overlap. Texts that say in words what figures
say, examples, and what depends on the machine's speed alone, are left out.
"""

import dataclasses
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from absl import flags

from saejax import command, command_line
from saejax.buckets.bucket import Bucket, is_bucket
from saejax.buckets.listing import fetch
from saejax.errors import UserError
from saejax.files import write_json, write_text
from saejax.results import Interval, Summary, load_summary, to_json
from saejax.workspace import SUMMARY, package_versions

ABOUT = """\
compare: what differs between two workdirs in settings, figures and verdicts.

  compare A B  two workdirs, units of them, or folders of studies; workdirs and studies also of a bucket (s3://, gs://)
  --out=DIR  write compare.json and index.html there, too
  --lines=N  figures of each unit that are shown, those that changed most first (default: 12)
  --debug  show the traceback of bad input too"""
_SPEED = {"seconds", "tokens_per_second", "matmul_flops_per_second", "disk_free_bytes"}  # of fields
_LEFT_OUT = _SPEED | {"examples", "unparsed_examples"}
_NOTHING = f"{{}} holds no finished unit (no {SUMMARY}): expected a workdir"
_ORDER = ("setting", "package", "verdict", "figure")


@dataclasses.dataclass(frozen=True)
class Difference:
    """A value that differs."""

    kind: Literal["setting", "package", "verdict", "figure"]  #: what it is
    name: str  #: where it stands, such as "train.k" or "verdict.dictionaries.tested.capital.random.answer"
    first: Any  #: as JSON; None where there is none
    second: Any  #: likewise
    apart: bool | None  #: whether the intervals of a figure do not overlap; None where it has none
    size: float  #: of a figure: difference over the larger of both, 0 to 2; 0 of lists, 2 of all else


@dataclasses.dataclass(frozen=True)
class UnitComparison:
    """A unit of two workdirs."""

    unit: str  #: its place in both
    state: Literal["same", "changed", "only in the first", "only in the second"]  #: how they compare
    changes: tuple[Difference, ...]  #: what differs, settings first; figures that changed most before others


def main(argv: Sequence[str] | None = None) -> None:
    """The binary: exits with its status."""
    sys.exit(run(sys.argv if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Like ``main``, but returns the exit status."""
    own = flags.FlagValues()
    flags.DEFINE_string("out", "", "", flag_values=own)
    flags.DEFINE_integer("lines", 12, "", lower_bound=0, flag_values=own)
    command_line.define_common(own)

    def work() -> None:
        _, *folders = own(list(argv))
        if own["help"].value:
            return print(ABOUT)
        if len(folders) != 2:
            raise UserError(f"compare takes two folders, got {len(folders)}: experiments.compare runs/a runs/b")
        with tempfile.TemporaryDirectory() as local:
            found = compare(*(_local(folder, Path(local) / str(at)) for at, folder in enumerate(folders)))
        print("\n".join(lines(found, int(own["lines"].value or 0))))
        if own["out"].value:
            write(found, folders, Path(own["out"].value))

    return command.ended(work, own)


def _local(folder: str, copies: Path) -> Path:
    """A folder; of one in a bucket, another with copies of its summaries."""
    if not is_bucket(folder):
        return Path(folder)
    fetch(Bucket(folder), copies, lambda name: PurePosixPath(name).name == SUMMARY)
    if not copies.exists():
        raise UserError(_NOTHING.format(folder))
    return copies


def compare(first: Path, second: Path) -> list[UnitComparison]:
    """Every unit of either folder.

    Args:
      first, second: workdirs, units of them, or folders of studies.

    Raises:
      UserError: a folder holds no finished unit, or a summary is damaged.
    """
    units = [_units(first), _units(second)]
    found = []
    for unit in dict.fromkeys([*units[0], *units[1]]):
        pair = [own.get(unit) for own in units]
        if pair[0] and pair[1]:
            changes = _changes(load_summary(pair[0]), load_summary(pair[1]))
            found.append(UnitComparison(unit, "changed" if changes else "same", changes))
        else:
            found.append(UnitComparison(unit, "only in the first" if pair[0] else "only in the second", ()))
    return found


def _units(folder: Path) -> dict[str, Path]:
    """The finished units in a folder, by place, in the order in which they were started."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: expected a workdir")
    found = {
        path.parent.relative_to(folder).as_posix(): path.parent
        for path in sorted(folder.rglob(SUMMARY))
        if "superseded" not in path.relative_to(folder).parts
    }
    if not found:
        raise UserError(_NOTHING.format(folder))
    return found


def _changes(first: Summary, second: Summary) -> tuple[Difference, ...]:
    """What differs, sorted."""
    pairs = {
        "setting": (_settings(first.config), _settings(second.config)),
        "package": (first.packages, second.packages),
        "result": (dict(_leaves(first.results)), dict(_leaves(second.results))),
    }
    found = [
        _change(kind, name, values[0].get(name), values[1].get(name))
        for kind, values in pairs.items()
        for name in dict.fromkeys([*values[0], *values[1]])
        if values[0].get(name) != values[1].get(name)
    ]
    return tuple(sorted(found, key=lambda one: (_ORDER.index(one.kind), not one.apart, -one.size)))


def _settings(data: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in data.items():
        found |= _settings(value, f"{before}{name}.") if isinstance(value, Mapping) else {before + name: value}
    return found


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a result by their place; of a tuple of results each by its ``name``, ``feature`` or index."""
    if dataclasses.is_dataclass(value) and not isinstance(value, Interval):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from () if key in _LEFT_OUT else _leaves(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list | tuple) and any(dataclasses.is_dataclass(item) for item in value):
        for index, item in enumerate(value):
            own = getattr(item, "name", None) or getattr(item, "feature", index)
            yield from _leaves(item, f"{name}[{own}]")
    elif not (isinstance(value, str) and value.count(" ") > 2):  # answers are words, sentences repeat figures
        yield name, value


def _change(kind: str, name: str, first: Any, second: Any) -> Difference:
    one, two = (value.mean if isinstance(value, Interval) else value for value in (first, second))
    apart = None
    if isinstance(first, Interval) and isinstance(second, Interval):
        apart = first.high < second.low or second.high < first.low
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (one, two))
    size = abs(one - two) / max(abs(one), abs(two)) if numbers else 0.0 if isinstance(one, list | tuple) else 2.0
    if kind == "result":
        words = any(isinstance(value, bool | str) for value in (one, two))
        kind = "verdict" if words else "figure"
    return Difference(kind, name, to_json(first), to_json(second), apart, size if math.isfinite(size) else 2.0)  # type: ignore[arg-type]


def lines(found: Sequence[UnitComparison], most: int) -> list[str]:
    """A comparison as a table for a terminal.

    Args:
      found: from ``compare``.
      most: figures of a unit.
    """
    texts: list[str] = []
    for one in found:
        texts.append(f"{one.unit}: {one.state}")
        shown = _shown(one, most)
        rows = [
            (change.kind, change.name, _said(change.first), _said(change.second), _apart(change)) for change in shown
        ]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
        texts += ["  " + "  ".join(map(str.ljust, row, [*widths, 0])).rstrip() for row in rows]
        if len(one.changes) > len(shown):
            texts.append(f"  and {len(one.changes) - len(shown)} figures more")
    return texts


def _shown(one: UnitComparison, most: int) -> list[Difference]:
    """All that is no figure, and the first figures."""
    figures = [change for change in one.changes if change.kind == "figure"]
    return [change for change in one.changes if change.kind != "figure"] + figures[:most]


def _apart(change: Difference) -> str:
    return "" if change.apart is None else "apart" if change.apart else "intervals overlap"


def _said(value: Any) -> str:
    """A value in a cell."""
    if isinstance(value, Mapping) and value.keys() == {"mean", "low", "high"}:
        return f"{value['mean']:.4g} [{value['low']:.4g}, {value['high']:.4g}]"
    if isinstance(value, float):
        return f"{value:.5g}"
    text = "none" if value is None else ",".join(map(_said, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 48 else text[:45] + "..."


def write(found: Sequence[UnitComparison], folders: Sequence[str], out: Path) -> None:
    """Writes ``compare.json``, with every change, and ``index.html``.

    Args:
      found: from ``compare``.
      folders: both, for the page.
      out: made if it does not exist.
    """
    from saejax.page.blocks import Text
    from saejax.page.document import Section, to_html
    from saejax.page.tables import Table

    out.mkdir(parents=True, exist_ok=True)
    sections = []
    for one in found:
        rows = tuple((x.name, _said(x.first), _said(x.second), _apart(x), x.kind) for x in one.changes)
        columns = ("Name", "First", "Second", "Intervals", "Kind")
        table = Table(one.unit, columns, rows, frozenset({1, 2, 3, 4}), stack=False)
        sections.append(Section(one.unit, (table if rows else Text(f"{one.state.capitalize()}."),)))
    lead = (f"First: {folders[0]}. Second: {folders[1]}.",)
    footer = f"Written by saejax {package_versions().get('saejax', '')}.".strip()
    write_text(out / "index.html", to_html("What differs between two runs", lead, sections, footer))
    write_json(out / "compare.json", dict(first=folders[0], second=folders[1], units=to_json(list(found))))
