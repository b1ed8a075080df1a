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

    position_0: int  #: sinks at position 0
    beyond: int  #: sinks after position 0
    share_beyond: float  #: `beyond` as a share of all tokens after position 0


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

    rows: int  #: number of rows (tokens)
    bytes: int  #: size of the activations
    d: int  #: width of the site


@dataclasses.dataclass(frozen=True)
class CaptureResults:
    """The activation store."""

    sites: Mapping[str, CapturedSite]  #: facts about each site
    documents: Mapping[str, int]  #: texts, or pieces of them that fit the context, by split
    tokens: Mapping[str, int]  #: recorded tokens by split
    tokens_per_second: float  #: speed, padding excluded; 0 if nothing was left to do
    backend: str  #: which ran the model, torch or jax
    dtype: str  #: in which it ran
