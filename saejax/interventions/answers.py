"""The rule of a verdict, and its answers to five questions about the top features of each behaviour."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from saejax.results import Interval
from saejax.statistics.bootstrap import percentile_interval


@dataclasses.dataclass(frozen=True)
class VerdictConfig:
    """The numbers of the rule."""

    level: float = 0.05  #: of every test, after correction
    min_accuracy_drop: float = 0.05  #: share of accuracy whose loss counts as an effect
    max_ce_rise: float = 0.05  #: nats per token of held-out text below which an edit counts as selective
    max_other_drop: float = 0.10  #: share of another behaviour's clean logit difference, likewise
    equivalence_margin: float = 0.10  #: share of the features' effect within which another basis is equivalent
    resamples: int = 10_000  #: of the bootstrap
    seed: int = 456  #: of the bootstrap

    @property
    def rule(self) -> str:
        """The rule in words."""
        return (
            "T: the features with the largest attribution on train prompts, ablated on test prompts. "
            "1. Effect: the 95 % bootstrap interval (over prompts within templates) of the drop lies above zero, no "
            f"template disagrees, and accuracy falls by more than {100 * self.min_accuracy_drop:g} points. "
            "2. More than random: p = (1 + random sets whose effect is at least T's at the smaller of both doses) / "
            f"(1 + random sets) is at most {self.level:g}; random sets are disjoint, of as many features that fire on "
            "at least 5 % of the test prompts, without T. "
            "3. Specific: the same against placebo sets: top features of pairs of likely tokens that are no answers. "
            "4. More than simpler bases: the interval of the difference at the largest dose that both reach lies above "
            f"zero; equivalent if it lies within {100 * self.equivalence_margin:g} % of T's effect; contradictory if "
            "norm and KL disagree significantly. "
            f"5. Selective: the upper ends of the intervals lie below {self.max_ce_rise:g} nats on held-out text and "
            f"{100 * self.max_other_drop:g} % of every other behaviour's logit difference. "
            "p-values are corrected by Holm's method over the behaviours within each question."
        )


@dataclasses.dataclass(frozen=True)
class CausalAnswer:
    """The answer to one question."""

    #: yes, no, not testable or not tested; beside a basis more, less, no significant difference, equivalent or
    #: contradictory
    answer: str
    sentence: str  #: the answer in words
    effect: Interval | None = None  #: the effect size that the question is about, with its 95 % interval
    p_value: float | None = None  #: before correction
    p_holm: float | None = None  #: after Holm's correction within the question
    numbers: Mapping[str, float] | None = None  #: further figures of the sentence, by name
    parts: Mapping[str, Interval] | None = None  #: by kind of dose (norm, kl), or by other behaviour and text


@dataclasses.dataclass(frozen=True)
class BehaviourVerdict:
    """The five answers for the top features of one behaviour."""

    features: tuple[int, ...]  #: the tested top features
    dose: float  #: root mean square over prompts of the norm of the change at the site
    #: 1. by readout: logit_diff, log_prob, two_way and top1 accuracy; of a benchmark answer_log_prob and accuracy, and
    #: both with features resampled
    ablation: Mapping[str, CausalAnswer]
    templates: Mapping[str, float]  #: mean effect by template
    held_out: tuple[str, ...]  #: templates that no train prompt has
    random: CausalAnswer  #: 2. more than random sets at equal dose?
    placebo: CausalAnswer  #: 3. specific to this answer?
    bases: Mapping[str, CausalAnswer]  #: 4. more than a simpler basis at equal dose? By basis
    selective: CausalAnswer  #: 5. are other behaviours and held-out text spared?
    fooled: int | None  #: number of placebo sets that pass question 2; None: not testable
    placebo_sets: int  #: number of placebo sets
    replication: CausalAnswer | None = None  #: the answers of dictionaries of other seeds


@dataclasses.dataclass(frozen=True)
class CausalVerdict:
    """The verdict on a run: for every dictionary (the tested one is named "tested") and behaviour."""

    rule: str  #: in words
    dictionaries: Mapping[str, Mapping[str, BehaviourVerdict]]  #: by dictionary and behaviour


@dataclasses.dataclass(frozen=True)
class FeatureEffect:
    """A top feature, ablated alone."""

    feature: int  #: its index
    attribution: float  #: estimated effect on the train prompts, logits
    drop: Interval  #: of the logit difference on the test prompts
    firing_rate: float  #: share of the editable tokens of the test prompts on which it fires
    mean_activation: float  #: over the tokens on which it fires


@dataclasses.dataclass(frozen=True)
class ImportanceSummary:
    """The effects of all live features, each ablated alone; details are in the ranking file."""

    features: int  #: number of live features
    significant: int  #: with a family-wise p-value of at most 0.05
    attribution_correlation: float | None  #: rank correlation of attribution and effect
    activation_correlation: float | None  #: rank correlation of correlation with the logit difference and effect


@dataclasses.dataclass(frozen=True)
class AblateResults:
    """Effects of ablating a dictionary's features on behaviours."""

    dictionary: str  #: its name
    site: str  #: that it writes to, or reads
    k: int  #: number of top features
    replacement: str  #: what stands in an ablated feature's place
    positions: str  #: where features are ablated
    error: str  #: whether the reconstruction error is kept or dropped
    top: Mapping[str, tuple[FeatureEffect, ...]]  #: the top features of each behaviour, one by one
    verdict: CausalVerdict  #: the five answers
    importance: Mapping[str, ImportanceSummary] | None = None  #: of all features, by behaviour


def mean_interval(values_P: np.ndarray, weight_RxP: np.ndarray | None) -> Interval:
    """Return a mean and its 95 % bootstrap interval.

    Args:
      values_P: the values.
      weight_RxP: their weights in bootstrap samples; None: both ends are the mean.
    """
    mean = float(values_P.mean())
    if weight_RxP is None:
        return Interval(mean, mean, mean)
    return Interval(mean, *percentile_interval(weight_RxP @ values_P))
