"""Results of the stages ``interpret`` and ``atlas``."""

import dataclasses
from collections.abc import Mapping

from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class LabelCounts:
    """Counts of labelled features, and the quality of each feature's best detector, on held-out text."""

    features: int  #: that fire on the search text
    labelled: int  #: of them, those with a label
    share: float  #: labelled over features
    mean_f1: float  #: of the detector chosen for each feature, labelled or not; 0 where there is none
    share_interval: Interval | None = None  #: of ``share``, Wilson, over features
    f1_interval: Interval | None = None  #: of ``mean_f1``, bootstrap over features; None: none fires


@dataclasses.dataclass(frozen=True)
class FrozenControl:
    """The search of labels on a frozen-random dictionary as large and as sparse, whose directions were drawn."""

    labels: LabelCounts  #: of its features, by the rule that the dictionary's are judged by
    shuffled_f1: float  #: mean F1 of the label of another of its features
    l0: float  #: features that fire on a token of held-out text, mean over 4,096 tokens at most
    own_l0: float  #: the same of the dictionary
    explained_variance: float  #: share of the variance of these tokens that it rebuilds, its decoder fitted
    own_explained_variance: float  #: the same of the dictionary


@dataclasses.dataclass(frozen=True)
class CategoryCounts:
    """Features that are active more often on prompts of a category, at a false discovery rate of 5 %."""

    prompts: int  #: of behaviours and benchmarks
    tests: int  #: categories, and right and wrong answers within them
    live: int  #: features that are active on at least five prompts
    features: int  #: of them, those with an association
    shuffled: int  #: the same with the prompts' categories and answers permuted


@dataclasses.dataclass(frozen=True)
class InterpretedDictionary:
    """Interpretation of a dictionary's features; ``features/*.json`` has the record of each."""

    name: str  #: the member of its stack; "" for one alone
    site: str  #: read
    target: str  #: rebuilt or predicted
    features: int  #: all of them
    search_tokens: int  #: on which labels were searched, sinks left out
    held_out_tokens: int  #: on which they were scored
    labels: LabelCounts  #: of the dictionary
    random: LabelCounts  #: the same of random directions that fire as often
    shuffled_f1: float  #: mean F1 of the label of another feature that fires about as often
    families: Mapping[str, int]  #: labels by what they look at
    frozen: FrozenControl  #: the same of a frozen-random dictionary
    categories: CategoryCounts | None = None  #: associations with prompt categories; None: not asked for


@dataclasses.dataclass(frozen=True)
class InterpretResults:
    """The members of a train unit."""

    kind: str  #: of the dictionaries
    members: tuple[InterpretedDictionary, ...]  #: in their order


@dataclasses.dataclass(frozen=True)
class ReviewedFeatures:
    """Counts of a behaviour's top features that a person has labelled; ``review/BEHAVIOUR.csv`` is the sheet."""

    behaviour: str  #: its name
    reviewed: int  #: top features with a label by hand
    features: int  #: top features


@dataclasses.dataclass(frozen=True)
class AtlasPages:
    """The atlas of a dictionary."""

    dictionary: str  #: such as "topk" or "topk/k32"
    folder: str  #: in the unit; "" for the unit's own
    features: int  #: with a page
    by_hand: int  #: features with a label of one's own
    automatic: int  #: of the others, features with a label found without a language model
    by_model: int  #: of the others, features with a label by a language model, or found and judged by it
    reviewed: tuple[ReviewedFeatures, ...] = ()  #: by behaviour, where effects of top features were measured


@dataclasses.dataclass(frozen=True)
class AtlasResults:
    """The atlases of a train unit."""

    kind: str  #: of the dictionaries
    members: tuple[AtlasPages, ...]  #: in their order
