"""The rule of a verdict, the answers to six questions about the top features of each behaviour, and their wording."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from saejax.arguments import suggests_names
from saejax.interventions.table import TEXT
from saejax.results import Interval
from saejax.short_reprs import has_short_repr
from saejax.statistics.bootstrap import percentile_interval
from saejax.wording import counted

#: The readouts of question 1: their names, and the factor and unit in which they are printed. Those of whole
#: answers and ``accuracy`` are of benchmarks; ``answer_margin`` is the margin of question 3 there.
ABLATION_READOUTS = dict(
    logit_diff=("the logit difference", 1, "logits"),
    log_prob=("the log-probability of the correct answer", 1, "nats"),
    two_way=("two-way accuracy", 100, "points"),
    top1=("top-1 accuracy", 100, "points"),
    answer_log_prob=("the log-likelihood of the reference answer", 1, "nats"),
    answer_margin=(
        "the final answer's log-probability beyond a corrupted one's",
        1,
        "nats of the final answer's margin",
    ),
    accuracy=("accuracy", 100, "points"),
    readout=("the readout", 1, "units"),
)
#: What follows the name of a readout in which T was not set to zero.
RESAMPLED = "_resampled"
#: Bases in words; a dictionary's folder stands for itself.
BASIS_NAMES = dict(
    neurons="MLP neurons",
    pca="principal components",
    diff_means="the difference of means",
)
NO_SHARES = (
    "Not testable: what the features take from other answers is unknown, because the logit difference is not above "
    "zero without the edit, or too few other tokens were ranked."
)
NO_PLACEBO_READOUTS = "Not asked: no placebo readouts were given, whose features the top ones could be compared with."
NO_PLACEBO_ANSWERS = (
    "Not tested: there are no placebo sets. None were asked for, or no train item has two wrong answers of the form of "
    "its final answer, of which a target is made; an item of two choices has one."
)
NO_CHANGE = (
    "Not testable: the top features are silent on the test prompts, so that ablating them changes nothing that "
    "controls could change as much."
)
NO_DOSE = (
    "Not testable: no list of directions, of the tested or of an untrained dictionary, changes the site as much as the "
    "top features do."
)
#: Controls in words.
CONTROLS = dict(random="random lists", placebo="placebo sets", untrained="untrained dictionaries")
#: Prompts of a mean with an interval: fewer all have one sign by chance in more than 5 % of cases.
LEAST_PROMPTS = 6


@suggests_names
@dataclasses.dataclass(frozen=True)
class VerdictConfig:
    """The numbers of the rule."""

    level: float = 0.05  #: of every test, after correction
    min_accuracy_drop: float = 0.05  #: share of accuracy whose loss counts as an effect
    max_ce_change: float = 0.05  #: nats per token of held-out text below which an edit counts as selective
    max_other_change: float = 0.10  #: share of another behaviour's clean logit difference, likewise
    equivalence_margin: float = 0.10  #: share of the features' effect within which another basis is equivalent
    least_prompts: int = LEAST_PROMPTS  #: of a mean with an interval
    least_lists: int = 10  #: typical random lists that the pool holds: lists from fewer are nearly the same
    resamples: int = 10_000  #: of the bootstrap
    seed: int = 456  #: of the bootstrap

    @property
    def rule(self) -> str:
        """The rule in words."""
        return (
            "T: the features with the largest attribution on train prompts, ablated on test prompts. Every control is "
            "built to T's dose, the norm of the change at the site, and measured there. "
            "1. Effect: the 95 % bootstrap interval (over prompts within templates) of the drop lies above zero and no "
            f"template disagrees; an accuracy also falls by more than {100 * self.min_accuracy_drop:g} points. "
            "2. More than random: p = (1 + random lists whose effect is at least T's) / (1 + random lists) is at most "
            f"{self.level:g}; a list holds features that fire on at least 5 % of the test prompts, without T, in "
            "random order, until it reaches T's dose; from a pool of fewer than "
            f"{self.least_lists} lists' worth of features it is not testable. "
            "3. Specific: the same against placebo sets, top features of pairs of likely tokens that are no answers; "
            "and T takes a larger share of this answer's logit difference than of those of other likely tokens: more "
            f"than their 95th percentile in all but {100 * self.level:g} % of resamples over prompts. Of "
            "benchmarks the first side alone is asked: the effect is the fall of the final answer's log-probability "
            "minus that of a corrupted answer, and placebo sets are the top features of pairs of corrupted answers. "
            "4. Did training matter: the same rank against untrained dictionaries of random directions, of each the "
            "directions with the largest attribution to T's dose. Simpler bases: the interval of the difference; "
            f"equivalent if it lies within {100 * self.equivalence_margin:g} % of T's effect. "
            f"5. Selective: the upper ends of the intervals of the mean size of the change lie below "
            f"{self.max_ce_change:g} nats on held-out text and {100 * self.max_other_change:g} % of the mean size of "
            "the logit difference of every other behaviour above chance. "
            "6. Enough, without a yes or no: the share of the logit difference that is left where the first k, 2 k, "
            "4 k and 8 k features by attribution are kept and all others set to their means over the train prompts "
            "that rank features. "
            f"Questions 1, 3 and 5 and simpler bases need {self.least_prompts} prompts and enough bootstrap resamples; "
            "2 to 4 need 20 controls a behaviour, less one. "
            "p-values are corrected by Holm's method over the behaviours within each question."
        )


@dataclasses.dataclass(frozen=True)
class CausalAnswer:
    """The answer to one question."""

    #: yes, no, not testable or not tested; beside a basis more, less, no significant difference, equivalent or not
    #: testable
    answer: str
    sentence: str = ""  #: the answer in words
    effect: Interval | None = None  #: the effect size that the question is about, with its 95 % interval
    p_value: float | None = None  #: before correction
    p_holm: float | None = None  #: after Holm's correction within the question
    numbers: Mapping[str, float] | None = None  #: further figures of the sentence, by name
    #: by other behaviour and text; of question 3 the share that T takes from the logit difference
    parts: Mapping[str, Interval] | None = None


@dataclasses.dataclass(frozen=True)
class Kept:
    """The share of the clean logit difference that is left where so many features alone are kept."""

    features: int  #: number of kept features; all others are set to their mean over the train prompts that rank them
    left: Interval  #: share that is left, with the error term
    #: share that is left where the error term is dropped, too; None with error=drop, where there is none
    left_without_error: Interval | None
    #: medians of the shares that controls leave, by "placebo" and "untrained": with the error term, and without it
    controls: Mapping[str, tuple[float, float | None]]


@has_short_repr
@dataclasses.dataclass(frozen=True)
class BehaviourVerdict:
    """The six answers for the top features of one behaviour."""

    features: tuple[int, ...]  #: the tested top features
    dose: float  #: root mean square over prompts of the norm of the change at the site
    #: 1. by readout: logit_diff, log_prob, two_way and top1 accuracy; of a benchmark answer_log_prob and accuracy, and
    #: both with features resampled
    ablation: Mapping[str, CausalAnswer]
    templates: Mapping[str, float]  #: mean effect by template
    held_out: tuple[str, ...]  #: templates that no train prompt has
    random: CausalAnswer  #: question 2: more than random features of the same dose?
    placebo: CausalAnswer  #: question 3: specific to this answer?
    bases: Mapping[str, CausalAnswer]  #: more than a simpler basis at the same dose? By basis
    selective: CausalAnswer  #: question 5: are other behaviours and held-out text spared?
    fooled: int | None  #: number of placebo sets that pass question 2; None: not testable
    placebo_sets: int  #: number of placebo sets
    trained: CausalAnswer = CausalAnswer("not tested", "Not tested.")  #: question 4: did training matter?
    replication: CausalAnswer | None = None  #: answers of dictionaries of other seeds
    #: question 6: are they enough? By number of kept features; empty where it was not measured, as on benchmarks
    enough: tuple[Kept, ...] = ()


@dataclasses.dataclass(frozen=True)
class CausalVerdict:
    """The verdict on a run: for every dictionary (the tested one is named "tested") and behaviour."""

    rule: str  #: the rule, in words
    dictionaries: Mapping[str, Mapping[str, BehaviourVerdict]]  #: answers by dictionary and behaviour
    untested: Mapping[str, str] | None = None  #: behaviours without top features, and why they have no answers

    def __repr__(self) -> str:
        lines = []
        for name, behaviours in self.dictionaries.items():
            for behaviour, verdict in behaviours.items():
                answers = answers_by_question(verdict).items()
                words = ", ".join(f"{question}: {answer.answer}" for question, answer in answers)
                lines.append(f"  {name}, {behaviour}: {words}")
        lines += [f"  {behaviour}: not testable" for behaviour in self.untested or ()]
        more = [f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else []
        return "\n".join(["CausalVerdict(", *lines[:20], *more, ")"])

    def summary(self) -> str:
        """Return the sentences of questions 1 to 5 for each behaviour, what question 6 leaves, or why it has none."""
        lines = []
        for name, behaviours in self.dictionaries.items():
            for behaviour, verdict in behaviours.items():
                lines.append(behaviour if name == "tested" else f"{behaviour}, dictionary {name}")
                answers = [*verdict.ablation.values(), verdict.random, verdict.placebo, verdict.trained]
                answers += [*verdict.bases.values(), verdict.selective]
                lines += [f"  {answer.answer}: {answer.sentence}" for answer in answers]
                kept = (f"{100 * share.left.mean:.0f} % with {share.features}" for share in verdict.enough)
                lines += [f"  left of the answer: {', '.join(kept)} features alone"] if verdict.enough else []
        lines += [f"{behaviour}\n  not testable: {reason}" for behaviour, reason in (self.untested or {}).items()]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class FeatureEffect:
    """A top feature, ablated alone."""

    feature: int  #: index of the feature, of a joined SAE its index there
    attribution: float  #: estimated effect on the train prompts, logits
    drop: Interval  #: drop of the logit difference on the test prompts
    firing_rate: float  #: share of the editable tokens of the test prompts on which it fires
    mean_activation: float  #: mean activation over the tokens on which it fires
    site: str = ""  #: site of the joined SAE that it is of; "": it is of the tested dictionary


@dataclasses.dataclass(frozen=True)
class ImportanceSummary:
    """The effects of all live features, each ablated alone; details are in the ranking file."""

    features: int  #: number of live features
    significant: int | None  #: with a family-wise p-value of at most 0.05; None: too few prompts to tell
    attribution_correlation: float | None  #: rank correlation of attribution and effect
    activation_correlation: float | None  #: rank correlation of correlation with the logit difference and effect


@dataclasses.dataclass(frozen=True)
class AblateResults:
    """Effects of ablating a dictionary's features on behaviours."""

    dictionary: str  #: name of the dictionary
    site: str  #: site that is edited: where the dictionary writes to, or reads; of joined SAEs all sites
    k: int  #: number of top features
    replacement: str  #: value that replaces an ablated feature's activation
    positions: str  #: where features are ablated
    error: str  #: whether the reconstruction error is kept or dropped
    top: Mapping[str, tuple[FeatureEffect, ...]]  #: the top features of each behaviour, one by one
    verdict: CausalVerdict  #: the answers to the six questions
    #: effects of ablating every feature alone, by behaviour (--ablate.effects=all)
    importance: Mapping[str, ImportanceSummary] | None = None

    def summary(self) -> str:
        """Return the answers in sentences; see ``CausalVerdict.summary``."""
        return self.verdict.summary()


