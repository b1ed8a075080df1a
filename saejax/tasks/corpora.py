"""Text on which dictionaries are trained: reading, identity, and the held-out split.

A *document* is a text and its *group*: what it shares an origin with, such as the opening that it was
sampled from ("story/3"). The part of a group before "/" is its *kind*. The split into training and
held-out text keeps every group on one side, so that nothing held out continues an opening trained on.
"""

import collections
import dataclasses
import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from saejax.errors import UserError
from saejax.settings import CorpusConfig
from saejax.tasks.files import decode, json_lines, read_bytes, shown

EMBEDDED = Path(__file__).parent / "data" / "corpus.jsonl.gz"
_FORMATS = (".jsonl", ".jsonl.gz", ".txt")


@dataclasses.dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
      text: not blank.
      group: documents of one group are never split; a document without one is its own group, "document-<index>".
      index: its place in the corpus, from 0.
    """

    text: str
    group: str
    index: int


def read_corpus(config: CorpusConfig) -> list[Document]:
    """Reads the corpus that the configuration names; the embedded one where its path is empty.

    Formats: ``.jsonl`` and ``.jsonl.gz`` hold one JSON object a line, with "text" and perhaps "group";
    ``.txt`` holds documents separated by blank lines. All are UTF-8. ``config.max_tokens`` and
    ``config.context`` are applied where text becomes tokens, not here.

    Raises:
      UserError: the file is missing, of another format, damaged, not UTF-8, or without a document; a line
        is not JSON, or its fields are missing or of the wrong type (with the line's number).
    """
    path = _path(config)
    content = decode(_content(path), path)
    pairs = list(_from_text(content) if path.name.endswith(".txt") else _from_json_lines(content, path))
    if not pairs:
        raise UserError(f"{path} holds no document: expected text; name another file with --corpus.path")
    return [Document(text, group or f"document-{index}", index) for index, (text, group) in enumerate(pairs)]


def identity(config: CorpusConfig) -> str:
    """A hash of the corpus file's uncompressed content, 16 hexadecimal digits; its path and packing do not count.

    Raises:
      UserError: the file is missing, of another format, or damaged.
    """
    path = _path(config)
    kind = "txt" if path.name.endswith(".txt") else "jsonl"
    return hashlib.sha256(kind.encode() + b"\0" + _content(path)).hexdigest()[:16]


def split(documents: Sequence[Document], held_out: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Splits documents into training and held-out ones; no group is on both sides.

    Each kind of at least two groups has a group on both sides. Kind by kind, whole groups in an order drawn
    from the seed are held out where that brings the held-out share of the text so far, measured in
    characters, nearer to ``held_out``; what one kind misses is passed on to the next, so the share is met
    over the whole.

    Args:
      documents: the corpus.
      held_out: share of the text to hold out, above 0 and below 1.
      seed: seed of the order of groups.

    Returns:
      The training documents and the held-out ones, each in the order of the corpus; neither is empty.

    Raises:
      UserError: there are fewer than two groups.
    """
    sizes: dict[str, int] = collections.Counter()
    for document in documents:
        sizes[document.group] += len(document.text)
    if len(sizes) < 2:
        raise UserError(
            f"the corpus has {len(documents)} documents in {len(sizes)} groups, which cannot be split into training "
            "and held-out text: expected at least 2 groups; give more documents, or more values of 'group'"
        )
    chosen = _held_out_groups(sizes, held_out, seed)
    return (
        [document for document in documents if document.group not in chosen],
        [document for document in documents if document.group in chosen],
    )


def _held_out_groups(sizes: dict[str, int], held_out: float, seed: int) -> set[str]:
    """The groups to hold out: at least one, and not all."""
    rng = random.Random(seed)
    kinds: dict[str, list[str]] = collections.defaultdict(list)
    for group in sorted(sizes):
        # Groups without a kind are one kind together.
        kinds[group.split("/", 1)[0] if "/" in group else ""].append(group)
    chosen: set[str] = set()
    wanted = 0.0  # characters that should have been held out by now, less those that were
    for groups in kinds.values():
        rng.shuffle(groups)
        wanted += held_out * sum(sizes[group] for group in groups)
        taken = 0
        for group in groups:
            # A group is worth holding out if that leaves the share nearer to what is wanted than before.
            if sizes[group] <= 2 * wanted and taken < max(len(groups) - 1, 1):
                chosen.add(group)
                wanted -= sizes[group]
                taken += 1
        if not taken and len(groups) > 1:
            # The kind must be held out too: by a group that is not one of its large ones.
            median = sorted(sizes[group] for group in groups)[(len(groups) - 1) // 2]
            group = next(group for group in groups if sizes[group] <= median)
            chosen.add(group)
            wanted -= sizes[group]
    smallest = min(sizes, key=lambda group: (sizes[group], group))
    if not chosen:  # every kind is a single group, each too large
        chosen.add(smallest)
    elif len(chosen) == len(sizes):
        chosen.remove(smallest)
    return chosen


def _path(config: CorpusConfig) -> Path:
    path = Path(config.path) if config.path else EMBEDDED
    if not path.name.endswith(_FORMATS):
        raise UserError(f"--corpus.path={path} is not a known kind of text: expected one of {', '.join(_FORMATS)}")
    return path


def _content(path: Path) -> bytes:
    """The file's bytes, uncompressed."""
    return read_bytes(path, "--corpus.path", "name a file, or leave it empty")


def _from_text(content: str) -> Iterable[tuple[str, str]]:
    pieces = re.split(r"\n[^\S\n]*\n", content.replace("\r\n", "\n"))
    return ((piece.strip(), "") for piece in pieces if piece.strip())


def _from_json_lines(content: str, path: Path) -> Iterable[tuple[str, str]]:
    for number, record in json_lines(content, path, '{"text": "..."}'):
        where = f"{path}, line {number}"
        if not isinstance(record, dict) or "text" not in record:
            raise UserError(f'{where} has no field \'text\': expected an object such as {{"text": "..."}}')
        text, group = record["text"], record.get("group")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: 'text' is {shown(text)}: expected a string that is not blank; fix or remove it")
        if _unencodable(text):
            raise UserError(f"{where}: 'text' holds half of a surrogate pair: expected whole characters; fix it")
        if group is not None and (not isinstance(group, str) or not group):
            raise UserError(f"{where}: 'group' is {shown(group)}: expected a string that is not empty, or no 'group'")
        yield text, group or ""


def _unencodable(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
