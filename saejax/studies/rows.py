"""The rows of a study: each a flag file, which the pipeline runs in a workdir of its own.

A row is a model with its benchmarks, behaviours and dictionaries, all in one file of flags, as ``experiments.pipeline``
takes them. Flags of the study's own command line come after every file's, and win.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from saejax.config import Configs
from saejax.errors import Faults, UserError
from saejax.runner.command_line import flag_error, read_configs, stage_flags

ENDING = ".flags"


@dataclasses.dataclass(frozen=True)
class StudyRow:
    """A row of a study."""

    name: str  #: of its file, without the ending
    argv: tuple[str, ...]  #: its flags, without ``--workdir``
    configs: Configs  #: the groups of configuration that they make


def read_rows(paths: Sequence[str], common: Sequence[str]) -> list[StudyRow]:
    """Return the rows that files describe, in their order.

    Args:
      paths: flag files, and folders of them.
      common: flags for every row, which win over its file's.

    Raises:
      UserError: there is no such file, two have one name, or flags are wrong, of which all rows are named.
    """
    files = [file for path in paths if path for file in _files(Path(path))]
    if not files:
        raise UserError("--rows names no flag file: give files that end in .flags, or a folder of them")
    counts = Counter(file.stem for file in files)
    for name, count in counts.items():
        if count > 1:
            places = ", ".join(str(file) for file in files if file.stem == name)
            raise UserError(f"{count} rows are called {name} ({places}): each needs a name of its own, rename a file")
    faults, rows = Faults("--rows", "cannot be run", "rows"), list[StudyRow]()
    for file in files:
        with faults.collect(file.stem):
            rows.append(_read_row(file, common))
    faults.refuse()
    return rows


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(path.glob(f"*{ENDING}"))
        if not files:
            raise UserError(f"--rows={path} has no file that ends in {ENDING}: expected one for each row of the study")
        return files
    if not path.is_file() or path.suffix != ENDING:
        raise UserError(f"--rows={path} is no flag file: expected a file that ends in {ENDING}, or a folder of them")
    return [path]


def _read_row(file: Path, common: Sequence[str]) -> StudyRow:
    argv, values = (f"--flagfile={file}", *common), stage_flags()
    try:
        configs = read_configs(values, ["row", *argv])
    except (flags.Error, UserError) as error:
        message = flag_error(error) if isinstance(error, flags.Error) else str(error)
        raise UserError(f"row {file.stem} ({file}): {message}") from None
    for name in ("workdir", "take_over", "unit", "help"):
        if values[name].present:
            raise UserError(f"{file}: --{name} is no flag of a row: a row works in a folder of the study")
    return StudyRow(file.stem, argv, configs)
