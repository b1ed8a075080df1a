"""Results of the stage ``transfer``."""

import dataclasses
from collections.abc import Mapping

from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class ComparedDictionary:
    """A compared dictionary."""

    name: str  #: name, such as "topk/k32", or folder
    model: str  #: model of its training activations
    site: str  #: that it reads
    target: str  #: that it writes to
    features: int  #: number of features
    dead_known: bool  #: whether it is known which features fire on no held-out text; if not, all are compared


@dataclasses.dataclass(frozen=True)
class MatchScores:
    """Similarity of the compared features of two dictionaries by one measure; intervals over features."""

    nearest: Interval  #: mean over the first's features of the largest value among the second's (MMCS, signed)
    nearest_back: Interval  #: the same from the second to the first
    matched: Interval  #: mean value of the pairs of the one-to-one assignment with the largest sum (PW-MCC)
    shared: Interval  #: share of these pairs whose value is at least 0.7; Wilson's interval
    gap: float  #: upper bound of the distance of the mean of the pairs to the best assignment's


@dataclasses.dataclass(frozen=True)
class ComparedRows:
    """Two dictionaries by one measure, with a null."""

    scores: MatchScores  #: similarity of the two
    #: the same where nothing is shared: random directions with the mean and covariance of the second's rows; for
    #: activity, the second's on text shifted by half
    null: MatchScores
    #: features compared, of the first and of the second: all that fire on any held-out text; for activity,
    #: those with enough firings
    compared: tuple[int, int]
    left_out: tuple[int, int]  #: features not compared, of the first and of the second
    #: for activity: `shared` of the first dictionary matched with itself on the same tokens, the most there can be
    ceiling: float | None = None


@dataclasses.dataclass(frozen=True)
class Rebuilt:
    """Scores of a dictionary at a site."""

    explained_variance: float  #: explained variance on the half of the text that measures
    l0: float  #: features active per token, mean


@dataclasses.dataclass(frozen=True)
class FittedMap:
    """An affine map between the values of two sites."""

    site: str  #: that it maps from
    width: int  #: dimensions of the site
    rows: int  #: tokens that it was fitted on
    r2: float  #: share of variance explained on the half of the text that measures
    ridge: float  #: chosen by cross-validation, relative to the mean variance of the input's dimensions


@dataclasses.dataclass(frozen=True)
class ReconstructionTransfer:
    """One dictionary at the site of another."""

    native: Rebuilt  #: the site's dictionary
    direct: Rebuilt | None  #: the other one unchanged; None where widths differ
    direct_null: Rebuilt | None  #: the same after a random rotation
    affine: Rebuilt  #: the other one between affine maps to its own site and back
    affine_null: Rebuilt  #: the rotated one between these maps
    into: FittedMap  #: the map from that site to the dictionary's own
    back: FittedMap  #: the map back


@dataclasses.dataclass(frozen=True)
class ComparedPair:
    """Two dictionaries."""

    first: str  #: name of the first dictionary
    second: str  #: name of the second dictionary
    measures: Mapping[str, ComparedRows]  #: by measure: decoder, encoder, activity
    tokens: int | None = None  #: tokens on which activity was compared
    onto_second: ReconstructionTransfer | None = None  #: the first dictionary at the second's site
    onto_first: ReconstructionTransfer | None = None  #: the second at the first's


@dataclasses.dataclass(frozen=True)
class Chain:
    """A feature that persists through layers: in each dictionary shared with the one before."""

    first: str  #: name of the first dictionary
    features: tuple[int, ...]  #: the feature in each, from that dictionary on
    value: float  #: cosine or correlation of the weakest link
    label: str | None = None  #: label or top tokens of the first feature that has any


@dataclasses.dataclass(frozen=True)
class Chains:
    """Chains of shared features through the layers of a model."""

    dictionaries: tuple[str, ...]  #: names in the order of their layers
    measure: str  #: the first measure asked for that applies to all successive layers
    lengths: Mapping[int, int]  #: number of dictionaries of a chain, at least 2 -> number of chains
    lengths_null: Mapping[int, int]  #: the same under the null
    longest: tuple[Chain, ...]  #: the longest, by their weakest link


@dataclasses.dataclass(frozen=True)
class TransferResults:
    """Results of the comparison of dictionaries."""

    dictionaries: tuple[ComparedDictionary, ...]  #: in the order of the matrices
    rule: str  #: when two features count as shared
    pairs: tuple[ComparedPair, ...]  #: that were compared, each once
    chains: tuple[Chains, ...]  #: of each model with dictionaries at several layers
