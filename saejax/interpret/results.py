"""Results of the stages ``interpret``, ``explain`` and ``atlas``."""

import dataclasses
from collections.abc import Mapping

from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class LabelCounts:
    """Labelled features, and the quality of each feature's detector on held-out text; None where no feature fires."""

    features: int  #: that fire on the search text
    labelled: int  #: of them, those with a label
    share: Interval | None  #: labelled over features, Wilson
    f1: Interval | None  #: mean F1 of the detectors of all of them, labelled or not; bootstrap over features
    shuffled_f1: float | None  #: mean F1 of the detector of another feature that fires about as often


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

    name: str  #: name of the member; "" for a single dictionary
    site: str  #: site that it reads
    target: str  #: site that it reconstructs or predicts
    features: int  #: number of features
    search_tokens: int  #: number of tokens on which labels were searched, sinks excluded
    held_out_tokens: int  #: number of tokens on which labels were scored
    labels: LabelCounts  #: labels of the dictionary
    frozen: LabelCounts  #: labels of a frozen-random dictionary as large and as sparse
    random: LabelCounts  #: labels of random directions that fire as often
    explained_variance: float  #: share of the variance of held-out tokens, at most 4,096, that the dictionary rebuilds
    frozen_explained_variance: float  #: the same of the frozen-random dictionary, its decoder fitted
    categories: CategoryCounts | None = None  #: associations with prompt categories; None: not asked for


@dataclasses.dataclass(frozen=True)
class InterpretResults:
    """The members of a train unit."""

    kind: str  #: kind of the dictionaries
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

    dictionary: str  #: name, such as "topk" or "topk/k32"
    folder: str  #: folder in the unit; "" for the unit itself
    features: int  #: number of features with a page
    by_hand: int  #: number of features with a label by a person
    reviewed: tuple[ReviewedFeatures, ...] = ()  #: by behaviour, where effects of top features were measured


@dataclasses.dataclass(frozen=True)
class AtlasResults:
    """The atlases of a train unit."""

    kind: str  #: kind of the dictionaries
    members: tuple[AtlasPages, ...]  #: in their order


@dataclasses.dataclass(frozen=True)
class LabelScore:
    """A score of a label."""

    value: Interval  #: with its 95 % interval: Wilson's of shares, bootstrap over contexts of correlations
    #: the same with the label of another feature that fires about as often, None without any; of an intruder, whose
    #: questions show no label, the score of guessing
    control: float | None


@dataclasses.dataclass(frozen=True)
class MeanLabelScore:
    """A score over the features of a dictionary."""

    features: int  #: that have the score
    value: Interval  #: mean over these, bootstrap
    control: float | None  #: mean of the controls; None without any


@dataclasses.dataclass(frozen=True)
class ExplainedFeature:
    """A label and its scores."""

    label: str  #: in words; "": the reply had none
    kept: bool  #: whether detection does better with it than with another feature's label, and than chance
    #: by the names of ``label_scores``; without those whose replies could not be parsed
    scores: Mapping[str, LabelScore]


@dataclasses.dataclass(frozen=True)
class ExplainedDictionary:
    """The labels of a dictionary's features and their scores; ``explained.json`` has each feature."""

    name: str  #: the member of its stack; "" for a single dictionary
    judged: int  #: features that fire in training text and often enough in held-out text, or a random sample of these
    skipped: int  #: features asked for, but with too few firings
    kept: int  #: features whose label is kept
    scores: Mapping[str, MeanLabelScore]  #: by the names of ``label_scores``
    unparsed: float  #: share of the replies about labels, controls left aside, that could not be parsed
    tokens: int  #: of all questions and answers, as the endpoint counts them, or else estimated from their length
    #: of the judged, features without a label, a detection score or another label to compare with; None: there are none
    untold: int | None = None


@dataclasses.dataclass(frozen=True)
class ExplainResults:
    """The members of a train unit."""

    kind: str  #: kind of the dictionaries
    model: str  #: language model that wrote and judged the labels
    members: tuple[ExplainedDictionary, ...]  #: in the order of the stack
