"""The figures of a study's report: a class for the lines of each table, and all of them together as ``study.json``."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_type_hints

from saejax.page.tables import MISSING, count, interval, number, percent, significant
from saejax.page.tables import answer as yes_or_no
from saejax.results import Interval
from saejax.studies.sheet import Figures, column, duration, joined, listed, points, quoted, size
from saejax.wording import counted

Answered = Literal["yes", "no", "cannot tell"]
Asked = Literal[
    "solves", "effect", "random", "placebo", "trained", "gate", "context", "primitives", "shared", "features", "items"
]
Gated = Literal["interpretable", "unstable", "not specific", "no better than untrained", "no signal", "cannot tell"]


def plain(answer: str | bool | None) -> Answered:
    """Return one of three answers: yes or no, and cannot tell for None and for other words."""
    return "yes" if answer in ("yes", True) else "no" if answer in ("no", False) else "cannot tell"


def _digits(digits: int, scale: float = 1.0) -> Any:
    return lambda value: number(value, digits, scale)


def _percent(digits: int = 0) -> Any:
    return lambda value: percent(value, digits)


@dataclasses.dataclass(frozen=True)
class StudyQuestion:
    """A question of the first table."""

    heading: str  #: of its column
    expected: Mapping[str, Answered] = dataclasses.field(default_factory=dict)  #: kind of control row -> right answer


QUESTIONS: Mapping[Asked, StudyQuestion] = {
    "solves": StudyQuestion("The model beats guessing", {"stranger": "no"}),
    "effect": StudyQuestion("Ablation lowers the answers"),
    "random": StudyQuestion("More than random features"),
    "placebo": StudyQuestion("Specific to the answers", {"stranger": "no"}),
    "trained": StudyQuestion("More than untrained dictionaries"),
    "gate": StudyQuestion("Interpretable, in other seeds too", {"stranger": "no"}),
    "context": StudyQuestion("More than words", {"stranger": "no"}),
    "primitives": StudyQuestion("A group of features causes a category's answers", {"stranger": "no"}),
    "shared": StudyQuestion("Most features are the first row's", {"relative": "yes", "stranger": "no"}),
    "features": StudyQuestion("The same features matter as there", {"relative": "yes", "stranger": "no"}),
    "items": StudyQuestion("For the same items as there", {"relative": "yes", "stranger": "no"}),
}


class RowFigures(Figures):
    """Figures of a row of the study."""

    row: str = column("Row")  #: its name


class BenchmarkFigures(RowFigures):
    """Figures of a row on a benchmark."""

    benchmark: str = column("Benchmark")  #: its name


class ModelFigures(RowFigures):
    """Rows of the study: what was run on what."""

    control: str  #: relative or stranger: a control row, whose answers are known; "" for others
    model: str = column("Model")  #: path or hub id
    revision: str  #: of the model
    dtype: str = column("In")  #: of weights and products in JAX
    parameters: int | None = column("Parameters", count)  #: how many; None, as in the next two: no preflight
    layers: int | None = column("Layers", count)  #: how many
    width: int | None = column("Width", count)  #: of the residual stream
    sites: tuple[str, ...] = column("Sites", listed)  #: that dictionaries read
    kinds: tuple[str, ...] = column("Dictionaries", listed)  #: of dictionaries
    benchmarks: tuple[str, ...] = column("Benchmarks", listed)  #: that the model is scored on
    behaviours: tuple[str, ...] = column("Behaviours", listed)  #: that are tested
    units: int  #: of the row
    done: int = joined("Units done", lambda line: f"{line.done} of {line.units}")  #: of them
    #: that these took, together
    seconds: float = joined(
        "Time; memory of host, device",
        lambda line: f"{duration(line.seconds)}; {size(line.peak_host_bytes)}, {size(line.peak_device_bytes)}",
    )
    peak_host_bytes: int | None  #: the most of a unit; None where the system did not tell
    peak_device_bytes: int | None  #: the most of a unit on a device; None on CPUs


class BaselineFigures(RowFigures):
    """The models before anything is changed.

    Square brackets: 95 % intervals over items or prompts.
    """

    task: str = column("Task")  #: benchmark or behaviour
    measure: str = column("Measure")  #: of the value
    #: with its 95 % interval
    value: Interval = joined(
        "Value", lambda line: interval(line.value, 3) if "nats" in line.measure else f"{points(line.value)} %"
    )
    chance: float | None = column("By guessing", _percent(1))  #: value of guessing; None where that is not defined
    n: int = column("Items")  #: items, or test prompts


class DictionaryFigures(RowFigures):
    """Dictionaries and what they are worth.

    L0 and what follows it up to the tokens, on held-out text. Tokens: of training, repeats counted. Seconds: of
    training all members of a stack together. The reports of the rows have the losses.
    """

    dictionary: str = column("Dictionary")  #: its name
    site: str = column("Reads")  #: that it reads
    features: int = column("Features", count)  #: how many
    epochs: int  #: of training
    l0: float = column("L0", _digits(1))  #: features active per token, mean
    dead: float = column("Dead", _percent(1))  #: share of features that fire on no held-out token
    explained_variance: float = column("Explained variance", _digits(3))  #: 1 is perfect
    #: of cross-entropy, against the mean: 1 is as well as untouched
    ce_recovered: float | None = column("Cross-entropy recovered", _digits(3))
    tokens: int = column("Tokens", count)  #: of training, repeats counted
    seconds: float = column("Seconds", _digits(0))  #: of training all members of its stack


class ActivationFigures(RowFigures):
    """Activations by model and text.

    Corpus: what dictionaries are trained on. Benchmarks: test items with their reference answers, sinks left out; L0,
    features and explained variance belong to the tested dictionary there.
    """

    text: str = column("Text")  #: the corpus, or a benchmark
    site: str = column("Site")  #: of the model
    tokens: int = column("Tokens", count)  #: that were read; of a benchmark its test items' tokens, without sinks
    median_norm: float = column("Median norm", significant)  #: of the activations
    largest_norm: float = column("Largest norm", significant)  #: likewise
    #: share of tokens after position 0 that the sink rule leaves out; None of a benchmark
    beyond_sinks: float | None = column("Sinks beyond position 0", _percent(2))
    l0: float | None = column("L0", _digits(1))  #: features of the tested dictionary active per token; None: the corpus
    firing: float | None = column("Features that fire", _percent(1))  #: share of its features that fire; likewise
    explained_variance: float | None = column("Explained variance", _digits(3))  #: by that dictionary; likewise


class EffectFigures(RowFigures):
    """Benchmarks under ablation.

    Top features ablated, or each resampled: where it fires, its activation is drawn from those elsewhere. Drop: of
    accuracy, in percentage points, also under random and placebo sets; nats: drop of the reference's log-likelihood;
    square brackets: 95 % intervals over items. Falls: whether accuracy falls by more than the criterion, set to zero
    and resampled. Placebo sets too: the share of sets chosen for corrupted answers that also do more than random sets.
    Specific: the final answer loses more log-probability, beyond what a corrupted one loses, than under placebo sets.
    """

    #: its name
    benchmark: str = joined(
        "Benchmark",
        lambda line: (
            f"{line.benchmark}, {counted(line.items, 'item')}; {counted(line.top, 'feature')} of {line.dictionary}"
        ),
        words=True,
    )
    dictionary: str  #: whose features
    top: int  #: features that are ablated
    items: int  #: that judge them
    categories: int  #: distinct sets of categories of all items: with one there is nothing to compare
    can_name: bool  #: whether a group of features could be named after one, with so few items that choose them
    at_chance: bool | None  #: whether accuracy before any edit is not shown to be above guessing's; None: not measured
    #: before any edit
    accuracy: float | None = joined(
        "Accuracy before, %",
        lambda line: percent(line.accuracy, 1) + (" (not shown to be above chance)" if line.at_chance else ""),
    )
    #: with features set to zero; None, as in the next, where it was not measured
    accuracy_drop: Interval | None = joined(
        "Drop; resampled",
        lambda line: f"{points(line.accuracy_drop)}; {points(line.accuracy_drop_resampled)}",
        words=True,
    )
    accuracy_drop_resampled: Interval | None  #: with features resampled
    #: mean over random sets
    random_accuracy_drop: float | None = joined(
        "Random; placebo sets",
        lambda line: f"{number(line.random_accuracy_drop, 1, 100)}; {number(line.placebo_accuracy_drop, 1, 100)}",
    )
    placebo_accuracy_drop: float | None  #: mean over placebo sets
    lowers: str  #: whether the log-likelihood falls with features set to zero
    #: whether accuracy falls by more than the criterion with features set to zero
    effect: str = joined("Falls", lambda line: f"{line.effect}, {line.effect_resampled}", words=True)
    effect_resampled: str  #: likewise with features resampled
    #: of the reference's log-likelihood, with features set to zero
    nats_drop: Interval | None = joined(
        "Nats; resampled", lambda line: f"{interval(line.nats_drop)}; {interval(line.nats_drop_resampled)}", words=True
    )
    nats_drop_resampled: Interval | None  #: with features resampled
    random_nats: float | None  #: mean drop of the log-likelihood under random sets at equal dose
    answer_nats: float | None  #: drop of the final answer's log-probability minus a corrupted one's
    placebo_nats: float | None  #: mean of the same under placebo sets at equal dose
    untrained_nats: float | None  #: mean drop under lists of untrained dictionaries at equal dose
    #: whether the log-likelihood falls more than under random sets at equal dose
    random: str = column("More than random")
    fooled: float | None = column("Placebo sets too", _percent())  #: share of placebo sets of which the same is true
    placebo: str = column("Specific")  #: whether it is specific to the answers
    trained: str = column("More than untrained")  #: whether it is more than lists of untrained dictionaries lose


class BehaviourFigures(RowFigures):
    """Behaviours under ablation.

    Ablation of each behaviour's top features. Placebo sets too: the share of sets chosen for unrelated tokens that also
    do more than random sets. Weak: the model itself is unsure of the behaviour, so that its row proves little.
    """

    #: its name
    behaviour: str = joined("Behaviour", lambda line: f"{line.behaviour}{' (weak)' if line.weak else ''}", words=True)
    weak: str  #: weak points of the behaviour, in words; "" where it has none
    dictionary: str = column("Dictionary")  #: whose features
    drop: Interval | None = column("Logit difference lost", interval)  #: of the logit difference
    top1_drop: Interval | None = column("Top-1 accuracy lost", points)  #: of top-1 accuracy
    random: str = column("More than random")  #: whether it is more than random sets lose at equal dose
    fooled: float | None = column("Placebo sets too", _percent())  #: share of placebo sets of which the same is true
    placebo: str = column("Specific")  #: whether it is specific to the answer
    trained: str = column("More than untrained")  #: whether it is more than lists of untrained dictionaries lose
    selective: str = column("Selective")  #: whether other behaviours and held-out text are spared


class AlignmentFigures(Figures):
    """Do rows agree on what matters?

    Items: without what their category, the length of their answer and random sets explain. Features: matched by their
    activity on the items. Placebo: of items, a random set, a placebo set or an untrained dictionary's in the place
    of one row's top features; of features, a rotated dictionary, and the importance for corrupted answers. Shared: of
    the first row's features that fire. A dash: too few items or features.
    """

    first: str = joined("Rows", lambda line: f"{line.first}, {line.second}")  #: row
    second: str  #: row
    benchmark: str = column("Benchmark")  #: its name
    #: what is ranked: items by what they lose, or features by their importance
    by: Literal["items", "features"] = column("Ranked")
    n: int = column("Number")  #: of them in both
    rank_correlation: float | None = column("Rank correlation", number)  #: None where it is not defined
    p_value: float | None  #: of rank correlations as large where one side is shuffled
    p_holm: float | None = column("p (Holm)", _digits(4))  #: over all comparisons of the report
    #: of items: the 95 % quantile with a random set in the place of one row's top features; of features: the larger of
    #: that with a rotated dictionary and the 95 % quantile of those with the importance for corrupted answers
    control: float | None = column("Placebo", lambda value: MISSING if value is None else f"up to {number(value)}")
    aligned: bool | None = column("Aligned", yes_or_no)  #: by the criterion; None where it is not known
    #: share of the first row's live features that have a partner by activity; None of items
    shared: float | None = joined(
        "Shared; by chance", lambda line: f"{percent(line.shared)}; {percent(line.shared_null)}"
    )
    shared_null: float | None  #: the same with the text shifted by half


class GateFigures(BenchmarkFigures, cards=True):
    """The overall answers, and the answers to the questions that they are made of."""

    gate: Gated = column("Overall answer")  #: the answer
    effect: str = column("An effect")  #: question 1, of the log-likelihood
    random: str = column("More than random")  #: question 2
    placebo: str = column("Specific")  #: question 3
    trained: str = column("More than untrained")  #: question 4
    reason: str  #: why, in words
    seeds: int  #: dictionaries that differ in their seed, the tested one included
    #: of these, those for which questions 1 to 3 are all answered yes
    agreeing: int = joined("Seeds that agree", lambda line: f"{line.agreeing} of {line.seeds}")
    #: items that would find the smallest effect; None where none was measured
    items_needed: int | None = column("Items needed", count)
    smallest: float  #: the smallest effect worth finding, nats
    #: share of placebo sets that also do more than random sets
    fooled: float | None = column("Placebo sets beyond random", _percent(1))


class DomainFigures(RowFigures):
    """Transfer to unseen domains.

    Features chosen on the train items of one benchmark, ablated on the test items of another, beside those chosen
    there. Random lists: mean effect of lists of the same dose without the features, and their number.
    """

    chosen_on: str = column("Chosen on")  #: benchmark
    benchmark: str = column("Ablated on")  #: whose items judge
    effect: Interval = column("Effect, nats", interval)  #: drop of the reference's log-likelihood
    chosen_here: Interval | None = column("Features chosen there", interval)  #: the same under the features chosen here
    common: int = column("In common")  #: features that both chose
    #: mean drop under random sets at equal dose
    random: float | None = joined("Random lists", lambda line: f"{number(line.random)} ({line.random_sets})")
    random_sets: int  #: how many
    p_value: float | None  #: rank among random sets at equal dose
    p_holm: float | None = column("p (Holm)", _digits(3))  #: over all pairs of benchmarks of the report


class DriverFigures(BenchmarkFigures):
    """Words or context?

    The tokens that excite a feature most are injected into ordinary text. A feature is driven by tokens if that brings
    it more than half of the way to its activation on the benchmark. Square brackets: 95 % intervals over features.
    """

    group: str  #: tested, random features or random dictionary
    features: int = joined("Features", lambda line: f"{line.features}, {line.group}", words=True)  #: of it
    tokens: Interval = column("Driven by tokens, %", lambda value: interval(value, 0, 100))  #: fires on words alone
    context: Interval = column("By context, %", lambda value: interval(value, 0, 100))  #: share that does not
    undecided: Interval = column("Undecided, %", lambda value: interval(value, 0, 100))  #: neither is shown


def _compared(line: "PrimitiveFigures") -> str:
    if line.more != "not testable" or line.sets is None:
        return line.more
    return f"{line.more}: {line.sets} sets of {line.needed}"


def _show_p(value: float | None) -> str:
    return "not testable" if value is None else f"p = {number(value, 3)}"


def _also_named(line: "PrimitiveFigures") -> str:
    if not line.rows and line.p_rows is None:
        return MISSING
    return f"{', '.join(line.rows) or MISSING}; {_show_p(line.p_rows)}"


class PrimitiveFigures(BenchmarkFigures, cards=True):
    """Groups of features that matter for the same items.

    Important features are grouped by the items whose answers they matter for, and a group is named after the category
    for which it matters most, if that is more than by chance. In quotation marks: the tokens on which its features are
    most active. Stable: overlap with the groups of resampled items (1: always the same), and dictionaries of other
    seeds with a group of that name, with the p-value of as many recurrences of all groups of the row together where
    names are permuted over categories. Also named in: other rows with a group of that name, with the p-value of as many
    in all other rows together where their names are permuted. Nats lost: when the whole group is ablated, on test items
    of its category and on others, beside control sets at equal dose. A dash: not ablated. As many groups are compared
    with control sets as their number allows: 19 of each kind for one group, 20 more for each further one.
    """

    #: category that it is named after; "" where none stands out
    name: str = column("Group", lambda name: name or "no category stands out")
    #: the most important first
    features: tuple[int, ...] = joined(
        "Features", lambda line: f"{len(line.features)}: {quoted(line.words)}", words=True
    )
    words: tuple[str, ...]  #: tokens of the items on which they are most active
    #: mean Jaccard overlap with the most similar group of resampled items
    overlap: float = joined(
        "Stable",
        lambda line: f"{number(line.overlap)}; {line.recurs} of {line.seeds} seeds, {_show_p(line.p_recurs)}",
        words=True,
    )
    #: of as many recurrences of all groups with names permuted over categories; None: names are too few to tell
    p_recurs: float | None
    p_value: float  #: of its name, corrected for all groups and categories
    seeds: int  #: dictionaries of other seeds
    recurs: int  #: of them, those with a group of the same name
    #: other rows with a group of the same name
    rows: tuple[str, ...] = joined("Also named in", _also_named, words=True)
    #: of as many groups with a name of the other rows with names permuted over categories; None as above
    p_rows: float | None
    #: other row and share of its features that have a partner there, by chance in brackets
    partners: tuple[str, ...] = column("Features with a partner", lambda some: "; ".join(some) or MISSING)
    items: int | None  #: test items of its category; None, as in what follows, where it was not ablated
    #: drop of the reference's log-likelihood on these, nats
    effect: Interval | None = joined(
        "Nats lost there; elsewhere", lambda line: f"{interval(line.effect)}; {interval(line.elsewhere)}"
    )
    elsewhere: Interval | None  #: on other items
    #: mean drop under random sets at equal dose
    random: float | None = joined("Random; placebo sets", lambda line: f"{number(line.random)}; {number(line.placebo)}")
    placebo: float | None  #: mean drop under placebo sets at equal dose
    sets: int | None  #: control sets of the kind that has fewer
    needed: int | None  #: sets of each kind that a test of it takes
    #: whether it is more than both: yes, no or not testable
    more: str = joined("More than both", _compared, words=True)


class LabelFigures(BenchmarkFigures):
    """Features that go with a label.

    A feature goes with a label if its activation on test items is correlated with it, after correction for all features
    and labels. Labels: categories, and whether the model answers rightly.
    """

    label: str = column("Label")  #: category, or "answered rightly"
    items: int = column("Items")  #: test items with it
    features: int  #: that fire on at least 4 test items
    #: of them, after correction for all features and labels
    associated: int = joined("Features that go with it", lambda line: f"{line.associated} of {line.features}")
    shuffled: float = column("With labels permuted", number)  #: the same with labels permuted over items, mean


class AssociationFigures(BenchmarkFigures):
    """Three answers for each top feature.

    Each top feature with the category that it goes with most on train items, judged on test items. The correlation is
    corrected for all features and labels, the probe (of this feature alone) and the drop for all rows of a benchmark.
    Causes it: ablating the feature alone costs items with the label more than others. Not testable: the feature is
    silent on nearly all items or goes with no label on train items, or no p-value could be small enough with so few
    items or so many features.
    """

    feature: int = joined("Feature", lambda line: f"{line.feature}, {line.label}", words=True)  #: its index
    label: str  #: category that it goes with most on train items
    #: of its activation of largest size on a test item with having the label
    correlation: Interval = column("Correlation", interval)
    p_value: float = column("p", _digits(3))  #: corrected for all features and labels
    associated: str = column("Goes with the label")  #: yes, no or not testable
    auc: float = column("Probe's AUC", number)  #: of a probe of this feature alone on test items
    probe: str = column("Probe finds it")  #: whether that finds the label: yes, no or not testable
    #: drop where it is ablated alone, on items with the label minus others, nats
    causal_drop: Interval | None = column("Nats more than elsewhere", interval)
    #: of a difference above zero, corrected for all rows of a benchmark
    p_causal: float | None = column("Its p", _digits(3))
    causal: str = column("Causes it")  #: whether it is above zero, from p: yes, no, not testable or not tested
    #: whether all three answers are the same; None where one is missing
    agree: bool | None = column("Agree", yes_or_no)


class ProblemFigures(Figures, cards=True):
    """The same problems in every row.

    The features with the largest attribution for the right answer: number, tokens on which each is most active,
    attribution in nats. In every row: a feature with a partner, by its activity on the items, in each other row; dashes
    alone: a row with other items, which cannot be compared. Nats: log-likelihood of the right answer.
    """

    benchmark: str  #: its name
    item: str  #: id
    category: str  #: of the item
    question: str = joined("Problem", lambda line: f"{line.question} ({line.answer})", words=True)  #: its text
    answer: str  #: the right one
    row: str = column("Row")  #: of the study
    #: whether the model's answer is right; None where answers were not scored
    right: bool | None = column("Right", yes_or_no)
    log_likelihood: float = column("Nats", number)  #: of the right answer
    #: important features that have a partner in every other row; these three are empty where a row has other items
    universal: tuple[str, ...] = column("In every row", lambda some: "; ".join(some) or MISSING)
    shared: tuple[str, ...] = column("In some", lambda some: "; ".join(some) or MISSING)  #: other row
    specific: tuple[str, ...] = column("In this row alone", lambda some: "; ".join(some) or MISSING)  #: none


class LearnedFigures(BenchmarkFigures, cards=True):
    """All answers."""

    question: Asked = column("Question", lambda name: QUESTIONS[name].heading)  #: see ``QUESTIONS``
    answer: Answered = column("Answer")  #: as found
    #: the right answer of a control row; "" where none is known
    expected: str = column("Expected", lambda text: text or MISSING)
    evidence: str = column("Evidence")  #: figures, in words


class TransferFigures(RowFigures):
    """Shared features of dictionaries.

    Pairs: mean cosine or correlation of the one-to-one pairs of features with the largest sum. Square brackets: 95 %
    intervals over features. A dash: a dictionary has no feature to compare.
    """

    first: str = joined("Dictionaries", lambda line: f"{line.first}, {line.second}", words=True)  #: dictionary
    second: str  #: dictionary
    measure: str = column("By")  #: decoder, encoder or activity
    #: mean value of the pairs of the one-to-one assignment with the largest sum
    matched: Interval | None = column("Pairs", interval)
    #: the same by chance
    matched_null: Interval | None = column("By chance", lambda null: number(null and null.mean))
    #: share of these pairs that count as it
    shared: Interval | None = column("Shared", lambda shared: f"{points(shared)} %" if shared else MISSING)
    #: the same by chance
    shared_null: Interval | None = column("Shared by chance", lambda null: percent(null and null.mean, 1))


def _show_chains(line: "TrackingFigures") -> str:
    text = f"{line.measured}; {line.holding}"
    return f"{text} ({line.left_out} not testable)" if line.left_out else text


class TrackingFigures(RowFigures):
    """Texts followed through the layers.

    Output: what the model writes after the prompt. The strongest chains of features, from layer to layer to the answer,
    are measured: one holds if setting each feature to zero takes more from the next one than each of 19 random active
    features does, at equal dose, and more from the answer. A step is hurt if ablating its features lowers its
    log-likelihood more than random sets.
    """

    text: str = column("Text")  #: its slug
    tokens: int = column("Tokens")  #: of it
    sites: int = column("Layers")  #: of dictionaries
    links: int = column("Links", count)  #: between features that are shown
    #: what the model writes after the prompt; empty: it was not asked to
    output: str = column("Output", lambda text: quoted([text] if text else ()))
    #: chains of features whose links and effect on the answer were measured
    measured: int = joined("Chains; hold", _show_chains)
    holding: int  #: of them: chains that hold, each link above 19 random features at equal dose
    left_out: int  #: others of the strongest, where too few other features are active to compare with
    tests: int = column("Steps tested")  #: steps tested, at each site, with enough random sets
    hurt: int = column("Hurt")  #: of them: those whose features have a larger effect than random sets at equal dose


class UnitState(RowFigures, cards=True):
    """Units that are not done."""

    unit: str = column("Unit")  #: such as "train/topk"
    state: Literal["done", "failed", "not run"] = column("State")  #: "not run": it reads what is not there
    reason: str = column("Why")  #: why it is not done; "" if it is
    #: its output: a file of the study's folder; "" if it never ran
    log: str = column("Log", lambda log: log or MISSING)
    fingerprint: str  #: of its settings and inputs; "" where these could not be read


@dataclasses.dataclass(frozen=True)
class StudyFigures:
    """All figures of a report; ``study.json``."""

    fingerprint: str  #: of all units and their states
    rules: tuple[str, ...]  #: the rules of the overall answers and the alignment, in words
    models: tuple[ModelFigures, ...]  #: the rows
    baselines: tuple[BaselineFigures, ...]  #: before anything is changed
    dictionaries: tuple[DictionaryFigures, ...]  #: that were trained
    activations: tuple[ActivationFigures, ...]  #: by model and text
    effects: tuple[EffectFigures, ...]  #: on benchmarks
    behaviours: tuple[BehaviourFigures, ...]  #: effects on them
    alignment: tuple[AlignmentFigures, ...]  #: between rows
    gates: tuple[GateFigures, ...]  #: the overall answers, by row and benchmark
    domains: tuple[DomainFigures, ...]  #: features chosen on one benchmark, ablated on another
    drivers: tuple[DriverFigures, ...]  #: of features, by row, benchmark and group
    primitives: tuple[PrimitiveFigures, ...]  #: groups of features, by row and benchmark
    labels: tuple[LabelFigures, ...]  #: of items, by row and benchmark
    associations: tuple[AssociationFigures, ...]  #: of tested features with labels
    problems: tuple[ProblemFigures, ...]  #: the same problem in every row
    transfer: tuple[TransferFigures, ...]  #: between dictionaries of a row
    tracking: tuple[TrackingFigures, ...]  #: of texts
    learned: tuple[LearnedFigures, ...]  #: by row, benchmark and question
    failures: tuple[UnitState, ...]  #: units that are not done


TABLES: Mapping[str, type[Figures]] = {  # field of ``StudyFigures`` -> class of its lines
    field: get_args(hint)[0]
    for field, hint in get_type_hints(StudyFigures).items()
    if field not in ("fingerprint", "rules")
}