def mean_interval(values_P: np.ndarray, weight_RxP: np.ndarray) -> Interval:
    """Return the mean of some values and its 95 % bootstrap interval, given the weight of each in bootstrap samples."""
    return Interval(float(values_P.mean()), *percentile_interval(weight_RxP @ values_P))


def explain_no_top_features(behaviours: Sequence[str]) -> str:
    """Return why some behaviours have no top features, in words."""
    return (
        "no feature of the dictionary has an attribution above zero on the train prompts of "
        f"{', '.join(behaviours)}: check that it belongs to this model and site, and that it fires"
    )


def ablation_sentence(
    k: int,
    readout: str,
    effect: Interval,
    clean: float,
    is_sure: bool,
    is_large: bool,
    disagreeing: Mapping[str, float],
    lacks: str = "",
) -> str:
    """Return the sentence of question 1.

    Args:
      k: number of ablated features.
      readout: one of ``ABLATION_READOUTS``, perhaps with ``RESAMPLED``.
      effect: drop of the readout.
      clean: the readout of the unedited model.
      is_sure: whether the drop is significant.
      is_large: whether it exceeds the criterion.
      disagreeing: drop by template, if the templates disagree.
      lacks: why it is not testable, such as ``too_few_prompts`` says; empty: it is.
    """
    name, factor, unit = ABLATION_READOUTS[readout.removesuffix(RESAMPLED)]
    verb = "Resampling" if readout.endswith(RESAMPLED) else "Ablating"
    digits = _decimals(readout, effect.mean) if factor == 1 else 1
    rises = effect.mean < 0
    shown = effect * (-factor if rises else factor)
    low, high = sorted((shown.low, shown.high))
    text = f"{verb} the {counted(k, 'top feature')} {'raises' if rises else 'lowers'} {name} by "
    text += f"{shown.mean:.{digits}f} {unit} [{low:.{digits}f}, {high:.{digits}f}] from {factor * clean:.{digits}f}"
    if lacks:
        return f"{text}: {lacks}."
    if rises and effect.high < 0:
        return f"{text}: the opposite of what was asked."
    if not is_sure:
        return f"{text}: not significant."
    if not is_large:
        return f"{text}: too little to count."
    if disagreeing:
        listed = ", ".join(f"{template!r} {factor * drop:.{digits}f}" for template, drop in disagreeing.items())
        return f"{text}, but the templates disagree: {listed}."
    return f"{text}, in every template."


