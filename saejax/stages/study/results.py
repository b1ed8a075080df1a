"""Results of the stage ``study``."""

import dataclasses
from collections.abc import Mapping

from saejax.interventions.answers import CausalVerdict, FeatureEffect
from saejax.interventions.falsify import Falsification
from saejax.results import Interval
from saejax.studies.associations import BenchmarkAssociations
from saejax.studies.primitives import BenchmarkPrimitives, DomainEffect


@dataclasses.dataclass(frozen=True)
class BenchmarkFeature:
    """A feature that fires on the test items; a line of `feature_importance_ranking.json`."""

    feature: int  #: its index
    attribution: float  #: estimated effect on the train items, nats
    firing_rate: float  #: share of the positions of the test items on which it fires
    mean_activation: float  #: over the positions on which it fires
    drop: Interval | None = None  #: of the reference's log-likelihood when it alone is ablated, nats; top features only


@dataclasses.dataclass(frozen=True)
class StudyItems:
    """Items of the benchmark."""

    train: int  #: items that select features
    test: int  #: items on which features are tested


@dataclasses.dataclass(frozen=True)
class BenchmarkActivations:
    """Activations of the dictionary's site on the test items and their reference answers, attention sinks excluded."""

    tokens: int  #: that were read
    median_norm: float  #: of the activations
    largest_norm: float  #: of the activations
    l0: float  #: features active per token, mean
    firing: float  #: share of the features that fire at all
    explained_variance: float  #: by the dictionary: 1 - sum |x - x_hat|^2 / sum |x - mean|^2


@dataclasses.dataclass(frozen=True)
class ChosenFeatures:
    """The top features and from what they are resampled; `features.json`."""

    top: tuple[FeatureEffect, ...]  #: the top features, one by one
    pools: Mapping[int, tuple[float, ...]]  #: feature -> up to 256 activations where it fires on train items
    activations: BenchmarkActivations  #: of the test items
    primitives: BenchmarkPrimitives  #: groups of important features, not yet judged


@dataclasses.dataclass(frozen=True)
class AnswerScores:
    """Scored answers under a group of edits; of control sets means over all sets."""

    group: str  #: clean, top (set to zero), resample, random, placebo or untrained
    sets: int  #: number of sets
    accuracy: float  #: share of right answers; of generated ones by the flexible rule
    drop: float  #: of accuracy, against the unedited model
    largest_drop: float  #: largest over the sets
    p_value: float | None  #: of T's drop of accuracy among those under the control sets; None for other groups
    strict: float | None  #: share of right answers by the strict rule; None where answers are chosen
    unformatted: float | None  #: share of answers in which the strict rule finds none
    cut: float | None  #: share of answers that were cut off


@dataclasses.dataclass(frozen=True)
class StudyResults:
    """Effects of ablating a dictionary's top features on a benchmark."""

    dictionary: str  #: name of the dictionary
    site: str  #: site that is edited: where the dictionary writes to, or reads
    k: int  #: number of top features
    rule: str  #: rule of the verdict, in words
    score: str  #: how items are scored: generate, choice or likelihood
    items: StudyItems  #: number of items
    log_likelihood: float  #: of the reference answers without an edit, mean over test items, nats
    log_likelihood_spread: float  #: its standard deviation over test items, nats
    chance: float  #: accuracy of guessing; 0 of generated answers
    #: whether accuracy's interval before any edit holds that of guessing (of generated answers: whether nothing is
    #: right). Then only log-likelihoods are compared. None without accuracy.
    at_chance: bool | None
    top: tuple[FeatureEffect, ...]  #: the top features, one by one; drops are of the log-likelihood, nats
    verdict: CausalVerdict  #: the answers, as if this were the run's only benchmark
    scores: tuple[AnswerScores, ...]  #: accuracy, format failures and cut-off answers by group of edits
    origin: str  #: source of the items
    #: categories of each item, by its id
    categories: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    activations: BenchmarkActivations | None = None  #: statistics of the site's activations on the test items
    primitives: BenchmarkPrimitives | None = None  #: groups of features that matter for the same items
    associations: BenchmarkAssociations | None = None  #: of features with categories and right answers
    domains: Mapping[str, DomainEffect] | None = None  #: effects of the top features of other benchmarks
    falsification: Falsification | None = None  #: whether the top features fire on words alone
