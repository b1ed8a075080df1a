"""Sources of training text: the parts of ``--corpus.path``, and the texts of each.

FILE.jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow
                                          a row per document, with the field ``--corpus.field`` and perhaps "group"
FILE.txt                                  documents separated by blank lines
a pattern of these, such as 'text/*.jsonl.gz'
hf://ORG/NAME[/CONFIGURATION][@REVISION][:SPLIT]   a data set of the hub; at "main" and its split "train" by default
gsm8k, math, logic, logiqa, commonsense   questions of a benchmark with their solutions, none of those that are asked

The field of a row holds text, token ids of the model's tokenizer (text that was tokenized before), or the messages of a
chat, [{"role": "user", "content": "..."}, ...], which the tokenizer's chat template makes text of.
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

import numpy as np

from saejax.errors import Faults, UserError
from saejax.models.identity import keep_hash
from saejax.tasks import benchmarks
from saejax.tasks.files import json_lines, opened, refuse_array, shown, table_rows, text_lines
from saejax.tasks.hub import hub_commit, hub_rows
from saejax.tasks.settings import BENCHMARKS, CorpusConfig, TaskConfig
from saejax.unicode import has_surrogates

EMBEDDED = Path(__file__).parent / "data" / "corpus.jsonl.gz"
_BLOCK = 1 << 20  # bytes of a file, hashed at once
_FAULTS = 20  # of a file, after which it is read no further: a file of another kind has nothing else
_FLAG = "--corpus.path"
_FORMATS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", ".txt")
_HUB = re.compile(
    r"hf://(?P<id>[^/@:]+/[^/@:]+)(?:/(?P<configuration>[^/@:]+))?(?:@(?P<revision>[^:]+))?(?::(?P<split>.+))?"
)
_CHARACTERS = (
    8  # of the hub's text, read for each token that is wanted: more than a token has, so that some can be chosen
)
_COMPRESSION = 3  # characters of text for a byte of a compressed file, roughly

_ID_CHARACTERS = 4  # that a token stands for, about, where sizes of texts are compared
_LARGEST_ID = np.iinfo(np.int32).max

Messages = tuple[dict[str, str], ...]  # of a chat, each with "role" and "content"
Content = str | np.ndarray | Messages  # text, or int32 token ids [T], or a chat
Text = tuple[Content, str]  # a document's content, and its group or ""


def content_size(content: Content) -> int:
    """Return the number of characters of a content; of token ids, about how many they stand for."""
    if isinstance(content, str):
        return len(content)
    if isinstance(content, np.ndarray):
        return _ID_CHARACTERS * len(content)
    return sum(len(message["content"]) for message in content)


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
                return
            is_table = path.name.endswith((".parquet", ".arrow"))
            # No other column: embeddings and images would take more memory and time than the text.
            rows: Iterable[Any] = table_rows(path, file, (field, "group")) if is_table else text_lines(file, path)
            unit, example = "row" if is_table else "line", f'{{"{field}": "..."}}'
            faults = Faults(path, "of those read hold no text", f"{unit}s")
            for number, row in enumerate(rows, start=1):
                if number == 1 and not is_table:
                    refuse_array(row, path, example)
                held = list[Text]()
                with faults.collect(number):
                    for _, record in [(number, row)] if is_table else json_lines([row], path, example, number):
                        if not (is_table and _is_blank(record, field)):
                            held.append(_text_of(record, field, f"{path}, {unit} {number}"))
                yield from held
                if faults.count == _FAULTS:
                    break
            faults.refuse()

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
            text = _text_of(row, field, f"{hub}, {split}, row {number}")
            yield text
            left -= content_size(text[0])
            if left <= 0:
                return

    return TextSource(hub.replace("/", "_"), identity, texts, lambda: most)


def benchmark_source(name: str, task: TaskConfig) -> TextSource:
    """Return the questions of a benchmark that are not asked, with their solutions."""

    def texts() -> Iterator[Text]:
        benchmark = benchmarks.definition(name)
        for item in benchmarks.training_items(name, task):
            # With the benchmark's name, as items of others may have the same names.
            yield f"{benchmark.question.format(item.question)} {item.solution}", f"{name}-{item.id}"

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
        if not path.exists():
            _hash(path, b"")  # which opens the file and reports the error
    return paths


def _is_blank(row: Mapping[str, Any], field: str) -> bool:
    """Return whether a data set's row has a blank text: those made line by line have many."""
    content = row.get(field)
    return isinstance(content, str | list) and not (content.strip() if isinstance(content, str) else content)


def _text_of(row: Any, field: str, where: str) -> Text:
    if not isinstance(row, Mapping) or field not in row:
        has = f", only {', '.join(map(repr, row))}" if isinstance(row, Mapping) and row else ""
        raise UserError(
            f'{where} has no field {field!r}{has}: expected an object such as {{"{field}": "..."}}; --corpus.field '
            "names another"
        )
    content, group = _content(row[field], f"{where}: {field!r}"), row.get("group")
    if group is not None and (not isinstance(group, str) or not group):
        raise UserError(f"{where}: 'group' is {shown(group)}: expected a string that is not empty, or no 'group'")
    return content, group or ""


def _content(value: Any, where: str) -> Content:
    """Return a field's text, token ids or messages; raise a ``UserError`` if it holds none of these."""
    if isinstance(value, list) and value and all(type(id) is int and 0 <= id <= _LARGEST_ID for id in value):
        return np.array(value, np.int32)
    names = ("role", "content")
    is_chat = isinstance(value, list) and all(isinstance(message, Mapping) for message in value)
    if value and is_chat and all(isinstance(message.get(name), str) for message in value for name in names):
        value = tuple({"role": message["role"], "content": message["content"]} for message in value)
    texts = [message["content"] for message in value] if isinstance(value, tuple) else [value]
    if not all(isinstance(text, str) for text in texts) or not any(text.strip() for text in texts):
        raise UserError(
            f"{where} is {shown(value)}: expected a string that is not blank, token ids, or messages with role and "
            "content; fix or remove it"
        )
    if any(map(has_surrogates, texts)):
        raise UserError(f"{where} has an unpaired surrogate: expected valid Unicode; fix it")
    return value
