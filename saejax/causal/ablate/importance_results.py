"""Results of removing all features that fire, each by itself."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from saejax.causal.results import HalvesAgreement, MatchedDrops


@dataclasses.dataclass(frozen=True)
class FeatureEffect:
    """What one feature is worth on the test prompts; a row of `<behaviour>-importance.parquet`."""

    feature: int  #: its number
    firing_rate: float  #: as of the top features
    mean_activation: float  #: as of the top features
    gradient: float  #: estimates of the drop
    integrated: float  #: estimates of the drop
    relp: float  #: estimates of the drop
    drop: float  #: of the logit difference without it, mean and 95 % bootstrap interval
    drop_low: float  #: of the logit difference without it, mean and 95 % bootstrap interval
    drop_high: float  #: of the logit difference without it, mean and 95 % bootstrap interval
    accuracy_drop: float  #: a share
    effect_size: float  #: mean drop over its standard deviation
    p_value: float  #: sign-flip permutations over prompts, two-sided
    #: Benjamini and Hochberg's, over all features of the table: bounds the share of false discoveries if the tests are
    #: independent or positively dependent
    q_value: float
    p_max_t: float  #: adjusted for all of them by step-down maxT (Westfall and Young), however they depend
    #: share of the 100 features nearest in firing rate, activation and decoder norm with a smaller drop; None for a
    #: feature alone
    control_percentile: float | None
    #: correlation over prompts of its largest activation with the clean logit difference; None where one of them is
    #: constant
    pearson: float | None
    #: correlation over prompts of its largest activation with the clean logit difference; None where one of them is
    #: constant
    spearman: float | None


@dataclasses.dataclass(frozen=True)
class EstimateFit:
    """Correlation over the features of an estimate with the drop; None where it is not defined."""

    pearson: float | None  #: of the values
    spearman: float | None  #: of their ranks


@dataclasses.dataclass(frozen=True)
class DictionaryAgreement(MatchedDrops):
    """Two dictionaries compared (`ablate.compare`)."""

    first: str  #: the dictionaries
    second: str  #: the dictionaries
    #: what they were matched by: cosine of decoder rows, or correlation of largest activations over prompts
    by: Literal["direction", "activity"]


@dataclasses.dataclass(frozen=True)
class ImportanceSummary:
    """All features that fire, each removed by itself (`ablate.effects=all`)."""

    features: int  #: how many fire
    discoveries: int  #: effects with q at most 0.05
    sure: int  #: effects with p_max_t at most 0.05
    estimates: Mapping[str, EstimateFit]  #: how well each estimate fits
    #: how well the size of `pearson` and of `spearman` ranks features by their drop
    correlations: Mapping[str, float | None]
    leaders: tuple[FeatureEffect, ...]  #: the features of largest drop
    stability: HalvesAgreement  #: between halves of the prompts
    least_p: float  #: the smallest p-value that so few prompts allow
    agreement: tuple[DictionaryAgreement, ...] | None = None  #: for each pair of dictionaries
