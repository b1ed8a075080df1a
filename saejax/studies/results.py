"""The figures of a study's report: a class for a row of each table, and all of them together as ``study.json``."""

import dataclasses
from typing import Literal

from saejax.results import Interval

Answered = Literal["yes", "no", "cannot tell"]
Asked = Literal["solves", "effect", "random", "placebo", "gate", "context", "primitives", "shared", "features", "items"]
Gated = Literal["interpretable", "unstable", "no signal", "cannot tell"]


@dataclasses.dataclass(frozen=True)
class ModelFigures:
    """A row of the study: what was run on what."""

    row: str  #: its name
    known: str  #: relative or stranger: a control row whose answers are known; "" for others
    model: str  #: path or hub id
    revision: str  #: of the model
    dtype: str  #: of weights and products in JAX
    layers: int | None  #: how many; None, as in what follows, where preflight did not run
    width: int | None  #: of the residual stream
    parameters: int | None  #: how many
    sites: tuple[str, ...]  #: that dictionaries read
    kinds: tuple[str, ...]  #: of dictionaries
    behaviours: tuple[str, ...]  #: that are tested
    benchmarks: tuple[str, ...]  #: that the model is scored on
    units: int  #: of the row
    done: int  #: of them


@dataclasses.dataclass(frozen=True)
class BaselineFigures:
    """The model's score on a task before any intervention."""

    row: str  #: of the study
    task: str  #: benchmark or behaviour
    measure: str  #: of the value
    value: Interval  #: with its 95 % interval
    chance: float | None  #: value of guessing; None where that is not defined
    n: int  #: items, or test prompts


@dataclasses.dataclass(frozen=True)
class DictionaryFigures:
    """A dictionary: how its training went, and what it is worth on held-out text."""

    row: str  #: of the study
    dictionary: str  #: its name
    site: str  #: that it reads
    features: int  #: how many
    epochs: int  #: of training
    tokens: int  #: of training, repeats counted
    seconds: float  #: of training all members of its stack
    loss_epoch_4: float | None  #: mean over the recorded steps of the fourth epoch; None with fewer epochs
    loss_end: float | None  #: the same of the last epoch
    improvement: float | None  #: 1 - loss_end / loss_epoch_4
    losses: tuple[float, ...]  #: mean over the recorded steps of each epoch
    l0: float  #: features active per token, mean
    dead: float  #: share of features that fire on no held-out token
    explained_variance: float  #: 1 is perfect
    ce_recovered: float | None  #: of cross-entropy, against the mean: 1 is as well as untouched


@dataclasses.dataclass(frozen=True)
class ActivationFigures:
    """Activations of a site on a text."""

    row: str  #: of the study
    text: str  #: the corpus, or a benchmark
    site: str  #: of the model
    tokens: int  #: that were read; of a benchmark those of its test items, sinks left out
    median_norm: float  #: of the activations
    largest_norm: float  #: likewise
    beyond_sinks: float | None  #: share of tokens after position 0 that the sink rule leaves out; None of a benchmark
    l0: float | None  #: features of the tested dictionary that are active per token; None of the corpus
    firing: float | None  #: share of its features that fire at all; likewise
    explained_variance: float | None  #: by that dictionary; likewise


@dataclasses.dataclass(frozen=True)
class EffectFigures:
    """Effects of ablating a dictionary's top features on a benchmark, beside random and placebo sets."""

    row: str  #: of the study
    benchmark: str  #: its name
    dictionary: str  #: whose features
    top: int  #: features that are ablated
    items: int  #: that judge them
    at_chance: bool | None  #: whether accuracy before any edit is that of guessing; None where it was not measured
    accuracy: float | None  #: before any edit
    accuracy_drop: Interval | None  #: with features set to zero; None, as in the next, where it was not measured
    accuracy_drop_resampled: Interval | None  #: with features resampled
    random_accuracy_drop: float | None  #: mean over random sets
    placebo_accuracy_drop: float | None  #: mean over placebo sets
    nats_drop: Interval | None  #: of the reference's log-likelihood, with features set to zero
    nats_drop_resampled: Interval | None  #: with features resampled
    random_nats: float | None  #: mean drop of the log-likelihood under random sets at equal dose
    placebo_nats: float | None  #: mean drop under placebo sets at equal dose
    lowers: str  #: whether the log-likelihood falls with features set to zero
    effect: str  #: whether accuracy falls by more than the criterion with features set to zero
    effect_resampled: str  #: likewise with features resampled
    random: str  #: whether the log-likelihood falls more than under random sets at equal dose
    fooled: float | None  #: share of placebo sets of which the same is true
    placebo: str  #: whether it is specific to the answers


