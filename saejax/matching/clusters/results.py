"""Results of the stage ``cluster``."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class FeatureGroup:
    """A group of features that fire together."""

    name: str  #: label of the most central feature that has one, or else the number of the most central feature
    features: tuple[int, ...]  #: the most central first
    mean_similarity: float  #: over its pairs
    overlap: float  #: stability: mean over bootstrap samples of the largest Jaccard overlap with a group found there
    stable: bool  #: whether that exceeds 0.5 and every group of shuffled data


@dataclasses.dataclass(frozen=True)
class ClusteredDictionary:
    """The groups of a dictionary's features."""

    name: str  #: name, such as "topk/k32", or folder
    site: str  #: site that it reads
    tokens: int  #: of the text on which firings were compared
    features: int  #: compared features, which fire on at least 10 of the tokens, in at least 5 texts
    grouped: int  #: number of these in a group
    count: int  #: number of groups
    stable_groups: int  #: number of stable groups
    bar: float  #: overlap that a stable group exceeds
    count_null: float  #: groups of shuffled data, mean
    largest: tuple[FeatureGroup, ...]  #: stable ones first, by size; the parquet file has the features of all groups


@dataclasses.dataclass(frozen=True)
class ClusterResults:
    """Groups of features that fire together."""

    rule: str  #: when a group counts as stable
    dictionaries: tuple[ClusteredDictionary, ...]  #: in the order of the flag
