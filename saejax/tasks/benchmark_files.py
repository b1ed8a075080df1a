"""Rows of benchmarks: from local files laid out as they are published, and from the hub through ``datasets``.

A *part* is one table: the only one of gsm8k and math, one per task of logic. On the hub it is a split of a
configuration of the data set. Locally it is one file, or the shards of one split, in any of these layouts:

- a file named by the user, or the only data file of a folder;
- ``test.jsonl``, ``Test.json``, ``ARC-Easy-Test.jsonl``: a file whose name holds the split's name;
- ``test-00000-of-00002.parquet``, ...: shards, in the folder itself, in ``data/`` or in the configuration's folder, as
  in a snapshot of a hub repository (``main/`` of GSM8K, ``TASK/`` of BIG-Bench Hard);
- ``test/data-00000-of-00001.arrow``: what ``datasets`` saves to disk;
- ``SUBJECT/test-00000-of-00001.parquet``: a folder for each subject, as in MATH's repositories on the hub;
- ``bbh/TASK.json``: an object whose ``examples`` are the rows, as in the repository of BIG-Bench Hard.
"""

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from saejax.errors import UserError
from saejax.tasks import word_problems
from saejax.tasks.files import decode, json_lines, read_bytes, shown, table_rows
from saejax.tasks.hub import hub_commit, hub_rows

FORMATS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet", ".arrow")
TEST, TRAIN = ("test",), ("train",)  #: names of a split, the preferred one first
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of ``datasets``
_LISTS = ("examples", "data", "rows")  # where an object in a .json file keeps its rows
_SHARD = re.compile(r"(.*?)-(\d{5})-of-(\d{5})")
_FLAG = "--task.path"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a part."""

    fields: Mapping[str, Any]  #: its columns
    part: str  #: the part's name: the task of logic, "" for others
    name: str  #: the row's own name, such as "test:17": file or configuration, and line or row from 1
    where: str  #: the same in words, for messages

    def text(self, column: str, expected: Sequence[str]) -> str:
        """Return the text in a column, without the white space around it.

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
    """The source of a benchmark's rows."""

    #: local files by part, the shards of one table in order; empty for the hub.
    files: Mapping[str, Sequence[Path]] = dataclasses.field(default_factory=dict)
    hub: str = ""  #: the data set's id on the hub; "" for local files
    #: the data set's configurations by part; a part "" may have several.
    configurations: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    revision: str = ""  #: of the data set
    split: str = TEST[0]  #: of the data set
    is_generated: bool = False  #: whether the rows are generated from templates (``word_problems``) rather than read

    def __str__(self) -> str:
        if self.is_generated:
            return "templates of saejax"
        if self.hub:
            return f"{self.hub} at revision {self.revision}"
        paths = [path for shards in self.files.values() for path in shards]
        return str(paths[0]) if len(paths) == 1 else ", ".join(sorted({str(path.parent) for path in paths}))

    def identity(self) -> list[str]:
        """Return the text that results depend on: hashes of local files or templates, or the commit on the hub."""
        if self.is_generated:
            return [hashlib.sha256(word_problems.read_data()).hexdigest(), str(word_problems.PER_TEMPLATE)]
        if self.hub:
            return [
                self.hub,
                hub_commit(self.hub, self.revision),
                *(f"{part}={names}" for part, names in self.configurations.items()),
            ]
        hashes = {
            part: [hashlib.sha256(_content(path)).hexdigest() for path in self.files[part]] for part in self.files
        }
        return [f"{part}={','.join(shards)}" for part, shards in hashes.items()]

    def rows(self) -> Iterator[Row]:
        """Yield every row, part by part.

        Raises:
          UserError: a file is missing or damaged, or the hub cannot be reached.
        """
        for number, fields in enumerate(word_problems.make_questions() if self.is_generated else (), start=1):
            yield Row(fields, "", f"made:{number:04d}", f"question {number} of {self}")
        for part, paths in self.files.items():
            stems = [_stem(path) for path in paths]
            for path, stem in zip(paths, stems, strict=True):
                # Files of one name in several folders would give two rows the same name.
                unique = stem if stems.count(stem) == 1 and part in ("", stem) else f"{path.parent.name}/{stem}"
                yield from _local_rows(part, path, unique)
        # By commit, so that rows and identity are of the same state even if the branch moves in between.
        commit = hub_commit(self.hub, self.revision) if self.hub else ""
        for part, names in self.configurations.items():
            for name in names:
                for number, fields in enumerate(hub_rows(self.hub, name, commit, self.split), start=1):
                    yield Row(fields, part, f"{name}:{number}", f"{self.hub}, {name}, row {number}")