@dataclasses.dataclass(frozen=True)
class BehaviourFigures:
    """Effects of removing a dictionary's top features on a behaviour."""

    row: str  #: of the study
    behaviour: str  #: its name
    dictionary: str  #: whose features
    drop: Interval | None  #: of the logit difference
    top1_drop: Interval | None  #: of top-1 accuracy
    random: str  #: whether it is more than random sets lose at equal dose
    fooled: float | None  #: share of placebo sets of which the same is true
    placebo: str  #: whether it is specific to the answer
    selective: str  #: whether other behaviours and held-out text are spared


@dataclasses.dataclass(frozen=True)
class AlignmentFigures:
    """Agreement of two rows on which items or features matter in a benchmark."""

    first: str  #: row
    second: str  #: row
    benchmark: str  #: its name
    by: Literal["items", "features"]  #: what is ranked: items by what they lose, or features by their importance
    n: int  #: of them in both
    rank_correlation: float | None  #: of items without what random sets explain; None where it is not defined
    p_value: float | None  #: of rank correlations as large where one side is shuffled
    p_holm: float | None  #: over all comparisons of the report
    #: of items: the 95 % quantile with a random set in the place of one row's top features; of features: the larger of
    #: that with a rotated dictionary and the 95 % quantile of those with the importance for other items' answers
    control: float | None
    aligned: bool | None  #: by the criterion; None where it is not known
    shared: float | None  #: share of the first row's live features that have a partner by activity; None of items
    shared_null: float | None  #: the same with the text shifted by half


@dataclasses.dataclass(frozen=True)
class GateFigures:
    """The gate's answer, one of four, for a row on a benchmark."""

    row: str  #: of the study
    benchmark: str  #: its name
    gate: Gated  #: the answer
    reason: str  #: in words
    seeds: int  #: dictionaries that differ in their seed, the tested one included
    agreeing: int  #: of these, those for which questions 1 to 3 are all answered yes
    items_needed: int | None  #: items that would find the smallest effect; None where none was measured
    fooled: float | None  #: share of placebo sets that also do more than random sets


@dataclasses.dataclass(frozen=True)
class DomainFigures:
    """Features chosen on one benchmark, ablated on another."""

    row: str  #: of the study
    chosen_on: str  #: benchmark
    benchmark: str  #: whose items judge
    effect: Interval  #: drop of the reference's log-likelihood, nats
    chosen_here: Interval | None  #: the same under the features chosen here
    common: int  #: features that both chose
    random: float | None  #: mean drop under random sets at equal dose
    random_sets: int  #: that hold none of the features
    p_value: float | None  #: rank among random sets at equal dose
    p_holm: float | None  #: over all pairs of benchmarks of the report


@dataclasses.dataclass(frozen=True)
class DriverFigures:
    """Shares of the features of a group by what drives them, under injected tokens; see ``saejax.falsify``."""

    row: str  #: of the study
    benchmark: str  #: its name
    group: str  #: tested, random features or random dictionary
    features: int  #: of the group
    tokens: Interval  #: share that fires on words alone
    context: Interval  #: share that does not
    undecided: Interval  #: neither is shown


