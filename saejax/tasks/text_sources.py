"""Sources of training text: the parts of ``--corpus.path``, and the texts of each.

FILE.jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow
                                          a row per document, with the field ``--corpus.field`` and perhaps "group"
FILE.txt                                  documents separated by blank lines
a pattern of these, such as 'text/*.jsonl.gz'
hf://ORG/NAME[/CONFIGURATION][@REVISION][:SPLIT]   a data set of the hub; at "main" and its split "train" by default
gsm8k, math, logic, logiqa, commonsense   questions of a benchmark with their solutions, none of those that are asked
"""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from saejax.errors import UserError
from saejax.settings import BENCHMARKS, CorpusConfig, TaskConfig
from saejax.tasks import benchmarks
from saejax.tasks.files import json_lines, opened, shown, table_rows, text_lines
from saejax.tasks.hub import hub_commit, hub_rows

EMBEDDED = Path(__file__).parent / "data" / "corpus.jsonl.gz"
_BLOCK = 1 << 20  # bytes of a file, hashed at once
_FLAG = "--corpus.path"
_FORMATS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", ".txt")
_HUB = re.compile(
    r"hf://(?P<id>[^/@:]+/[^/@:]+)(?:/(?P<configuration>[^/@:]+))?(?:@(?P<revision>[^:]+))?(?::(?P<split>.+))?"
)
_CHARACTERS = (
    8  # of the hub's text, read for each token that is wanted: more than a token has, so that some can be chosen
)
_COMPRESSION = 3  # characters of text for a byte of a compressed file, roughly

Text = tuple[str, str]  # the text, and its group or ""


class TextSource(Protocol):
    """One part of ``--corpus.path``."""

    @property
    def name(self) -> str:
        """Return a short name, without a slash."""

    def identity(self) -> str:
        """Return a hash, 16 hexadecimal digits, of what its texts depend on."""

    def texts(self) -> Iterator[Text]:
        """Yield its documents one at a time, each with its group or "".

        Raises:
          UserError: a document is malformed or cannot be read.
        """

    def characters(self) -> int:
        """Return an estimate of its number of characters; 0 if unknown."""


@dataclasses.dataclass(frozen=True)
class FileText:
    """A file; its identity is of its content alone."""

    path: Path
    field: str

    @property
    def name(self) -> str:
        """Return the name of the source in groups and messages."""
        return self.path.name.partition(".")[0]

    def identity(self) -> str:
        """Return a hash of what its texts depend on."""
        kind = next(ending for ending in _FORMATS if self.path.name.endswith(ending)).split(".")[1]
        # A .txt file has no fields, and the usual one needs no mention.
        field = "" if self.field == "text" or kind == "txt" else self.field
        state = None
        with contextlib.suppress(OSError):  # ``_hash`` opens the file and reports the error
            status = self.path.stat()
            # Large files are hashed once per process, unless they have changed.
            state = status.st_size, status.st_mtime_ns, status.st_ino
        return _hash(self.path, kind.encode() + b"\0" + field.encode(), state)

    def characters(self) -> int:
        """Return an estimate of its number of characters; 0 if unknown."""
        return self.path.stat().st_size * (1 if self.path.suffix in (".jsonl", ".txt", ".arrow") else _COMPRESSION)

    def texts(self) -> Iterator[Text]:
        """Yield its texts, each with its group."""
        path = self.path
        with _opened(path) as file:
            if path.name.endswith(".txt"):
                yield from ((piece, "") for piece in _paragraphs(text_lines(file, path)))
            elif path.name.endswith((".parquet", ".arrow")):
                for number, row in enumerate(table_rows(path, file), start=1):
                    yield _text_of(row, self.field, f"{path}, row {number}")
            else:
                for number, record in json_lines(text_lines(file, path), path, f'{{"{self.field}": "..."}}'):
                    yield _text_of(record, self.field, f"{path}, line {number}")


def _opened(path: Path) -> contextlib.AbstractContextManager[IO[bytes]]:
    return opened(path, _FLAG, "name a file, or leave it empty")