def find(
    path: str,
    benchmark: str,
    several: bool,
    parts: Sequence[str],
    configurations: Sequence[str] = (),
    splits: Sequence[str] = TEST,
    subjects: Sequence[str] = (),
) -> dict[str, tuple[Path, ...]] | None:
    """Return the local files of a benchmark, by part; None if ``path`` is not local.

    Args:
      path: ``--task.path``.
      benchmark: its name.
      several: whether several benchmarks were asked for, so that ``path`` must be a folder that holds each of them.
      parts: the tasks of logic; ("",) for others.
      configurations: of the data set on the hub, which name folders of its repository.
      splits: names of the split to take, the preferred one first.
      subjects: folders that make up the table where all of them are there.

    Raises:
      UserError: there is no such file, it is of another format, a shard is missing, or a folder lacks a part or has it
        twice.
    """
    place = Path(path).expanduser()
    if not place.exists():
        # What cannot be the id of a data set is a file that is missing: the hub is not asked for it.
        if path.startswith((".", "/", "~")) or path.partition("@")[0].count("/") != 1 or path.endswith(FORMATS):
            raise UserError(
                f"{_FLAG}={path} does not exist: expected a file ({', '.join(FORMATS)}), a folder of such files, or "
                "the hub id of a data set, such as openai/gsm8k or openai/gsm8k@REVISION"
            )
        return None
    if place.is_file() and several:
        raise UserError(
            f"{_FLAG}={path} is one file, but several benchmarks were asked for: expected a folder with a file or a "
            "folder named after each; or run them one by one"
        )
    if place.is_dir():
        named = [place / benchmark, *(place / f"{benchmark}{ending}" for ending in FORMATS)]
        existing = [candidate for candidate in named if candidate.exists()]
        if several and not existing:
            raise UserError(
                f"{_FLAG}={path} has nothing named {benchmark}: expected a folder {benchmark}, or a file {benchmark} "
                f"ending in {', '.join(FORMATS)}"
            )
        place = existing[0] if existing else place
    if place.is_file():
        return _only_file(place, parts)
    if parts == ("",):
        return {"": _table_of_folder(place, configurations, splits, subjects)}
    return {part: _part_of_folder(place, part, parts, splits) for part in parts}


def _only_file(path: Path, parts: Sequence[str]) -> dict[str, tuple[Path, ...]]:
    if not path.name.endswith(FORMATS):
        raise UserError(f"{_FLAG}={path} is of an unknown format: expected one of {', '.join(FORMATS)}")
    if parts == ("",):
        return {"": (path,)}
    if _stem(path) not in parts:
        raise UserError(
            f"{path} is not named after a task of logic: expected a file or files named {', '.join(parts)}, with "
            f"{', '.join(FORMATS)}"
        )
    return {_stem(path): (path,)}


def _table_of_folder(
    folder: Path, configurations: Sequence[str], splits: Sequence[str], subjects: Sequence[str] = ()
) -> tuple[Path, ...]:
    """Return the files of the wanted split; a folder with one data file may name it as it likes."""
    places = [folder, folder / "data", *(folder / name for name in configurations)]
    # The preferred split anywhere comes before the next one nearby.
    for split in splits:
        for place in places:
            if files := _split_files(place, split):
                return _whole_table(files, folder, split)
        of_subjects = [_split_files(folder / name, split) for name in subjects]
        if of_subjects and all(of_subjects):
            return tuple(path for files in of_subjects for path in _whole_table(files, files[0].parent, split))
    files = _data_files(folder)
    if len({_table(path) for path in files}) == 1:
        return _whole_table(files, folder, _table(files[0]))
    raise UserError(
        f"{folder} has {len(files)} data files: expected one named {' or '.join(splits)}, or one alone, ending in "
        f"{', '.join(FORMATS)}; name the file with {_FLAG}"
    )


def _part_of_folder(folder: Path, part: str, parts: Sequence[str], splits: Sequence[str]) -> tuple[Path, ...]:
    """Return the files of one task: a file of its name, or its split in a folder of its name."""
    for place in (folder, folder / "bbh", folder / "data"):
        files = [path for path in _data_files(place) if _table(path) == part]
        if not files and (place / part).is_dir():
            return _table_of_folder(place / part, (), splits)
        if files and len({path.suffix for path in files}) == 1:
            return _whole_table(files, place, part)
        if files:
            break
    raise UserError(
        f"{folder} has {len(files)} files named {part}: expected one for each of {', '.join(parts)}, ending in "
        f"{', '.join(FORMATS)}"
    )