def _decimals(readout: str, size: float) -> int:
    """Return with how many decimals effects of this size are printed: of a readout of a user's, at least two digits."""
    # "0.00" says nothing of a probability; logits and nats that are smaller than that are nothing.
    if readout != "readout" or not 0 < abs(size) < 1:
        return 2
    return 1 - math.floor(math.log10(abs(size)))


def too_few_prompts(count: int, least: int) -> str:
    """Return that a mean over so few prompts is not testable, in words; "" if it is.

    Args:
      count: number of prompts.
      least: number that is needed.
    """
    return f"not testable with {counted(count, 'prompt')}, {least} are needed" if count < least else ""


def too_few_resamples(resamples: int, needed: int) -> str:
    """Return that so few bootstrap resamples cannot give a significant p-value after correction, in words.

    Args:
      resamples: their number.
      needed: the number that is needed.
    """
    return f"Not testable with {resamples:,} bootstrap resamples, {needed:,} are needed."


def among_sentence(
    answer: CausalAnswer, group: str, k: int, behaviours: int, objective: str = "logit_diff", site: str = ""
) -> str:
    """Return the sentence of questions 2 (``group`` random), 3 (placebo) and 4 (untrained).

    Args:
      answer: the answer without its sentence; its numbers come from ``verdict``.
      group: group of the controls.
      k: number of top features.
      behaviours: number of behaviours that the correction is over.
      objective: the readout whose drop is the effect.
      site: that the controls read, if another than the tested dictionary's.
    """
    assert answer.numbers and answer.p_value is not None
    numbers, words = answer.numbers, CONTROLS[group]
    if site:  # of a transcoder, which reads another site than it writes to
        words = f"untrained SAEs of the transcoder's output {site}, of random directions,"
    count, needed = int(numbers["sets"]), int(numbers["needed"])
    if answer.answer == "not testable" and count < needed:
        return f"Not testable: {count} {words} of {needed} needed; raise their number."
    if answer.answer == "not testable":
        pool = round(numbers["pool"])
        return (
            f"Not testable: the {counted(pool, 'other feature')} that lists are drawn from make{'s' * (pool == 1)} "
            f"fewer than ten lists of {numbers['features']:.0f}, which are nearly the same; use a smaller k."
        )
    unit, digits = ABLATION_READOUTS[objective][2], _decimals(objective, numbers["top"])
    # p = (1 + controls that lower the objective at least as much) / (1 + controls); see ``ranks.rank_p``.
    reaching = round(numbers["p_controls"] * (count + 1)) - 1
    text = (
        f"The {counted(k, 'top feature')} cost{'s' * (k == 1)} {numbers['top']:z.{digits}f} {unit}; "
        f"{count} {words} of the same dose cost {numbers['median']:z.{digits}f} in the median and "
        f"{numbers['high']:z.{digits}f} at the 95th percentile"
    )
    if ratio := over_controls(numbers):
        text += f" (ratio {ratio:.1f})"
    text += f", and {reaching} of them at least as much"
    if "uncentred" in numbers:
        text += f"; around zero in place of its centre they cost {numbers['uncentred']:z.{digits}f} in the median"
    if group == "placebo" and answer.parts:
        share, takes = answer.parts["share"], "It takes" if k == 1 else "They take"
        text += (
            f". {takes} {100 * share.mean:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}] of this logit "
            f"difference, of other likely tokens' {100 * numbers['share_median']:.0f} % in the median and "
            f"{100 * numbers['share_high']:.0f} % at the 95th percentile; p = {numbers['p_controls']:.2g} against "
            f"placebo sets, {numbers['p_shares']:.2g} against other tokens"
        )
    corrected = f", {answer.p_holm:.2g} after correction for {behaviours} behaviours" if behaviours > 1 else ""
    endings = dict(
        random=("more than random features", "not significantly more than random features"),
        placebo=("specific to this answer", "not shown to be specific to this answer"),
        untrained=("training mattered", "training is not shown to matter"),
    )
    return f"{text} (p = {answer.p_value:.2g}{corrected}): {endings[group][answer.answer != 'yes']}."


