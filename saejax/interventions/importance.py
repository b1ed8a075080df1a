"""The importance of every live feature: its exact effect, ablated alone, and estimates that need no ablation.

Every feature that fires on the test prompts is ablated alone (group ``every`` of the effects table). A feature that is
silent there is not, whatever would replace its activation. Besides the mean drop of the logit difference there are

- a bootstrap interval, over prompts within templates;
- a p-value of the sign-flip test over prompts, adjusted for all features by step-down maxT (Westfall and Young, 1993).
  It speaks of prompts of the same templates; three templates are too few to speak of others. A drop is *significant* if
  the adjusted p is at most 0.05 and the mean drop has the same sign in every template. With fewer than 6 prompts no p
  is that small, and nothing is said;
- its *attribution* on the same prompts, activation x gradient;
- its *activation correlation*: of its largest activation on a prompt with the clean logit difference. It says
  nothing of causes.
"""

import dataclasses

import numpy as np

from saejax.interventions import activity
from saejax.interventions.ablation import BehaviourAblation
from saejax.interventions.answers import ImportanceSummary, VerdictConfig
from saejax.interventions.behaviour_prompts import BehaviourPrompts
from saejax.interventions.columns import Columns
from saejax.interventions.table import EffectsTable
from saejax.statistics.bootstrap import resampling_weights
from saejax.statistics.permutation import correlations, max_t_p

PERMUTATIONS = 20_000
LEVEL = 0.05  # of the adjusted p-value
_BLOCK = 256  # features whose bootstrap samples are in memory at once: 20 MB of 10,000


@dataclasses.dataclass(frozen=True)
class Importance(Columns):
    """The importance of each of N live features on the test prompts of a behaviour; arrays [N], features rising."""

    kind = "importance"

    feature: np.ndarray  #: its index
    firing_rate: np.ndarray  #: share of the editable tokens on which it fires
    mean_activation: np.ndarray  #: over the tokens on which it fires
    drop: np.ndarray  #: of the logit difference when it is ablated, mean over prompts
    #: drop_low and drop_high: ends of the mean's 95 % bootstrap interval.
    drop_low: np.ndarray
    drop_high: np.ndarray
    accuracy_drop: np.ndarray  #: of two-way accuracy, a share
    p_fwer: np.ndarray  #: p-value of the drop, adjusted for all features; NaN with too few prompts to tell
    same_sign: np.ndarray  #: 1 where the mean drop has the same sign in every template
    attribution: np.ndarray  #: estimate of the drop, logits
    activation_correlation: np.ndarray  #: Pearson; NaN where one of both is constant

    @property
    def summary(self) -> ImportanceSummary:
        """The summary for the results."""
        significant_N = (self.p_fwer <= LEVEL) & (self.same_sign > 0)
        return ImportanceSummary(
            features=len(self.feature),
            significant=None if np.isnan(self.p_fwer).all() else int(significant_N.sum()),
            attribution_correlation=_rank_correlation(self.attribution, self.drop),
            # A feature that falls as the logit difference rises is as good a guess as one that rises.
            activation_correlation=_rank_correlation(np.abs(self.activation_correlation), self.drop),
        )


def measure_importance(table: EffectsTable, ablation: BehaviourAblation[BehaviourPrompts]) -> Importance:
    """Return the importance of every feature of a table's group ``every``.

    Args:
      table: the effects table of the behaviour.
      ablation: the ablation of the tested dictionary on the behaviour.
    """
    prompts = table.select_prompts(ablation.behaviour)
    clean_P = table.clean_values(prompts, "logit_diff")
    edits = table.select_edits(ablation.behaviour, "every")
    ablated_NxP = table.values(edits, prompts, "logit_diff")
    feature_N, drop_NxP = np.array([edit.index for edit in edits], np.int64), clean_P - ablated_NxP
    templates = [prompt.template for prompt in prompts]
    # Prompts of one template are alike: resampled within templates, the interval speaks of these templates.
    weights_SxP = resampling_weights(templates, ablation.config.bootstrap, ablation.config.seed)
    # In blocks: all samples of tens of thousands of features would take gigabytes.
    blocks = np.array_split(drop_NxP, -(-len(drop_NxP) // _BLOCK) or 1)
    ends = [np.quantile(block_CxP @ weights_SxP.T, [0.025, 0.975], axis=1) for block_CxP in blocks]
    low_N, high_N = np.concatenate(ends, axis=1)
    # All features at once: there may be tens of thousands.
    template_P = np.array(templates)
    sign_GxN = np.sign([drop_NxP[:, template_P == name].mean(axis=1) for name in dict.fromkeys(templates)])
    statistics, test = ablation.statistics, ablation.test
    largest_NxP = activity.maxima(ablation.split, test.runs)[:, feature_N].T.astype(np.float64)
    p_fwer = max_t_p(drop_NxP, PERMUTATIONS, ablation.config.seed)
    return Importance(
        feature=feature_N,
        firing_rate=statistics.firing_rate_F[feature_N],
        mean_activation=statistics.mean_activation_F[feature_N],
        drop=drop_NxP.mean(axis=1),
        drop_low=low_N,
        drop_high=high_N,
        accuracy_drop=(clean_P > 0).mean() - (ablated_NxP > 0).mean(axis=1),
        p_fwer=p_fwer if len(prompts) >= VerdictConfig.least_prompts else np.full(len(p_fwer), np.nan),
        same_sign=(np.abs(sign_GxN.sum(axis=0)) == len(sign_GxN)).astype(np.float64),
        attribution=test.attribution_F[feature_N],
        activation_correlation=correlations(largest_NxP, clean_P[None]),
    )


def _rank_correlation(first_N: np.ndarray, second_N: np.ndarray) -> float | None:
    """Return Spearman's correlation where both are defined; None where there is none."""
    from scipy.stats import spearmanr

    is_known_N = np.isfinite(first_N) & np.isfinite(second_N)
    first, second = first_N[is_known_N], second_N[is_known_N]
    # A constant has no ranks; scipy would warn and return NaN, which JSON does not have.
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(spearmanr(first, second).statistic)
