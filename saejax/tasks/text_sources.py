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
import glob
import hashlib
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from saejax.errors import UserError
from saejax.models.identity import keep_hash
from saejax.tasks import benchmarks
from saejax.tasks.files import json_lines, opened, shown, table_rows, text_lines
from saejax.tasks.hub import hub_commit, hub_rows
from saejax.tasks.settings import BENCHMARKS, CorpusConfig, TaskConfig
from saejax.unicode import has_surrogates

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


@dataclasses.dataclass(frozen=True)
class TextSource:
    """One part of ``--corpus.path``."""

    name: str  #: short, without a slash, for groups and messages
    identity: Callable[[], str]  #: returns a hash, 16 hexadecimal digits, of what its texts depend on
    #: yields its documents one at a time, each with its group or ""; a ``UserError`` says which is malformed.
    texts: Callable[[], Iterator[Text]]
    characters: Callable[[], int] = lambda: 0  #: estimates its number of characters; 0 if unknown


def file_source(path: Path, field: str) -> TextSource:
    """Return the text of a file; its identity is of its content alone."""

    def identity() -> str:
        kind = next(ending for ending in _FORMATS if path.name.endswith(ending)).split(".")[1]
        # A .txt file has no fields, and the usual one needs no mention.
        named = "" if field == "text" or kind == "txt" else field
        before = kind.encode() + b"\0" + named.encode()
        if not path.is_file():
            return _hash(path, before)  # which opens the file and reports the error
        return keep_hash(path, f"text {kind} {named}", lambda: _hash(path, before))

    def texts() -> Iterator[Text]:
        with _opened(path) as file:
            if path.name.endswith(".txt"):
                yield from ((piece, "") for piece in _paragraphs(text_lines(file, path), path))
            elif path.name.endswith((".parquet", ".arrow")):
                # No other column: embeddings and images would take more memory and time than the text.
                for number, row in enumerate(table_rows(path, file, (field, "group")), start=1):
                    if not _is_blank(row, field):
                        yield _text_of(row, field, f"{path}, row {number}")
            else:
                for number, record in json_lines(text_lines(file, path), path, f'{{"{field}": "..."}}'):
                    yield _text_of(record, field, f"{path}, line {number}")

    scale = 1 if path.suffix in (".jsonl", ".txt", ".arrow") else _COMPRESSION
    return TextSource(path.name.partition(".")[0], identity, texts, lambda: path.stat().st_size * scale)


def _opened(path: Path) -> contextlib.AbstractContextManager[IO[bytes]]:
    return opened(path, _FLAG, "name a file, or leave it empty")


def _hash(path: Path, before: bytes) -> str:
    """Hash a file's content, unpacked."""
    digest = hashlib.sha256(before)
    with _opened(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()[:16]


def _paragraphs(lines: Iterable[str], path: Path) -> Iterator[str]:
    """Yield the texts between blank lines."""
    paragraph: list[str] = []
    for line in itertools.chain(lines, [""]):
        if 4 * line.count("\0") > len(line):  # UTF-16 without a mark of byte order passes for UTF-8
            raise UserError(f"{path} has many zero bytes, as UTF-16 does: expected text in UTF-8; convert it")
        if line.strip():
            paragraph.append(line.removesuffix("\r"))
        elif paragraph:
            yield "\n".join(paragraph).strip()
            paragraph = []


def hub_source(hub: str, configuration: str, revision: str, split: str, field: str, most: int) -> TextSource:
    """Return a split of a data set of the hub, read from its front.

    Args:
      hub: its id.
      configuration: of the data set; "": its only one.
      revision: branch, tag or commit.
      split: "train" or another.
      field: of a row, which holds the text.
      most: characters that are read; 0: all.
    """

    def identity() -> str:
        # The commit, as a branch may hold other text tomorrow.
        read = (hub, configuration, hub_commit(hub, revision), split, field, most)
        return hashlib.sha256(repr(read).encode()).hexdigest()[:16]

    def texts() -> Iterator[Text]:
        left = most or sys.maxsize
        for number, row in enumerate(hub_rows(hub, configuration, hub_commit(hub, revision), split, stream=True), 1):
            if _is_blank(row, field):
                continue
            yield _text_of(row, field, f"{hub}, {split}, row {number}")
            left -= len(row[field])
            if left <= 0:
                return

    return TextSource(hub.replace("/", "_"), identity, texts, lambda: most)


def benchmark_source(name: str, task: TaskConfig) -> TextSource:
    """Return the questions of a benchmark that are not asked, with their solutions."""

    def texts() -> Iterator[Text]:
        benchmark = benchmarks.definition(name)
        for item in benchmarks.training_items(name, task):
            yield f"{benchmark.question.format(item.question)} {item.solution}", item.id

    return TextSource(name, lambda: benchmarks.training_identity(name, task), texts)


def text_sources(config: CorpusConfig, task: TaskConfig) -> list[TextSource]:
    """Return the sources that ``--corpus.path`` names, in order; the embedded corpus where it is empty.

    Args:
      config: the path, the field of rows, how many tokens are wanted of each source.
      task: which questions of benchmarks are asked.

    Raises:
      UserError: a part names nothing that is known, or text of the hub without a number of tokens.
    """
    if not config.path:
        return [file_source(EMBEDDED, "text")]
    sources: list[TextSource] = []
    for part in filter(None, map(str.strip, config.path.split(","))):
        if part in BENCHMARKS:
            sources.append(benchmark_source(part, task))
        elif part.startswith("hf://"):
            sources.append(_hub_text(part, config))
        else:
            sources += [file_source(path, config.field) for path in _files(part)]
    return sources


def _hub_text(part: str, config: CorpusConfig) -> TextSource:
    named = _HUB.fullmatch(part)
    if not named:
        raise UserError(f"{_FLAG}={part}: expected hf://ORG/NAME[/CONFIGURATION][@REVISION][:SPLIT]")
    if not (config.max_tokens or config.stream):
        raise UserError(
            f"{_FLAG}={part} takes --corpus.max_tokens, or --corpus.stream=True: a data set may be of any size"
        )
    return hub_source(
        named["id"],
        named["configuration"] or "",
        named["revision"] or "main",
        named["split"] or "train",
        config.field,
        0 if config.stream else _CHARACTERS * config.max_tokens,
    )


def _files(part: str) -> list[Path]:
    """Return a file, or the files that match a pattern, in the order of their names."""
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


def _is_blank(row: Mapping[str, Any], field: str) -> bool:
    """Return whether a data set's row has a blank text: those made line by line have many."""
    return isinstance(row.get(field), str) and not row[field].strip()


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
    if has_surrogates(text):
        raise UserError(f"{where}: {field!r} has an unpaired surrogate: expected valid Unicode; fix it")
    if group is not None and (not isinstance(group, str) or not group):
        raise UserError(f"{where}: 'group' is {shown(group)}: expected a string that is not empty, or no 'group'")
    return text, group or ""