def over_controls(numbers: Mapping[str, float]) -> float | None:
    """Return how many times the 95th percentile of its controls the top features cost; None if either costs nothing.

    Args:
      numbers: of a comparison with controls of the same dose, see ``verdict``.
    """
    return numbers["top"] / numbers["high"] if min(numbers["top"], numbers["high"]) > 0 else None


def enough_sentence(enough: Sequence[Kept]) -> str:
    """Return the sentence of question 6, which has no yes or no: the fewest kept features, and the most."""
    if not enough:
        return "Not measured, or the logit difference may be zero without an edit."
    parts = []
    for kept in (enough[0], *enough[1:][-1:]):
        left = kept.left
        text = f"{counted(kept.features, 'top feature')} leave{'s' * (kept.features == 1)} {100 * left.mean:.0f} % "
        text += f"[{100 * left.low:.0f}, {100 * left.high:.0f}]"
        parts.append(f"{text} of the logit difference")
        if kept.left_without_error:
            parts[-1] += f", {100 * kept.left_without_error.mean:.0f} % without the error term"
    return f"Kept alone, all other features at their means: {'; '.join(parts)}."


def fooled_sentence(count: int | None, placebo_sets: int) -> str:
    """Return how many placebo sets pass question 2, in words.

    Args:
      count: number of placebo sets that pass; None: not testable.
      placebo_sets: number of placebo sets.
    """
    if count is None or not placebo_sets:
        return "Whether placebo sets cost more than random lists, too, was not tested."
    return (
        f"{count} of {placebo_sets} placebo sets, chosen for other answers, cost more than nearly all random lists "
        f"({100 * count / placebo_sets:.0f} %)."
    )


