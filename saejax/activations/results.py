"""Results of the stage ``capture``."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class SinkCounts:
    """What the sink rule leaves out at a site.

    Attributes:
      position_0: tokens at position 0.
      beyond: tokens after it.
      share_beyond: these, of all tokens after position 0.
    """

    position_0: int
    beyond: int
    share_beyond: float


@dataclasses.dataclass(frozen=True)
class CapturedSite:
    """What was recorded at a site.

    Attributes:
      rows: tokens.
      bytes: of the activations.
      d: width.
      median_norm: of the train rows.
      largest_norm: of all.
      max_norm: rows above it are sinks.
      sinks: how many those are.
    """

    rows: int
    bytes: int
    d: int
    median_norm: float
    largest_norm: float
    max_norm: float
    sinks: SinkCounts


@dataclasses.dataclass(frozen=True)
class CaptureResults:
    """The activation store.

    Attributes:
      sites: by name.
      documents: by split.
      tokens: recorded ones, by split.
      tokens_per_second: padding left out; 0 if all was done before.
      padding_share: of the tokens that the model ran on.
    """

    sites: Mapping[str, CapturedSite]
    documents: Mapping[str, int]
    tokens: Mapping[str, int]
    tokens_per_second: float
    padding_share: float
