"""Results of the stage ``ablate``."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from saejax.causal.circuits.results import CircuitResult
from saejax.causal.results import ControlMatch, RankedFeature
from saejax.results import Interval


@dataclasses.dataclass(frozen=True)
class TopFeature(RankedFeature):
    """A top feature removed by itself.

    Attributes:
      logit_diff_drop: by how much the logit difference falls.
      accuracy_drop: by how much accuracy does, a share.
      control_drop: mean drop of its three nearest matches; None if it never fires.
    """

    logit_diff_drop: Interval
    accuracy_drop: Interval
    control_drop: float | None


@dataclasses.dataclass(frozen=True)
class ReadoutChange:
    """A readout of `ablate.readouts`, mean over the test prompts.

    Attributes:
      clean: with nothing removed.
      ablated: without the top features.
      controls: without matched random ones, mean over the draws.
      change: ablated - clean.
    """

    clean: float
    ablated: float
    controls: float
    change: Interval


@dataclasses.dataclass(frozen=True)
class JointAblation:
    """All top features removed together.

    Attributes:
      n: features.
      firing: those that fire, and so have controls.
      clean_accuracy, ablated_accuracy: on the test prompts, shares.
      clean_logit_diff: mean over them.
      logit_diff_drop, accuracy_drop: clean - ablated.
      readouts: by name: log_likelihood (of the correct answer's first token, nats), top1 (share of prompts on which it
        is the likeliest), kl (from the clean probabilities, nats).
    """

    n: int
    firing: int
    clean_accuracy: float
    ablated_accuracy: float
    clean_logit_diff: float
    logit_diff_drop: Interval
    accuracy_drop: Interval
    readouts: Mapping[str, ReadoutChange] | None = None


@dataclasses.dataclass(frozen=True)
class ControlDraws:
    """The draws of matched random features.

    Attributes:
      draws: how many.
      logit_diff_drop, accuracy_drop: mean over the test prompts, of each draw.
      match: how well they match.
    """

    draws: int
    logit_diff_drop: tuple[float, ...]
    accuracy_drop: tuple[float, ...]
    match: ControlMatch


@dataclasses.dataclass(frozen=True)
class CurvePoints:
    """What is left without the first so many features.

    Attributes:
      sizes: how many, rising from 0.
      logit_diff: left, of each size.
      accuracy: likewise.
    """

    sizes: tuple[int, ...]
    logit_diff: tuple[Interval, ...]
    accuracy: tuple[Interval, ...]


@dataclasses.dataclass(frozen=True)
class CumulativeCurve:
    """The first 1, 2, 3, ... top features removed together (`ablate.curve`).

    Attributes:
      draws: control sets that are followed.
      top: without the top features.
      controls: without what the control sets match to them, mean of the sets.
    """

    draws: int
    top: CurvePoints
    controls: CurvePoints


@dataclasses.dataclass(frozen=True)
class GreedySet:
    """A set grown on train prompts (`ablate.greedy`).

    Attributes:
      features: in the order in which they were added.
      train_drop: of the train prompts' logit difference, at each size.
      top: as many top features by attribution.
      greedy_drop: of the test prompts' logit difference, at each size.
      top_drop: of as many top features.
      difference: greedy_drop - top_drop, paired by prompt.
    """

    features: tuple[int, ...]
    train_drop: tuple[float, ...]
    top: tuple[int, ...]
    greedy_drop: tuple[Interval, ...]
    top_drop: tuple[Interval, ...]
    difference: tuple[Interval, ...]


@dataclasses.dataclass(frozen=True)
class ComparedBasis:
    """The same test in another basis (`ablate.baselines`).

    Attributes:
      joint, difference, percentile, verdict: as of the dictionary's features.
      control_drop: mean drop of the logit difference over 20 draws of the basis's own matched directions.
      size: directions in the basis.
      top: those that were removed.
    """

    joint: JointAblation
    difference: Interval
    percentile: float
    verdict: bool
    control_drop: float
    size: int
    top: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class UncomparedBasis:
    """A basis that was not compared.

    Attributes:
      reason: why, in words.
      size: directions in the basis, if there is one.
    """

    reason: str
    size: int | None = None


@dataclasses.dataclass(frozen=True)
class FeatureEffect:
    """What one feature is worth on the test prompts; a row of `<behaviour>-importance.parquet`.

    Attributes:
      feature: its number.
      firing_rate, mean_activation: as of the top features.
      gradient, integrated, relp: estimates of the drop.
      drop, drop_low, drop_high: of the logit difference without it, mean and 95 % bootstrap interval.
      accuracy_drop: a share.
      effect_size: mean drop over its standard deviation.
      p_value: sign-flip permutations over prompts, two-sided.
      q_value: Benjamini and Hochberg's, over all features of the table.
      control_percentile: share of the 100 features nearest in firing rate, activation and decoder norm with a smaller
        drop; None for a feature alone.
      pearson, spearman: correlation over prompts of its largest activation with the clean logit difference; None where
        one of them is constant.
    """

    feature: int
    firing_rate: float
    mean_activation: float
    gradient: float
    integrated: float
    relp: float
    drop: float
    drop_low: float
    drop_high: float
    accuracy_drop: float
    effect_size: float
    p_value: float
    q_value: float
    control_percentile: float | None
    pearson: float | None
    spearman: float | None


@dataclasses.dataclass(frozen=True)
class EstimateFit:
    """Correlation over the features of an estimate with the drop; None where it is not defined.

    Attributes:
      pearson: of the values.
      spearman: of their ranks.
    """

    pearson: float | None
    spearman: float | None


@dataclasses.dataclass(frozen=True)
class HalvesAgreement:
    """How well one half of the prompts ranks the features as the other does; None where it is not defined.

    Attributes:
      rank_correlation: of the drops on two random halves, mean of 100 splits.
      spearman_brown: 2 r / (1 + r): the same between two samples as large as this one.
    """

    rank_correlation: float | None
    spearman_brown: float | None


@dataclasses.dataclass(frozen=True)
class DictionaryAgreement:
    """The drops of matched features of two dictionaries (`ablate.compare`).

    Attributes:
      first, second: the dictionaries.
      by: what they were matched by: cosine of decoder rows, or correlation of largest activations over prompts.
      matched: pairs.
      shares: of the features of each that fire, those in a pair.
      similarity: median over the pairs; None without any.
      rank_correlation: of the drops, with an interval over pairs; None, as what follows, with fewer than 3 pairs.
      shuffled: the same where pairs are shuffled; mean and middle 95 % of 200 draws.
      alike: where each partner is one of the ten features nearest to it in firing rate and activation.
    """

    first: str
    second: str
    by: Literal["direction", "activity"]
    matched: int
    shares: tuple[float, float]
    similarity: float | None
    rank_correlation: Interval | None
    shuffled: Interval | None
    alike: Interval | None


@dataclasses.dataclass(frozen=True)
class ImportanceSummary:
    """All features that fire, each removed by itself (`ablate.effects=all`).

    Attributes:
      features: how many fire.
      discoveries: effects with q at most 0.05.
      estimates: how well each estimate fits.
      correlations: how well the size of `pearson` and of `spearman` ranks features by their drop.
      leaders: the features of largest drop.
      stability: between halves of the prompts.
      least_p: the smallest p-value that so few prompts allow.
      agreement: for each pair of dictionaries.
    """

    features: int
    discoveries: int
    estimates: Mapping[str, EstimateFit]
    correlations: Mapping[str, float | None]
    leaders: tuple[FeatureEffect, ...]
    stability: HalvesAgreement
    least_p: float
    agreement: tuple[DictionaryAgreement, ...] | None = None


@dataclasses.dataclass(frozen=True)
class BehaviourAblation:
    """Which features cause a behaviour; also in `<behaviour>.json`.

    Attributes:
      top: the top features, one by one.
      rows: of the model that were run.
      joint: all of them together.
      controls: as many matched random ones, together.
      difference: joint drop of the logit difference minus the controls' mean drop, paired by prompt.
      percentile: share of the draws with a smaller drop.
      verdict: by the rule.
      reason: in words.
      curve: of growing sets.
      baselines: by basis: neurons (of the layer's MLP; the first token is left alone), components (the principal
        components of the site on the train prompts; removing one sets it to the mean), random (an untrained TopK
        dictionary, as sparse as the tested one), or a dictionary's folder.
      greedy: a set grown on train prompts.
      circuit: the top features tested as a circuit (`ablate.circuit_tests`).
      importance: of all features.
    """

    top: tuple[TopFeature, ...]
    rows: int
    joint: JointAblation
    controls: ControlDraws
    difference: Interval
    percentile: float
    verdict: bool
    reason: str
    curve: CumulativeCurve | None = None
    baselines: Mapping[str, ComparedBasis | UncomparedBasis] | None = None
    greedy: GreedySet | None = None
    circuit: CircuitResult | None = None
    importance: ImportanceSummary | None = None


@dataclasses.dataclass(frozen=True)
class AblateResults:
    """The causal test of a dictionary.

    Attributes:
      dictionary: its name.
      site: that it writes to, or reads.
      rule: of the verdicts, in words.
      replacement: what stands in a removed feature's place.
      top: features chosen.
      draws: of control sets.
      behaviours: by name.
    """

    dictionary: str
    site: str
    rule: str
    replacement: str
    top: int
    draws: int
    behaviours: Mapping[str, BehaviourAblation]
