"""Results of the stages ``interpret``, ``explain`` and ``atlas``."""

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


@dataclasses.dataclass(frozen=True)
class FeatureScore:
    """Detection scores of one feature's label, over the questions whose replies could be parsed."""

    accuracy: float  #: balanced: mean of the shares of correct replies on contexts with and without the feature
    precision: float  #: share of the contexts called active that are
    recall: float  #: share of the active contexts that were called active
    f1: float  #: their harmonic mean; 0 where nothing is correct
    contexts: int  #: that were scored


@dataclasses.dataclass(frozen=True)
class ExplainedFeature:
    """A label and its scores."""

    label: str  #: in words; "": the reply had none
    kept: bool  #: whether detection does better with it than with another feature's label, and than chance
    detection: FeatureScore | None  #: None: no reply could be parsed, or there is no label
    detection_control: FeatureScore | None  #: with the label of another feature that fires about as often


@dataclasses.dataclass(frozen=True)
class LabelScores:
    """Detection over all features that were scored."""

    mean: Interval | None  #: balanced accuracy, with a bootstrap interval over features; None: no reply parsed
    control: float | None  #: the same with the label of another feature
    features: int  #: in the mean
    unparsed: float  #: share of the replies that could not be parsed


@dataclasses.dataclass(frozen=True)
class ExplainedDictionary:
    """The labels of a dictionary's features and their scores; ``explained.json`` has each feature."""

    name: str  #: the member of its stack; "" for a single dictionary
    features: int  #: of the dictionary
    judged: int  #: with enough held-out firings, or a random sample of these
    skipped: int  #: asked for, but with too few held-out firings
    labelled: int  #: with a label, given or written
    kept: int  #: whose label is kept
    detection: LabelScores  #: in which contexts does the feature with this label fire?
    questions: int  #: answered
    prompt_tokens: int  #: of all questions, as counted by the endpoint, or else estimated from their length
    answer_tokens: int  #: of all answers, likewise


@dataclasses.dataclass(frozen=True)
class ExplainResults:
    """The members of a train unit."""

    kind: str  #: of the dictionaries
    model: str  #: that wrote or judged the labels
    written: bool  #: whether the model wrote them; otherwise they were given
    members: tuple[ExplainedDictionary, ...]  #: in the order of the stack
