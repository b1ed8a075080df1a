"""The record of a feature: its JSON as types, which the page reads, and how records are read back."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from saejax.errors import UserError, file_errors
from saejax.files import read_json
from saejax.links import resolve_links
from saejax.unicode import visible

FEATURES = "features"  # folder of the records, in files of consecutive features
_WORDS = 3  # that name a feature without a label


class FeatureContext(TypedDict):
    """Tokens around a firing."""

    tokens: list[str]
    acts: list[float | None]  # of the feature on each token; None where the store has none
    peak: int  # place of the firing among the tokens
    document: int
    position: int  # of the firing in the document
    group: NotRequired[int]  # which tenth of the firings it was drawn from


class FeatureToken(TypedDict):
    """A token on which a feature fires."""

    text: str
    hits: int  # firings on it
    occurrences: int  # in the text
    sum: float  # of activations on it; ``mean``: over all its occurrences
    mean: float


class FeatureCategory(TypedDict):
    """A prompt category on which a feature is active more often than elsewhere; see ``categories``."""

    category: str  # a behaviour or benchmark, or its right or wrong answers
    active: int  # prompts of the category on which the feature fires
    prompts: int  # of the category
    active_elsewhere: int  # the same of other prompts; for answers, of the category's with the other verdict
    prompts_elsewhere: int
    q: float  # of Fisher's exact test, one-sided, Benjamini and Hochberg


class LogitHistogram(TypedDict):
    """Logits that a feature adds to all tokens: the ends, and how many are in each of equal bins between them."""

    low: float
    high: float
    counts: list[int]


class MeanInterval(TypedDict):
    """``results.Interval`` as JSON, rounded."""

    mean: float
    low: float
    high: float


class DetectorRecord(TypedDict):
    """The rule that best predicts where a feature fires (``detectors.Detector``)."""

    family: str
    says: str  # what it looks at, in words
    search_f1: float  # on the text that it was found on
    f1: MeanInterval  # on held-out text


class HeadLooks(TypedDict):
    """Attention heads that correlate with a feature; see ``attended``."""

    heads: list[tuple[int, int, str, float]]  # layer, head, class of keys, correlation; the largest by size first
    bar: float  # correlation that the heads go beyond


class TokenMap(TypedDict):
    """A heatmap of a document."""

    document: int
    tokens: list[str]
    features: list[int]
    acts: list[list[float | None]]  # a row for each feature; None where the store has none (sinks, for instance)


class FeatureRecord(TypedDict):
    """The record of a feature; docs/artifacts.md explains it. A feature that never fires lacks many of its fields."""

    feature: int
    fires: int
    rate: float
    nearest: list[tuple[int, float]]
    up: NotRequired[list[tuple[str, float]]]
    down: NotRequired[list[tuple[str, float]]]
    logits: NotRequired[LogitHistogram]
    mean: NotRequired[float]
    max: NotRequired[float]
    tenths: NotRequired[list[float]]
    histogram: NotRequired[list[int]]
    examples: NotRequired[list[FeatureContext]]
    groups: NotRequired[list[FeatureContext]]
    tokens: NotRequired[list[FeatureToken]]
    attention: NotRequired[HeadLooks]
    categories: NotRequired[list[FeatureCategory]]
    detector: NotRequired[DetectorRecord]
    shuffled_f1: NotRequired[float]
    label: NotRequired[str]
    judged: NotRequired[Mapping[str, Any]]  # in an atlas: ``results.ExplainedFeature`` as JSON


def iterate_records(folder: Path) -> Iterator[FeatureRecord]:
    """Yield the records that ``interpret`` wrote to a dictionary's folder, in the order of the features."""
    for path in sorted((folder / FEATURES).glob("*.json")):
        yield from read_json(path)


def read_records(folder: Path, wanted: set[int]) -> dict[int, FeatureRecord]:
    """Return the records of some features by their index; features without a record are left out."""
    return {record["feature"]: record for record in iterate_records(folder) if record["feature"] in wanted}


def feature_words(tokens: Iterable[str], acts: Iterable[float]) -> tuple[str, ...]:
    """Return the words that name a feature without a label: the tokens on which it is most active in sum.

    Spaces around a token do not count, so that " two" and "two" are one word; a token of spaces alone stays as it is.

    Args:
      tokens: texts of the tokens on which it fires, each also several times.
      acts: its activation on each of them, or a sum of activations; of those below 0 the size counts.

    Returns:
      At most three words, the word with the largest sum first; among equal sums the earlier word first.
    """
    sums: dict[str, float] = {}
    for token, act in zip(tokens, acts, strict=True):
        word = token.strip() or token
        sums[word] = sums.get(word, 0.0) + abs(act)
    ordered = sorted(sums, key=lambda word: -sums[word])
    return tuple([word for word in ordered if word and sums[word] > 0][:_WORDS])


def quote_words(words: Iterable[str]) -> str:
    """Return words as the name of a feature: each in quotes."""
    return " ".join(f"“{word}”" for word in words)


def top_tokens(record: FeatureRecord) -> str:
    """Return a name for a feature without a label: its ``feature_words``, in quotes; "" if it never fires."""
    tokens = record.get("tokens", ())
    return quote_words(feature_words([token["text"] for token in tokens], [token["sum"] for token in tokens]))


@dataclasses.dataclass(frozen=True)
class InterpretedFeature:
    """A feature as ``interpret`` describes it; its representation lists its strongest contexts."""

    record: FeatureRecord  #: all that is known of it

    @property
    def name(self) -> str:
        """Its label, or else the tokens on which it is most active."""
        return self.record.get("label") or top_tokens(self.record)

    def examples(self) -> list[str]:
        """Return its strongest contexts as text, the token of its firing between » and «."""
        return [
            "".join(
                f"»{token}«" if place == example["peak"] else token for place, token in enumerate(example["tokens"])
            )
            for example in self.record.get("examples", ())
        ]

    def __repr__(self) -> str:
        record = self.record
        head = f"feature {record['feature']}, fires on {record['rate']:.2%} of the tokens: {self.name or 'no name'}"
        return "\n".join([head, *(f"  {visible(example)[-110:]}" for example in self.examples()[:20])])


@file_errors()
def load_feature(folder: str | Path, feature: int) -> InterpretedFeature:
    """Return what the stage ``interpret`` found of a feature.

    Args:
      folder: the unit, or a member's folder in it, such as "runs/demo/interpret/topk".
      feature: its index.

    Raises:
      UserError: there are no records, or none of this feature.
    """
    place = resolve_links(Path(folder))
    if not (place / FEATURES).is_dir():
        raise UserError(f"{folder} has no folder {FEATURES}: expected a unit of interpret, or a member's folder in it")
    if not (records := read_records(place, {feature})):
        raise UserError(f"{folder} has no feature {feature}: expected the index of one of its dictionary's")
    return InterpretedFeature(records[feature])