def basis_sentence(answer: CausalAnswer, name: str, objective: str, reason: str = "") -> str:
    """Return the sentence about a simpler basis.

    Args:
      answer: the answer without its sentence; its effect is the features' minus the basis's.
      name: name of the basis.
      objective: the readout whose drop is the effect.
      reason: why it is not testable, if it is not.
    """
    assert answer.numbers and answer.effect
    endings = {
        "more": "the features have the larger effect",
        "less": "the features have the smaller effect",
        "equivalent": "equivalent",
        "no significant difference": "no significant difference, which is not equality",
        "not testable": reason,
    }
    at, digits = answer.effect, _decimals(objective, answer.numbers["top"])
    return (
        f"Against {BASIS_NAMES.get(name, name)} of the same dose: {answer.numbers['top']:.{digits}f} "
        f"{ABLATION_READOUTS[objective][2]} lost to {answer.numbers['basis']:.{digits}f}; difference "
        f"{at.mean:+.{digits}f} [{at.low:.{digits}f}, {at.high:.{digits}f}]: {endings[answer.answer]}."
    )


def selective_sentence(
    answer: CausalAnswer, failing: Sequence[str], left_out: str = "", objective: str = "logit_diff"
) -> str:
    """Return the sentence of question 5.

    Args:
      answer: the answer without its sentence. Its parts are the mean sizes of the changes on held-out text (nats) and
        on other behaviours (logits), its numbers their margins, and what controls change there.
      failing: parts whose interval reaches the margin.
      left_out: behaviours that are not looked at, in words.
      objective: the readout that must not change on other behaviours.
    """
    assert answer.parts and answer.numbers
    parts, names = answer.parts, failing or list(answer.parts)
    digits = {name: _decimals("" if name == TEXT else objective, answer.numbers[name]) for name in names}
    # "z": a rounded -0.001 is written 0.00, so runs that differ by rounding errors get the same sentence.
    listed = "; ".join(
        f"{name.replace('_', ' ')} {parts[name].mean:z.{digits[name]}f} [{parts[name].low:z.{digits[name]}f}, "
        f"{parts[name].high:z.{digits[name]}f}], margin {answer.numbers[name]:z.{digits[name]}f}"
        f"{_beside(name, answer.numbers, digits[name])}"
        for name in names
    )
    listed += f"; {left_out}" if left_out else ""
    if answer.answer == "yes":
        return f"Held-out text and all other behaviours are spared ({listed})."
    if not failing:
        return f"Not shown to spare held-out text and the other behaviours after correction ({listed})."
    return f"Not shown to spare: {listed}."


