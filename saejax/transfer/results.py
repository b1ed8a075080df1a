"""Results of the stage ``transfer``."""

import dataclasses
from collections.abc import Mapping

from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class MatchedDrops:
    """The drops of matched features of two dictionaries."""

    matched: int  #: pairs
    shares: tuple[float, float]  #: of the features of each that fire, those in a pair
    similarity: float | None  #: median over the pairs; None without any
    #: of the drops, with an interval over pairs; None, as what follows, with fewer than 3 pairs, or where all drops are
    #: the same
    rank_correlation: Interval | None
    shuffled: Interval | None  #: the same where pairs are shuffled; mean and middle 95 % of 200 draws
    #: where each partner is one of the ten features nearest to it in firing rate and activation; None, too, where the
    #: drops of these are all the same
    alike: Interval | None


@dataclasses.dataclass(frozen=True)
class ComparedDictionary:
    """A dictionary that was compared with others."""

    name: str  #: such as "topk/k32", or its folder
    model: str  #: whose activations it was trained on
    site: str  #: that it reads
    target: str  #: that it writes to
    features: int  #: all of them


@dataclasses.dataclass(frozen=True)
class MatchScores:
    """How alike the rows of two dictionaries are by one measure; intervals over features."""

    nearest: Interval  #: mean over the first one's features of the largest value among the second's (MMCS, with sign)
    nearest_back: Interval  #: the same from the second to the first
    matched: Interval  #: mean value of the pairs of the one-to-one assignment with the largest sum (PW-MCC)
    shared: Interval  #: share of these pairs whose value is at least `transfer.shared`; Wilson's interval
    close: Interval  #: share at or above 0.9; likewise
    mutual: float  #: features that are each other's nearest, over the features of the smaller dictionary
    gap: float  #: by how much at most the mean of the pairs falls short of the best assignment


@dataclasses.dataclass(frozen=True)
class ComparedRows:
    """Two dictionaries by one measure, beside chance."""

    found: MatchScores  #: of the two
    #: the same where nothing is shared: random directions with the mean and covariance of the second one's rows; of
    #: activity, the second one's on text shifted by half
    null: MatchScores
    #: of activity: mean correlation where each partner is replaced by the feature that fires most nearly as often;
    #: None: no feature has a partner
    alike: float | None = None


@dataclasses.dataclass(frozen=True)
class SpaceSimilarity:
    """How alike the spaces are that the decoder rows of matched features lie in."""

    pairs: int  #: of features that were looked at
    svcca: float  #: mean canonical correlation of the leading principal components
    svcca_null: Interval  #: where the pairs are shuffled: mean and the middle 95 %
    rsa: float  #: Spearman's correlation of the correlations between rows
    rsa_null: Interval  #: where the pairs are shuffled: mean and the middle 95 %


@dataclasses.dataclass(frozen=True)
class Rebuilt:
    """What a dictionary makes of activations that it was not trained on."""

    explained_variance: float  #: of the held-out half of the text
    l0: float  #: features active per token, mean
    ce_recovered: float | None = None  #: cross-entropy recovered against the mean; None where it was not measured


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """What a dictionary of another place saves in training, on the half of the text that fits maps."""

    tokens: tuple[int, ...]  #: trained on when explained variance was measured, on the other half
    tuned: tuple[float, ...]  #: explained variance of the dictionary that goes on from the other place's
    scratch: tuple[float, ...]  #: of one that starts at random, on the same tokens
    turned: tuple[float, ...]  #: of one that starts from the other place's after a random rotation
    #: share of the random start's tokens that `tuned` needs not to explain as much as that does in the end; 0: it never
    #: does; at most 1 less the first of `tokens` over the last
    saved: float
    saved_null: float  #: the same of `turned`


@dataclasses.dataclass(frozen=True)
class ReconstructionTransfer:
    """The first dictionary on the site of the second."""

    own: Rebuilt  #: the second dictionary there, in whose place the first one stands
    direct: Rebuilt | None  #: as it is; None where widths differ
    direct_null: Rebuilt | None  #: the first dictionary, turned by a random rotation
    affine: Rebuilt  #: between affine maps to its own site and back, fitted on the other half of the text
    affine_null: Rebuilt  #: the turned one between these maps
    fine_tuning: FineTuning | None = None  #: None where it was not asked for, or the kind has no k


@dataclasses.dataclass(frozen=True)
class ComparedPair:
    """Two dictionaries."""

    first: str  #: name
    second: str  #: name
    measures: Mapping[str, ComparedRows]  #: by name: decoder, encoder, folded, activity
    agreeing: float | None = None  #: share of the pairs by decoder that the assignment by encoder has, too
    spaces: SpaceSimilarity | None = None  #: of pairs by activity, or else by decoder; None of fewer than 50 pairs
    tokens: int | None = None  #: of text that both read, on which activity was compared
    onto_second: ReconstructionTransfer | None = None  #: the first dictionary at the second one's site
    onto_first: ReconstructionTransfer | None = None  #: the second at the first one's
    causal: Mapping[str, MatchedDrops] | None = None  #: behaviour -> whether shared features have the same effects


@dataclasses.dataclass(frozen=True)
class FeatureShares:
    """How many features of a dictionary have a partner in others."""

    name: str  #: of the dictionary
    everywhere: Interval  #: shared with every other dictionary; Wilson's interval, as of the others
    somewhere: Interval  #: with one at least
    nowhere: Interval  #: with none: its own
    everywhere_null: float  #: the share that is shared everywhere where nothing is
    somewhere_null: float  #: likewise


@dataclasses.dataclass(frozen=True)
class Chain:
    """A feature that persists: in dictionaries of neighbouring layers, each shared with the one before."""

    first: str  #: name of the first dictionary
    features: tuple[int, ...]  #: the feature in it and in those that follow
    value: float  #: cosine or correlation of the weakest link
    label: str | None = None  #: of the first of them that has one


@dataclasses.dataclass(frozen=True)
class Chains:
    """Features followed through the layers of a model."""

    dictionaries: tuple[str, ...]  #: in the order of their layers
    lengths: Mapping[int, int]  #: dictionaries that a chain runs through -> how many chains; 2 at least
    lengths_null: Mapping[int, int]  #: the same where each dictionary after the first is replaced by random directions
    longest: tuple[Chain, ...]  #: the first of them, longest first; all are in `chains.parquet`


@dataclasses.dataclass(frozen=True)
class TransferResults:
    """How much dictionaries have in common."""

    dictionaries: tuple[ComparedDictionary, ...]  #: in the order of the matrices
    rule: str  #: when two features count as shared, in words
    pairs: tuple[ComparedPair, ...]  #: each once
    shares: tuple[FeatureShares, ...]  #: of each dictionary
    chains: tuple[Chains, ...]  #: of each model with dictionaries at several layers
