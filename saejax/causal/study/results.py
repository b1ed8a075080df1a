"""Results of the stage ``study``."""

import dataclasses
from collections.abc import Mapping

from saejax.causal.claims import Claim
from saejax.causal.results import ControlMatch, RankedFeature
from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class ItemScore:
    """A test item under a condition; a line of `items.jsonl`."""

    #: clean; top/zero and top/random, the top features set to zero, or each replaced, where it fires, by one of up to
    #: 256 activations where it fires on train items (a feature that never does stays as it is); control-<n>/zero and
    #: /random, the same with matched random features
    condition: str
    id: str  #: of the item
    log_likelihood: float  #: of the reference solution, nats
    tokens: int  #: of the reference solution
    answer: str | None = None  #: the model's, where answers were judged
    correct: bool | None = None  #: whether it is right, by the flexible or the raw rule, where answers were judged


@dataclasses.dataclass(frozen=True)
class ChosenFeatures:
    """What is replaced, and with what: `features.json`, kept for a run that goes on."""

    top: tuple[RankedFeature, ...]  #: the top features
    controls: tuple[tuple[int, ...], ...]  #: of each draw its features, top ones perhaps among them
    match: ControlMatch  #: how well they match
    disjoint: int  #: sets without a feature in common that they can be drawn from
    pools: Mapping[int, tuple[float, ...]]  #: feature -> up to 256 activations where it fires on train items


@dataclasses.dataclass(frozen=True)
class StudyEffect:
    """What replacing the top features does to a score."""

    after: Interval  #: the score
    drop: Interval  #: before - after
    controls: tuple[float, ...]  #: mean drop of each draw of matched random features
    control_drop: float  #: mean of all draws
    p_value: float  #: (1 + draws with as large a drop) / (1 + draws): never below 1 / (1 + draws)
    difference: Interval  #: the drop beyond the controls' mean, paired by item


@dataclasses.dataclass(frozen=True)
class StudyEffects:
    """A score on the test items."""

    before: Interval  #: any edit; of accuracy, as after it, with a 95 % Wilson interval
    zero: StudyEffect | None  #: with features set to zero; None if it was not measured
    random: StudyEffect | None  #: with features replaced at random; None if it was not measured

    @property
    def replaced(self) -> dict[str, StudyEffect | None]:
        """By replacement."""
        return dict(zero=self.zero, random=self.random)


@dataclasses.dataclass(frozen=True)
class SingleEffect:
    """What setting one top feature to zero by itself does, beside the random features that draws put in its place."""

    feature: int  #: its number
    drop: Interval  #: of the reference's log-likelihood per token, nats
    p_value: float  #: that it is as likely above 0 as below, by as much: two-sided, by sign flips over items
    q_value: float  #: Benjamini and Hochberg's, over the top features that fire on the test items
    controls: int  #: different random features that draws put in its place
    control_drop: float | None  #: mean drop without one of these; None, as in the next, if there are none
    control_percentile: float | None  #: share of them whose removal costs less
    accuracy_drop: Interval | None = None  #: of choices; None where it was not measured
    control_accuracy_drop: float | None = None  #: mean without one of these


@dataclasses.dataclass(frozen=True)
class SingleEffects:
    """The top features that fire on the test items, each set to zero by itself."""

    features: tuple[SingleEffect, ...]  #: the largest drop first
    discoveries: int  #: how many have a q-value of at most 0.05
    control_discoveries: tuple[int, ...]  #: of each draw's features the same, with q-values over that draw
    p_value: float  #: (1 + draws with as many discoveries) / (1 + draws)
    least_p: float  #: the smallest p-value that a feature can have with so many items


@dataclasses.dataclass(frozen=True)
class ImportantFeature(RankedFeature):
    """A feature that fires on the test items; an entry of `feature_importance_ranking.json`."""

    single: SingleEffect | None = None  #: of a top feature, what removing it by itself does


@dataclasses.dataclass(frozen=True)
class StudyItems:
    """Items of the benchmark."""

    train: int  #: that choose features
    test: int  #: that judge them


@dataclasses.dataclass(frozen=True)
class BenchmarkActivations:
    """Activations of the dictionary's site on the test items and their reference answers, sinks left out."""

    tokens: int  #: that were read
    median_norm: float  #: of the activations
    largest_norm: float  #: of the activations
    l0: float  #: features active per token, mean
    firing: float  #: share of the features that fire at all
    explained_variance: float  #: by the dictionary: 1 - sum |x - x_hat|^2 / sum |x - mean|^2


@dataclasses.dataclass(frozen=True)
class StudyJudgement:
    """What the scores say."""

    #: whether accuracy's interval before any edit holds that of guessing (of generated answers: whether nothing is
    #: right). Then only log-likelihoods are compared, unless `study.even_at_chance` is set. None without accuracy.
    at_chance: bool | None
    accuracy: StudyEffects | None  #: None if it was not measured
    log_likelihood_per_token: StudyEffects  #: of the reference, nats
    #: by replacement, as if this were the run's only benchmark; `p_logit_diff`, `low` and `high` are of the reference's
    #: log-likelihood per token. None where accuracy was not measured.
    claims: Mapping[str, Claim | None]
    reason: str  #: in words


@dataclasses.dataclass(frozen=True)
class StudyResults(StudyJudgement):
    """What replacing a dictionary's top features does to a benchmark's score."""

    dictionary: str  #: its name
    site: str  #: that it writes to, or reads
    rule: str  #: of the claims, in words
    score: str  #: how items are scored: generate, choice or likelihood
    items: StudyItems  #: how many
    chance: float  #: accuracy of guessing; 0 of generated answers
    top: tuple[RankedFeature, ...]  #: as in `features.json`
    controls: tuple[tuple[int, ...], ...]  #: as in `features.json`
    match: ControlMatch  #: as in `features.json`
    origin: str  #: of the items
    activations: BenchmarkActivations | None = None  #: of the test items; not in files of before it was measured
    #: sets without a feature in common that the draws come from; not in files of before it was counted
    disjoint: int | None = None
    #: the top features one by one; None where it was not asked for (`study.single`), or none fires on the test items
    single: SingleEffects | None = None