def _beside(name: str, numbers: Mapping[str, float], digits: int) -> str:
    """Return what sets of the same dose change in a part of question 5, in words; "" if none was run there."""
    words = dict(random="random lists", placebo="placebo sets")
    medians = [f"{words[g]} {numbers[key]:z.{digits}f}" for g in words if (key := f"{name}:{g}") in numbers]
    return f" (of the same dose {', '.join(medians)})" if medians else ""


def answers_by_question(result: BehaviourVerdict) -> dict[str, CausalAnswer]:
    """Return the answers to the questions that have a yes or no, by their names."""
    return {
        "effect": next(iter(result.ablation.values())),
        "more than random": result.random,
        "specific": result.placebo,
        "training mattered": result.trained,
        "selective": result.selective,
    }


def replication(
    behaviour: str, tested: BehaviourVerdict, seeds: Sequence[Mapping[str, BehaviourVerdict]]
) -> CausalAnswer:
    """Compare the answers of dictionaries of other seeds with the tested dictionary's, question by question.

    Args:
      behaviour: name of the behaviour.
      tested: the answers of the tested dictionary.
      seeds: the answers of each of the others, by behaviour.

    Returns:
      yes where every answer that is a yes or no is the same in all seeds, no where a yes meets a no, not testable where
      neither can be said. Its numbers are, by question, in how many of the other ``dictionaries`` the answer is yes.
    """
    verdicts = [answers[behaviour] for answers in seeds if behaviour in answers]
    if not verdicts:
        return CausalAnswer("not tested", "Not tested: dictionaries of other seeds have no top features here.")
    of_seeds, differing, unknown = [answers_by_question(verdict) for verdict in verdicts], [], False
    opposites = dict(yes="no", no="yes")
    for question, of_tested in answers_by_question(tested).items():
        in_seeds = {answers[question].answer for answers in of_seeds}
        if of_tested.answer in opposites:
            if opposites[of_tested.answer] in in_seeds:
                differing.append(question)
            # What cannot be told of another seed does not contradict the tested dictionary.
            unknown = unknown or not in_seeds <= {*opposites}
    counts = {name: sum(answers[name].answer == "yes" for answers in of_seeds) for name in of_seeds[0]}
    answer = "no" if differing else "not testable" if unknown else "yes"
    listed = ", ".join(f"{count} ({question})" for question, count in counts.items())
    ending = f"another answer than the tested one's: {', '.join(differing)}" if differing else "no answer contradicts"
    sentence = f"Of {counted(len(verdicts), 'dictionary')} of other seeds so many answer yes: {listed}; {ending}."
    numbers = {name: float(count) for name, count in counts.items()} | dict(dictionaries=float(len(verdicts)))
    return CausalAnswer(answer, sentence, numbers=numbers)
