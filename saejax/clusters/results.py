"""Results of the stage ``cluster``."""

import dataclasses
from collections.abc import Mapping

from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class GroupCost:
    """What removing the features of a group costs a behaviour, beside matched sets."""

    features: int  #: of the group, that fire on its test prompts
    drop: float  #: of the logit difference: the sum of what removing each alone costs, on the prompts of odd number
    matched_drop: float  #: the same of as many features that fire as often and as strongly, mean over draws
    p: float  #: share of draws that cost at least as much
    q: float  #: Benjamini and Hochberg's, over the stable groups of the dictionary and the behaviours


@dataclasses.dataclass(frozen=True)
class FeatureGroup:
    """Features that belong together."""

    name: str  #: the label of the most central feature that has one
    features: tuple[int, ...]  #: the most central first
    alike: float  #: mean over its pairs
    overlap: float  #: mean over bootstrap samples of the largest Jaccard overlap with a group found there
    stable: bool  #: whether that exceeds 0.5, and what 95 % of the groups of shuffled data reach
    costs: Mapping[str, GroupCost]  #: by behaviour; only of stable groups, where effects were measured
    primitives: tuple[str, ...]  #: behaviours that it costs more than matched features do (q at most 0.05)


@dataclasses.dataclass(frozen=True)
class Grouping:
    """What a method finds in a view of a dictionary."""

    view: str  #: coactivation, effects or decoder
    method: str  #: HDBSCAN or spectral
    features: int  #: that were looked at
    grouped: int  #: of them, those in a group
    count: int  #: groups
    agreement: Interval  #: adjusted Rand index with bootstrap samples: mean, smallest, largest
    agreement_null: Interval  #: the same of shuffled data with samples of them
    count_null: float  #: groups in shuffled data, mean
    stable: bool  #: whether every sample agrees more than any of shuffled data
    stable_groups: int  #: groups that are stable themselves; 0 where the grouping is not
    largest: tuple[FeatureGroup, ...]  #: stable ones first, by size; all features of groups are in the parquet file


@dataclasses.dataclass(frozen=True)
class GroupingAgreement:
    """Whether two groupings of the same features, or of features that are matched, are one."""

    first: str  #: a view, or a dictionary
    second: str  #: likewise
    method: str  #: by which both were found
    view: str  #: in which, of two dictionaries; "" of two views
    features: int  #: in both
    agreement: float  #: adjusted Rand index
    null: Interval  #: the same with one of them shuffled, mean and middle 95 %


@dataclasses.dataclass(frozen=True)
class ClusteredDictionary:
    """The groups of a dictionary's features."""

    name: str  #: such as "topk/k32", or its folder
    site: str  #: that it reads
    features: int  #: all of them
    tokens: int  #: of text on which it was seen which fire together
    groupings: tuple[Grouping, ...]  #: by view and method
    without: Mapping[str, str]  #: view that was left out -> why
    between_views: tuple[GroupingAgreement, ...]  #: whether what is alike in one view is so in another


@dataclasses.dataclass(frozen=True)
class ClusterResults:
    """Groups of features that belong together."""

    rule: str  #: when groups count as stable, in words
    dictionaries: tuple[ClusteredDictionary, ...]  #: in the order of the flag
    between_dictionaries: tuple[GroupingAgreement, ...]  #: of one site, such as seeds: matched by decoder rows
