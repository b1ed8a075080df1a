"""Results of the stages ``tokenize`` and ``capture``."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class TokenizeResults:
    """Text as token ids on disk, in the files that a store has in ``documents/``."""

    documents: Mapping[str, int]  #: pieces of texts, by split
    tokens: Mapping[str, int]  #: by split
    sha256: Mapping[str, str]  #: of the files, by name


@dataclasses.dataclass(frozen=True)
class SinkCounts:
    """Counts of the tokens that the sink rule leaves out at a site."""

    position_0: int  #: tokens at position 0
    beyond: int  #: tokens after it
    share_beyond: float  #: these, of all tokens after position 0


@dataclasses.dataclass(frozen=True)
class SiteNorms:
    """The norms of a site's activations, and what the sink rule leaves out."""

    median_norm: float  #: of the train rows
    largest_norm: float  #: of all
    max_norm: float  #: rows above it are sinks
    sinks: SinkCounts  #: how many those are


@dataclasses.dataclass(frozen=True)
class CapturedSite(SiteNorms):
    """A site as it was recorded."""

    rows: int  #: tokens
    bytes: int  #: of the activations
    d: int  #: width


@dataclasses.dataclass(frozen=True)
class CaptureResults:
    """The activation store."""

    sites: Mapping[str, CapturedSite]  #: by name
    documents: Mapping[str, int]  #: by split
    tokens: Mapping[str, int]  #: recorded ones, by split
    tokens_per_second: float  #: padding left out; 0 if all was done before
    padding_share: float  #: of the tokens that the model ran on
    backend: str  #: which ran the model, torch or jax
    dtype: str  #: in which it ran
