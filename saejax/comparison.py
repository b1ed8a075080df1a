"""The binary ``compare``: print what differs between two workdirs in settings, package versions and results.

Results of current units are compared field by field; texts, examples and what depends on the machine's speed are not.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from saejax.errors import UserError
from saejax.results import Interval, load_summary
from saejax.runner import command, command_line
from saejax.runner.workspace import SUMMARY, current_units

ABOUT = """\
compare: prints what differs between two workdirs in settings, package versions and results.

  compare A B  two workdirs or folders of studies
  --debug  show the traceback of bad input too"""
_LEFT_OUT = {"seconds", "tokens_per_second", "matmul_flops_per_second", "disk_free_bytes", "examples"}  # of fields


def main() -> None:
    """Run the binary and exit with its status."""
    sys.exit(run(sys.argv))


def run(argv: Sequence[str]) -> int:
    """Run the binary and return its exit status."""
    flag_values = flags.FlagValues()
    command_line.define_common(flag_values)

    def work() -> None:
        _, *folders = flag_values(list(argv))
        if flag_values["help"].value:
            return print(ABOUT)
        if len(folders) != 2:
            raise UserError(f"compare takes two folders, got {len(folders)}: experiments.compare runs/a runs/b")
        print("\n".join(compare(*map(Path, folders))))

    return command.run_and_report(work, flag_values)


def compare(first: Path, second: Path) -> Iterator[str]:
    """Yield lines for every unit of either workdir: "same", the only workdir that has it, or the differences.

    Raises:
      UserError: a folder holds no finished unit, or a summary is damaged.
    """
    units = [_finished_units(folder) for folder in (first, second)]
    for unit in dict.fromkeys([*units[0], *units[1]]):
        if unit not in units[0] or unit not in units[1]:
            yield f"{unit}: only in {first if unit in units[0] else second}"
            continue
        summaries = [load_summary(each[unit]) for each in units]
        pair = [
            dict(_leaves(dict(settings=summary.config, packages=summary.packages, results=summary.results)))
            for summary in summaries
        ]
        names = [name for name in dict.fromkeys([*pair[0], *pair[1]]) if pair[0].get(name) != pair[1].get(name)]
        yield f"{unit}: {'changed' if names else 'same'}"
        for name in names:
            before, after = (values.get(name) for values in pair)
            yield f"  {name}: {_describe(before)} -> {_describe(after)}{_overlap(before, after)}"


def _finished_units(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: expected a workdir")
    if units := {unit: path for unit, path in current_units(folder).items() if (path / SUMMARY).exists()}:
        return units
    raise UserError(f"{folder} holds no finished unit: expected a workdir")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a result by their path; of a tuple of results each by its ``name``, ``feature`` or index."""
    if dataclasses.is_dataclass(value) and not isinstance(value, Interval):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from () if key in _LEFT_OUT else _leaves(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list | tuple) and any(dataclasses.is_dataclass(item) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{name}[{getattr(item, 'name', None) or getattr(item, 'feature', index)}]")
    elif not (isinstance(value, str) and value.count(" ") > 2):  # answers are words, sentences repeat figures
        yield name, value


def _describe(value: Any) -> str:
    if isinstance(value, Interval):
        return f"{value.mean:.4g} [{value.low:.4g}, {value.high:.4g}]"
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 48 else text[:45] + "..."


def _overlap(first: Any, second: Any) -> str:
    if isinstance(first, Interval) and isinstance(second, Interval):
        return f", intervals {'apart' if first.high < second.low or second.high < first.low else 'overlap'}"
    return ""
