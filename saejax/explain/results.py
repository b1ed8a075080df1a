"""Results of the stage ``explain``."""

import dataclasses
from collections.abc import Mapping

from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class FeatureScore:
    """How well the answers about a feature fit; of questions whose answers could be read."""

    accuracy: float  #: balanced: mean of the shares of right answers on contexts with the feature and without it
    precision: float  #: share of what was called active that is
    recall: float  #: share of contexts with the feature that were called active
    f1: float  #: their harmonic mean; 0 where nothing is right
    contexts: int  #: that were judged


@dataclasses.dataclass(frozen=True)
class ExplainedFeature:
    """A label and its scores."""

    label: str  #: in words; "": the answer was none
    kept: bool  #: whether it is better in detection than the label of another feature, and than guessing
    detection: FeatureScore | None  #: None: nothing could be read, or there is no label
    detection_control: FeatureScore | None  #: with the label of another feature that fires about as often
    fuzzing: FeatureScore | None = None  #: None: not asked for, or nothing could be read
    fuzzing_control: FeatureScore | None = None  #: with the label of another feature
    intruder: float | None = None  #: share of intruders that were found, without a label; None as above
    embedding: float | None = None  #: AUROC of the label's cosine with contexts; None: not asked for, or no label
    embedding_control: float | None = None  #: with the label of another feature


@dataclasses.dataclass(frozen=True)
class LabelScores:
    """A score of all features that were judged."""

    mean: (
        Interval | None
    )  #: of balanced accuracy (intruders: the share found; embedding: AUROC), bootstrap over features; None: no answer
    control: float | None  #: the same with the label of another feature; of intruders: by guessing
    features: int  #: over which the mean is
    unread: float  #: share of the answers that could not be read


@dataclasses.dataclass(frozen=True)
class ExplainedDictionary:
    """The labels of a dictionary's features, and how good they are; ``explained.json`` has each."""

    name: str  #: the member of its stack; "" for one alone
    features: int  #: all of them
    judged: int  #: that were asked about: those with enough held-out firings, or a draw of them
    skipped: int  #: that were asked for and fire too seldom on held-out text
    labelled: int  #: for which a label was given or written
    kept: int  #: of them, those whose label is kept
    scores: Mapping[str, LabelScores]  #: detection, and what else was asked for
    questions: int  #: that were answered
    prompt_tokens: int  #: of all questions and embedded texts, as the endpoint counts them, else by their length
    answer_tokens: int  #: of all answers, likewise


@dataclasses.dataclass(frozen=True)
class ExplainResults:
    """The members of a train unit."""

    kind: str  #: of the dictionaries
    model: str  #: that wrote or judged the labels
    written: bool  #: whether it wrote them; they were given otherwise
    members: tuple[ExplainedDictionary, ...]  #: in their order