@functools.lru_cache(maxsize=4096)
def _hash(path: Path, before: bytes, state: object) -> str:
    """Hash a file's content, read once while the file's ``state`` is the same."""
    digest = hashlib.sha256(before)
    with _opened(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()[:16]


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Yield the texts between blank lines."""
    paragraph: list[str] = []
    for line in itertools.chain(lines, [""]):
        if line.strip():
            paragraph.append(line.removesuffix("\r"))
        elif paragraph:
            yield "\n".join(paragraph).strip()
            paragraph = []


@dataclasses.dataclass(frozen=True)
class HubText:
    """A split of a data set of the hub, from its front: so many characters, or 0 for all."""

    hub: str
    configuration: str
    revision: str
    split: str
    field: str
    most: int

    @property
    def name(self) -> str:
        """Return the name of the source in groups and messages."""
        return self.hub.replace("/", "_")

    def identity(self) -> str:
        """Return a hash of what its texts depend on."""
        # The commit, as a branch may hold other text tomorrow.
        read = dataclasses.replace(self, revision=hub_commit(self.hub, self.revision))
        return hashlib.sha256(repr(dataclasses.astuple(read)).encode()).hexdigest()[:16]

    def characters(self) -> int:
        """Return an estimate of its number of characters; 0 if unknown."""
        return self.most

    def texts(self) -> Iterator[Text]:
        """Yield its texts, each with its group."""
        left = self.most or sys.maxsize
        rows = hub_rows(self.hub, self.configuration, hub_commit(self.hub, self.revision), self.split, stream=True)
        for number, row in enumerate(rows, start=1):
            if self.field in row and not str(row[self.field]).strip():
                continue  # data sets made line by line have blank ones
            yield _text_of(row, self.field, f"{self.hub}, {self.split}, row {number}")
            left -= len(row[self.field])
            if left <= 0:
                return


@dataclasses.dataclass(frozen=True)
class BenchmarkText:
    """The questions of a benchmark that are not asked, with their solutions."""

    name: str
    task: TaskConfig

    def identity(self) -> str:
        """Return a hash of what its texts depend on."""
        return benchmarks.training_identity(self.name, self.task)

    def characters(self) -> int:
        """Return an estimate of its number of characters; 0 if unknown."""
        return 0

    def texts(self) -> Iterator[Text]:
        """Yield its texts, each with its group."""
        benchmark = benchmarks.definition(self.name)
        for item in benchmarks.training_items(self.name, self.task):
            yield f"{benchmark.question.format(item.question)} {item.solution}", item.id


def text_sources(config: CorpusConfig, task: TaskConfig) -> list[TextSource]:
    """Return the sources that ``--corpus.path`` names, in order; the embedded corpus where it is empty.

    Args:
      config: the path, the field of rows, how many tokens are wanted of each source.
      task: which questions of benchmarks are asked.

    Raises:
      UserError: a part names nothing that is known, or text of the hub without a number of tokens.
    """
    if not config.path:
        return [FileText(EMBEDDED, "text")]
    sources: list[TextSource] = []
    for part in filter(None, map(str.strip, config.path.split(","))):
        if part in BENCHMARKS:
            sources.append(BenchmarkText(part, task))
        elif part.startswith("hf://"):
            sources.append(_hub_text(part, config))
        else:
            sources += [FileText(path, config.field) for path in _files(part)]
    return sources


def _hub_text(part: str, config: CorpusConfig) -> HubText:
    named = _HUB.fullmatch(part)
    if not named:
        raise UserError(f"{_FLAG}={part}: expected hf://ORG/NAME[/CONFIGURATION][@REVISION][:SPLIT]")
    if not (config.max_tokens or config.stream):
        raise UserError(
            f"{_FLAG}={part} takes --corpus.max_tokens, or --corpus.stream=True: a data set may be of any size"
        )
    return HubText(
        named["id"],
        named["configuration"] or "",
        named["revision"] or "main",
        named["split"] or "train",
        config.field,
        0 if config.stream else _CHARACTERS * config.max_tokens,
    )


def _files(part: str) -> list[Path]:
    """Return a file, or those that match a pattern, in the order of their names."""
    paths = [Path(part).expanduser()]
    if glob.has_magic(part) and not paths[0].exists():
        paths = sorted(map(Path, glob.glob(str(paths[0]), recursive=True)))
        if not paths:
            raise UserError(f"{_FLAG}={part} matches no file")
    for path in paths:
        if not path.name.endswith(_FORMATS):
            raise UserError(
                f"{_FLAG}={path} is not a known kind of text: expected one of {', '.join(_FORMATS)}, hf://ORG/NAME, or "
                f"a benchmark ({', '.join(BENCHMARKS)})"
            )
    return paths


def _text_of(row: Any, field: str, where: str) -> Text:
    if not isinstance(row, Mapping) or field not in row:
        has = f", only {', '.join(map(repr, row))}" if isinstance(row, Mapping) and row else ""
        raise UserError(
            f'{where} has no field {field!r}{has}: expected an object such as {{"{field}": "..."}}; --corpus.field '
            "names another"
        )
    text, group = row[field], row.get("group")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: {field!r} is {shown(text)}: expected a string that is not blank; fix or remove it")
    # JSON can hold half a pair, but no tokenizer can encode it.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{where}: {field!r} holds half of a surrogate pair: expected whole characters; fix it")
    if group is not None and (not isinstance(group, str) or not group):
        raise UserError(f"{where}: 'group' is {shown(group)}: expected a string that is not empty, or no 'group'")
    return text, group or ""
