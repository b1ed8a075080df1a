"""Results of the stage ``cluster``."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class GroupCost:
    """The effect of ablating the features of a group on a behaviour, beside matched sets."""

    features: int  #: of the group, that fire on the behaviour's test prompts
    drop: float  #: in logit difference: sum of the effects of ablating each alone, on the prompts of odd number
    matched_drop: float  #: the same of as many features that fire as often and as strongly, mean over random sets
    p: float  #: share of random sets with an effect at least as large
    q: float  #: Benjamini and Hochberg's, over the stable groups of the dictionary and the behaviours


@dataclasses.dataclass(frozen=True)
class FeatureGroup:
    """A group of similar features."""

    name: str  #: label of the most central feature that has one, or else the number of the most central feature
    features: tuple[int, ...]  #: the most central first
    mean_similarity: float  #: over its pairs
    overlap: float  #: stability: mean over bootstrap samples of the largest Jaccard overlap with a group found there
    stable: bool  #: whether that exceeds 0.5 and every group of shuffled data
    costs: Mapping[str, GroupCost]  #: by behaviour; only of stable groups, where effects were measured
    primitives: tuple[str, ...]  #: behaviours on which its effect is larger than that of matched sets (q at most 0.05)


@dataclasses.dataclass(frozen=True)
class Grouping:
    """The groups of a dictionary's features in one view."""

    view: str  #: coactivation, effects or decoder
    features: int  #: looked at
    grouped: int  #: of these, in a group
    count: int  #: groups
    stable_groups: int  #: of these, stable
    bar: float  #: overlap that a stable group exceeds
    count_null: float  #: groups of shuffled data, mean
    largest: tuple[FeatureGroup, ...]  #: stable ones first, by size; the parquet file has the features of all groups


@dataclasses.dataclass(frozen=True)
class ClusteredDictionary:
    """The groups of a dictionary's features."""

    name: str  #: such as "topk/k32", or its folder
    site: str  #: that it reads
    features: int  #: of the dictionary
    tokens: int  #: of the text on which firings were compared
    groupings: tuple[Grouping, ...]  #: by view
    without: Mapping[str, str]  #: view that was left out -> reason


@dataclasses.dataclass(frozen=True)
class ClusterResults:
    """Groups of similar features."""

    rule: str  #: when a group counts as stable
    dictionaries: tuple[ClusteredDictionary, ...]  #: in the order of the flag