def _data_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in _METADATA)
    return [path for path in files if path.name.endswith(FORMATS)]


def _split_files(folder: Path, split: str) -> list[Path]:
    """Return the files of a split: named after it, or in a folder that is."""
    # Its name alone comes first: LogiQA 2.0 has "ood_test.jsonl" beside "test.jsonl".
    files = _data_files(folder)
    if exact := [path for path in files if _table(path).lower() == split]:
        return exact
    named = [path for path in files if split in re.split(r"[-_.]", _stem(path).lower())]
    return named or _data_files(folder / split)


def _whole_table(files: Sequence[Path], folder: Path, name: str) -> tuple[Path, ...]:
    """Return the files of one table in order: one file, or all its shards.

    Raises:
      UserError: a shard is missing, or these are several tables.
    """
    shards = [match for path in files if (match := _SHARD.fullmatch(_stem(path)))]
    tables = {_table(path) for path in files}
    if len(files) > 1 and (len(tables) > 1 or len(shards) != len(files)):
        raise UserError(
            f"{folder} has {len(files)} files of {name} ({', '.join(path.name for path in files[:4])}): expected one, "
            f"or the shards of one; name the file with {_FLAG}"
        )
    # Items are drawn from all rows: a missing shard would draw others without a word.
    if shards and (missing := int(shards[0][3]) - len(shards)) > 0:
        raise UserError(f"{folder} lacks {missing} of {int(shards[0][3])} shards of {name}: fetch the data set again")
    return tuple(files)


def _stem(path: Path) -> str:
    """Return the file's name without its ending."""
    return next((path.name.removesuffix(ending) for ending in FORMATS if path.name.endswith(ending)), path.stem)


def _table(path: Path) -> str:
    """Return the name that a file shares with the other shards of its table."""
    match = _SHARD.fullmatch(_stem(path))
    return match[1] if match else _stem(path)


def _content(path: Path) -> bytes:
    return read_bytes(path, _FLAG, "name a file, a folder or a hub id")


def _local_rows(part: str, path: Path, name: str) -> Iterator[Row]:
    unit = "row"
    if path.suffix in (".parquet", ".arrow"):
        numbered: Iterable[tuple[int, Any]] = enumerate(table_rows(path, io.BytesIO(_content(path))), start=1)
    else:
        # A .json file may hold JSON lines, too: the whole is tried first, then its lines.
        text = decode(_content(path), path)
        if path.suffix == ".json" and (rows := _json_rows(text, path)) is not None:
            numbered = enumerate(rows, start=1)
        else:
            unit, numbered = "line", json_lines(text, path, '{"question": "...", "answer": "..."}')
    for number, fields in numbered:
        where = f"{path}, {unit} {number}"
        if not isinstance(fields, dict):
            raise UserError(f"{where} is {shown(fields)}: expected an object with a field per column")
        yield Row(fields, part, f"{name}:{number}", where)


def _json_rows(text: str, path: Path) -> list[Any] | None:
    """Return the rows of a .json file: a list, a list within an object, or one object; None if it holds JSON lines.

    Raises:
      UserError: it holds another value.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None  # the reader of lines names the line that is damaged
    if isinstance(value, dict):
        return next((value[key] for key in _LISTS if isinstance(value.get(key), list)), [value])
    if not isinstance(value, list):
        raise UserError(f"{path} holds {shown(value)}: expected a list of objects, or an object with {_LISTS[0]!r}")
    return value


def training_files(files: Mapping[str, Sequence[Path]], parts: Sequence[str]) -> dict[str, tuple[Path, ...]]:
    """Return the files of the train split next to a benchmark's local files; none for a benchmark of several parts."""
    if parts != ("",):
        return {}
    # "test/data-00000-of-00001.arrow" has its train split beside the folder "test".
    folders = dict.fromkeys(path.parent for path in files[""])
    splits = (*TEST, "validation")
    roots = dict.fromkeys(folder.parent if folder.name in splits else folder for folder in folders)
    by_root = {root: _split_files(root, TRAIN[0]) for root in roots}
    paths = [path for root, files in by_root.items() if files for path in _whole_table(files, root, TRAIN[0])]
    return {"": tuple(paths)} if paths else {}
