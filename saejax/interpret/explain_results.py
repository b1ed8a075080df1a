"""Results of the stage ``explain``."""

import dataclasses

from saejax.results import Interval


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
