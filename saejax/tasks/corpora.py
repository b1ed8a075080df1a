"""Text on which dictionaries are trained: reading, identity, and the held-out split.

A *document* is a text and its *group*: the texts of the same origin, such as the opening that it was
sampled from ("story/3"). The part of a group before "/" is its *kind*. The split into training and
held-out text keeps every group on one side, so that nothing held out continues an opening trained on.

Text that is read as a stream (``--corpus.stream``) is never in memory as a whole. There the split cannot depend on what
other documents there are: a hash of its group decides on which side a document is, and one without a group has a hash
of its text in its place, so that copies of a text stand on one side.
"""

import collections
import dataclasses
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from saejax.errors import UserError
from saejax.files import fingerprint
from saejax.tasks.settings import CorpusConfig, TaskConfig
from saejax.tasks.text_sources import Content, content_size, text_sources

_MOST_IN_MEMORY = 2**30  # characters
_STREAMED_SAMPLE = 1024  # held-out documents of a stream that other stages than capture read


@dataclasses.dataclass(frozen=True)
class Document:
    """One text."""

    content: Content  #: text that is not blank, token ids, or the messages of a chat
    #: documents of one group are never split, whatever their sources; a document without one is its own group with all
    #: copies of its text, "document-<index>" after the first, or in a stream a hash of the text. Of several sources the
    #: name of the first that has the group stands in front, but for streams.
    group: str
    index: int  #: its place in the corpus, from 0
    source: int = 0  #: which of the corpus's sources it is from, from 0

    @property
    def text(self) -> str:
        """The text.

        Raises:
          UserError: the document is token ids or a chat, which only a model's tokenizer makes text of.
        """
        if isinstance(self.content, str):
            return self.content
        held = "token ids" if isinstance(self.content, np.ndarray) else "the messages of a chat"
        raise UserError(
            f"document {self.index} of --corpus.path is {held}: only tokenize, capture and train read these; name text "
            "instead, by --corpus.path or --corpus.field"
        )

    @property
    def size(self) -> int:
        """Number of characters; of token ids, about how many they stand for."""
        return content_size(self.content)


def documents(
    config: CorpusConfig, task: TaskConfig | None = None, enough: Callable[[int], bool] = lambda source: False
) -> Iterator[Document]:
    """Yield all text that ``config.path`` names (``text_sources``), in its order, read as it is asked for.

    ``config.max_tokens``, ``config.weights`` and ``config.context`` are applied where text becomes tokens, not here.

    Args:
      config: where text comes from.
      task: which questions of benchmarks are asked, and so are no text; None: those of the defaults.
      enough: whether no more of a source, given by its number, is wanted.

    Raises:
      UserError: a file is missing, of another format, damaged, not UTF-8, or without a document; a line is not JSON, or
        its fields are missing or of the wrong type (with the line's number); the hub cannot be read.
    """
    sources, index, names = text_sources(config, task or TaskConfig()), 0, dict[str, str]()
    for number, source in enumerate(sources):
        before = index
        for content, group in source.texts():
            # Copies of a text stand on one side of the split: held-out text that was trained on judges nothing.
            name = group or f"text-{_hash(content if isinstance(content, str) else repr(list(content))):016x}"
            if not config.stream:
                # A kind for each source, so that each has text on both sides of the split. A group of several sources,
                # such as the shards of a data set, is of the kind of the first.
                kind = f"{source.name}/" if len(sources) > 1 else ""
                name = names.setdefault(name, f"{kind}{group or f'document-{index}'}")
            yield Document(content, name, index, number)
            index += 1
            if enough(number):
                break
        if index == before:
            where = config.path or source.name
            raise UserError(f"{where} holds no document: expected text; name another file with --corpus.path")


def read_corpus(config: CorpusConfig, task: TaskConfig | None = None) -> list[Document]:
    """Read all documents of a corpus into memory.

    Args:
      config: the corpus.
      task: which questions of benchmarks are asked, see ``documents``.

    Raises:
      UserError: a file cannot be read, or the text has more than 2^30 characters.
    """
    corpus, characters = list[Document](), 0
    for document in documents(config, task):
        corpus.append(document)
        characters += document.size
        if characters > _MOST_IN_MEMORY:
            raise UserError(
                f"--corpus.path={config.path} has more than {_MOST_IN_MEMORY / 1e9:.1f} billion characters, too many "
                "for memory: use --corpus.stream=True"
            )
    return corpus


def held_out_documents(config: CorpusConfig, task: TaskConfig | None = None) -> list[Document]:
    """Return the held-out documents, of a stream only the first 1024.

    Raises:
      UserError: the corpus cannot be read, or cannot be split.
    """
    if not config.stream:
        return split(read_corpus(config, task), config.held_out, config.seed)[1]
    held_out = (document for document in documents(config, task) if is_held_out(document, config))
    if not (sample := list(itertools.islice(held_out, _STREAMED_SAMPLE))):
        raise UserError("no document of the corpus is held out by its hash: give more documents, or more groups")
    return sample


def is_held_out(document: Document, config: CorpusConfig) -> bool:
    """Return whether a document of a stream is held out: a hash of group and seed falls within the held-out share."""
    # With the seed, so that another seed holds out other groups.
    return _hash(f"{config.seed}/{document.group}") < config.held_out * 2**64


def _hash(text: str) -> int:
    """Return 64 bits of a text's hash, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def characters(config: CorpusConfig, task: TaskConfig | None = None) -> int:
    """Estimate the number of characters from the sizes of the files; 0 if a source's size is unknown."""
    sizes = [source.characters() for source in text_sources(config, task or TaskConfig())]
    return sum(sizes) if all(sizes) else 0


def identity(config: CorpusConfig, task: TaskConfig | None = None) -> str:
    """Return a hash of what the text depends on, 16 hexadecimal digits; the path and packing of files do not count.

    Raises:
      UserError: a file is missing, of another format, or damaged.
    """
    hashes = [source.identity() for source in text_sources(config, task or TaskConfig())]
    return hashes[0] if len(hashes) == 1 else fingerprint([*hashes, "groups across sources"])


def split(documents: Sequence[Document], held_out: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Split documents into training and held-out ones; no group is on both sides.

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
        sizes[document.group] += document.size
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
    """Return the groups to hold out: at least one, and not all."""
    rng = random.Random(seed)
    kinds: dict[str, list[str]] = collections.defaultdict(list)
    # Sorted, so that the split does not depend on the order of documents.
    for group in sorted(sizes):
        # Groups without a kind are one kind together.
        kinds[group.split("/", 1)[0] if "/" in group else ""].append(group)
    chosen: set[str] = set()
    wanted = 0.0  # characters that should have been held out by now, less the characters that were
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
    # The smallest, because it misses the share least.
    smallest = min(sizes, key=lambda group: (sizes[group], group))
    if not chosen:  # every kind is a single group, each too large
        chosen.add(smallest)
    elif len(chosen) == len(sizes):
        chosen.remove(smallest)
    return chosen
