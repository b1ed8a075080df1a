"""Rows of benchmarks: from JSON lines, Parquet and Arrow files, and from the Hugging Face hub through ``datasets``.

A *part* is one table: the only one of gsm8k and math, one per task of logic. Locally a part is a file; on the hub it
is the test split of a configuration of the data set.
"""

import dataclasses
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from saejax.errors import UserError
from saejax.tasks.files import decode, json_lines, read_bytes, shown, table_rows
from saejax.tasks.hub import hub_commit, hub_rows

FORMATS = (".jsonl", ".jsonl.gz", ".parquet", ".arrow")
SPLIT, TRAIN = "test", "train"
_FLAG = "--task.path"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a part.

    Attributes:
      fields: its columns.
      part: the part's name: the task of logic, "" for others.
      name: the row's own name, such as "test:17": file or configuration, and line or row from 1.
      where: the same in words, for messages.
    """

    fields: Mapping[str, Any]
    part: str
    name: str
    where: str

    def text(self, column: str, expected: Sequence[str]) -> str:
        """The text in a column, without the white space around it.

        Raises:
          UserError: there is no such column, or it holds no text; ``expected`` are the columns to name.
        """
        if column not in self.fields:
            has = ", ".join(map(repr, self.fields)) or "none"
            wanted = ", ".join(map(repr, expected))
            raise UserError(f"{self.where} has no column {column!r}, only {has}: expected {wanted}; fix or rename it")
        value = self.fields[column]
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{self.where}: {column!r} is {shown(value)}: expected text; fix or remove the row")
        return value.strip()


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a benchmark's rows come from.

    Attributes:
      files: local files by part; empty for the hub.
      hub: the data set's id on the hub; "" for local files.
      configurations: the data set's configurations by part; a part "" may have several.
      revision: of the data set.
      split: of the data set.
    """

    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    hub: str = ""
    configurations: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    revision: str = ""
    split: str = SPLIT

    def __str__(self) -> str:
        if self.hub:
            return f"{self.hub} at revision {self.revision}"
        folders = {str(path.parent) for path in self.files.values()}
        return str(next(iter(self.files.values()))) if len(self.files) == 1 else ", ".join(sorted(folders))

    def identity(self) -> list[str]:
        """Return what results depend on: the content of local files; of the hub, the commit."""
        if self.hub:
            return [
                self.hub,
                hub_commit(self.hub, self.revision),
                *(f"{part}={names}" for part, names in self.configurations.items()),
            ]
        return [f"{part}={hashlib.sha256(_content(path)).hexdigest()}" for part, path in self.files.items()]

    def rows(self) -> Iterator[Row]:
        """Every row, part by part.

        Raises:
          UserError: a file is missing or damaged, or the hub cannot be reached.
        """
        for part, path in self.files.items():
            yield from _local_rows(part, path)
        commit = hub_commit(self.hub, self.revision) if self.hub else ""
        for part, names in self.configurations.items():
            for name in names:
                for number, fields in enumerate(hub_rows(self.hub, name, commit, self.split), start=1):
                    yield Row(fields, part, f"{name}:{number}", f"{self.hub}, {name}, row {number}")


def find(path: str, benchmark: str, several: bool, parts: Sequence[str]) -> dict[str, Path] | None:
    """The local files of a benchmark, by part; None if ``path`` is not local.

    Args:
      path: ``--task.path``.
      benchmark: its name.
      several: whether several benchmarks were asked for, so that ``path`` must be a folder that holds each of them.
      parts: the tasks of logic; ("",) for others.

    Raises:
      UserError: there is no such file, it is of another format, or a folder lacks a part or has it twice.
    """
    place = Path(path).expanduser()
    if not place.exists():
        if path.startswith((".", "/", "~")) or path.count("/") != 1 or path.endswith(FORMATS):
            raise UserError(
                f"{_FLAG}={path} does not exist: expected a file ({', '.join(FORMATS)}), a folder of such files, or "
                "the hub id of a data set, such as openai/gsm8k"
            )
        return None
    if place.is_file() and several:
        raise UserError(
            f"{_FLAG}={path} is one file, but several benchmarks were asked for: expected a folder with a file or a "
            "folder named after each; or run them one by one"
        )
    if place.is_dir():
        named = [place / benchmark, *(place / f"{benchmark}{ending}" for ending in FORMATS)]
        found = [candidate for candidate in named if candidate.exists()]
        if several and not found:
            raise UserError(
                f"{_FLAG}={path} has nothing named {benchmark}: expected a folder {benchmark}, or a file {benchmark} "
                f"ending in {', '.join(FORMATS)}"
            )
        place = found[0] if found else place
    return _files_of_folder(place, parts) if place.is_dir() else _only_file(place, parts)


def _only_file(path: Path, parts: Sequence[str]) -> dict[str, Path]:
    if not path.name.endswith(FORMATS):
        raise UserError(f"{_FLAG}={path} is of an unknown format: expected one of {', '.join(FORMATS)}")
    if parts == ("",):
        return {"": path}
    if _stem(path) not in parts:
        raise UserError(
            f"{path} is not named after a task of logic: expected a file or files named {', '.join(parts)}, with "
            f"{', '.join(FORMATS)}"
        )
    return {_stem(path): path}


def _files_of_folder(folder: Path, parts: Sequence[str]) -> dict[str, Path]:
    """One file per part; of a benchmark of one part, the file named after the test split, or the only one."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name.endswith(FORMATS))
    if parts == ("",):
        tests = [path for path in files if _stem(path).split("-")[0] == SPLIT] or files
        if len(tests) != 1:
            raise UserError(
                f"{folder} has {len(tests)} data files: expected one named {SPLIT}, or one alone, ending in "
                f"{', '.join(FORMATS)}; name the file with {_FLAG}"
            )
        return {"": tests[0]}
    found = {part: [path for path in files if _stem(path) == part] for part in parts}
    for part, paths in found.items():
        if len(paths) != 1:
            raise UserError(
                f"{folder} has {len(paths)} files named {part}: expected one for each of {', '.join(parts)}, ending in "
                f"{', '.join(FORMATS)}"
            )
    return {part: paths[0] for part, paths in found.items()}


def _stem(path: Path) -> str:
    """The file's name without its ending."""
    return next(path.name.removesuffix(ending) for ending in FORMATS if path.name.endswith(ending))


def _content(path: Path) -> bytes:
    return read_bytes(path, _FLAG, "name a file, a folder or a hub id")


def _local_rows(part: str, path: Path) -> Iterator[Row]:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        unit, numbered = "line", json_lines(decode(_content(path), path), path, '{"question": "...", "answer": "..."}')
    else:
        unit, numbered = "row", enumerate(table_rows(path, io.BytesIO(_content(path))), start=1)
    for number, fields in numbered:
        where = f"{path}, {unit} {number}"
        if not isinstance(fields, dict):
            raise UserError(f"{where} is {shown(fields)}: expected an object with a field per column")
        yield Row(fields, part, f"{_stem(path)}:{number}", where)


def training_files(files: Mapping[str, Path], parts: Sequence[str]) -> dict[str, Path]:
    """The files of the train split that lie beside a benchmark's local files; none of one with several parts."""
    if parts != ("",):
        return {}
    folder = files[""].parent
    beside = sorted(path for path in folder.iterdir() if path.name.endswith(FORMATS))
    return {_stem(path): path for path in beside if _stem(path).split("-")[0] == TRAIN}