@dataclasses.dataclass(frozen=True)
class PrimitiveFigures:
    """A group of features that matter for the same items of a benchmark, and what ablating it does."""

    row: str  #: of the study
    benchmark: str  #: its name
    name: str  #: category that it is named after; "" where none stands out
    features: tuple[int, ...]  #: the most important first
    words: tuple[str, ...]  #: tokens of the items on which they are most active
    overlap: float  #: mean Jaccard overlap with the most similar group of resampled items
    p_value: float  #: of its name, corrected for all groups and categories
    seeds: int  #: dictionaries of other seeds
    recurs: int  #: of them, those with a group of the same name
    rows: tuple[str, ...]  #: other rows with a group of the same name
    partners: tuple[str, ...]  #: other row and share of its features that have a partner there, by chance in brackets
    items: int | None  #: test items of its category; None, as in what follows, where it was not ablated
    effect: Interval | None  #: drop of the reference's log-likelihood on these, nats
    elsewhere: Interval | None  #: on other items
    random: float | None  #: mean drop under random sets at equal dose
    placebo: float | None  #: mean drop under placebo sets at equal dose
    sets: int | None  #: control sets of the kind that has fewer
    needed: int | None  #: sets of each kind that a test of it takes
    more: str  #: whether it is more than both: yes, no or not testable


@dataclasses.dataclass(frozen=True)
class LabelFigures:
    """Numbers of features that are associated with a label of a benchmark's items."""

    row: str  #: of the study
    benchmark: str  #: its name
    label: str  #: category, or "answered rightly"
    items: int  #: test items with it
    features: int  #: that fire on at least 4 test items
    associated: int  #: of them, after correction for all features and labels
    shuffled: float  #: the same with labels permuted over items, mean


@dataclasses.dataclass(frozen=True)
class AssociationFigures:
    """A tested feature and the label that it goes with, by three ways of asking."""

    row: str  #: of the study
    benchmark: str  #: its name
    feature: int  #: its index
    label: str  #: category that it goes with most on train items
    correlation: Interval  #: of its activation of largest size on a test item with having the label
    p_value: float  #: corrected for all features and labels
    associated: str  #: yes or no
    auc: float  #: of a probe of this feature alone on test items
    probe: str  #: whether that finds the label: yes or no
    causal_drop: Interval | None  #: drop where it is ablated alone, on items with the label minus others, nats
    p_causal: float | None  #: of a difference above zero, corrected for all rows of a benchmark
    causal: str  #: whether it is above zero, from p: yes, no or not tested
    agree: bool | None  #: whether all three answers are the same; None where one is missing


@dataclasses.dataclass(frozen=True)
class ProblemFigures:
    """A problem in one row: what its model makes of it, and the features that matter for its answer."""

    benchmark: str  #: its name
    item: str  #: id
    category: str  #: of the item
    question: str  #: its text
    answer: str  #: the right one
    row: str  #: of the study
    right: bool | None  #: whether the model's answer is right; None where answers were not scored
    log_likelihood: float  #: of the right answer, nats
    #: important features that have a partner in every other row; these three are empty where a row has other items
    universal: tuple[str, ...]
    shared: tuple[str, ...]  #: in some other row
    specific: tuple[str, ...]  #: in none


@dataclasses.dataclass(frozen=True)
class PhaseFigures:
    """A test of one of the five phases of the former study, in one row."""

    phase: str  #: 1 to 5, and what it is about
    test: str  #: in words
    row: str  #: of the study, and the benchmark where there is one
    result: str  #: figures, in words
    control: str  #: figures, in words
    answer: Answered  #: whether the result is beyond the control


@dataclasses.dataclass(frozen=True)
class LearnedFigures:
    """The answer to a question for a row on a benchmark."""

    row: str  #: of the study
    benchmark: str  #: its name
    question: Asked  #: see ``learned.QUESTIONS``
    answer: Answered  #: as found
    known: str  #: the known answer of a control row; "" where none is known
    evidence: str  #: figures, in words


@dataclasses.dataclass(frozen=True)
class CriterionFigures:
    """A criterion of success."""

    criterion: str  #: in words
    met: bool | None  #: None: it cannot be asked, because a stage was not run
    evidence: str  #: figures, in words
    published: str  #: what the reasoning study reports; "" where it says nothing


@dataclasses.dataclass(frozen=True)
class TransferFigures:
    """Similarity of two dictionaries by one measure; chance: of random directions, or text shifted by half."""

    row: str  #: of the study
    first: str  #: dictionary
    second: str  #: dictionary
    measure: str  #: decoder, encoder or activity
    matched: Interval  #: mean value of the pairs of the one-to-one assignment with the largest sum
    matched_null: Interval  #: the same by chance
    shared: Interval  #: share of these pairs that count as shared
    shared_null: Interval  #: the same by chance


@dataclasses.dataclass(frozen=True)
class TrackingFigures:
    """A text that was followed through the layers."""

    row: str  #: of the study
    text: str  #: its slug
    tokens: int  #: of it
    sites: int  #: of dictionaries
    links: int  #: between features that are shown
    tests: int  #: steps tested, at each site, with enough random sets
    measured: int  #: chains of features whose links and effect on the answer were measured
    holding: int  #: of them: those that hold, each link above five random features at equal dose
    output: str  #: what the model writes after the prompt; empty: it was not asked to
    hurt: int  #: of them: those whose features have a larger effect than random sets at equal dose


@dataclasses.dataclass(frozen=True)
class ResourceFigures:
    """Time and memory that a finished unit took."""

    row: str  #: of the study
    unit: str  #: such as "train/topk"
    seconds: float  #: in the process that finished it
    device_hours: float | None  #: seconds x devices; None where no device was used
    peak_host_bytes: int | None  #: of memory, while it ran; None where the system did not tell
    peak_device_bytes: int | None  #: of a device's memory; None on CPUs
    disk_bytes: int  #: of its files
    flops_per_second: float | None  #: of its matrix products by formula, over its seconds; None where there is none


@dataclasses.dataclass(frozen=True)
class FailureFigures:
    """A unit that is not done."""

    row: str  #: of the study
    unit: str  #: such as "train/topk"
    state: str  #: "failed", or "not run" where it reads what is not there
    reason: str  #: in words
    log: str  #: file of the study's folder with all it said


@dataclasses.dataclass(frozen=True)
class StudyFigures:
    """All figures of a report; ``study.json``."""

    fingerprint: str  #: of all units and their states
    rules: tuple[str, ...]  #: the rules of the gate, the alignment and the criteria, in words
    models: tuple[ModelFigures, ...]  #: the rows
    baselines: tuple[BaselineFigures, ...]  #: before anything is changed
    dictionaries: tuple[DictionaryFigures, ...]  #: that were trained
    activations: tuple[ActivationFigures, ...]  #: by model and text
    effects: tuple[EffectFigures, ...]  #: on benchmarks
    behaviours: tuple[BehaviourFigures, ...]  #: effects on them
    alignment: tuple[AlignmentFigures, ...]  #: between rows
    gates: tuple[GateFigures, ...]  #: by row and benchmark
    domains: tuple[DomainFigures, ...]  #: features chosen on one benchmark, ablated on another
    drivers: tuple[DriverFigures, ...]  #: of features, by row, benchmark and group
    primitives: tuple[PrimitiveFigures, ...]  #: groups of features, by row and benchmark
    labels: tuple[LabelFigures, ...]  #: of items, by row and benchmark
    associations: tuple[AssociationFigures, ...]  #: of tested features with labels
    problems: tuple[ProblemFigures, ...]  #: the same problem in every row
    phases: tuple[PhaseFigures, ...]  #: of the former study, by row
    transfer: tuple[TransferFigures, ...]  #: between dictionaries of a row
    tracking: tuple[TrackingFigures, ...]  #: of texts
    learned: tuple[LearnedFigures, ...]  #: by row, benchmark and question
    criteria: tuple[CriterionFigures, ...]  #: of success
    resources: tuple[ResourceFigures, ...]  #: of finished units
    failures: tuple[FailureFigures, ...]  #: units that are not done
