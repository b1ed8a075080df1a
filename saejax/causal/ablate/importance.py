"""The effect of every feature that fires, one by one, with what would be expected by chance.

Every feature of a dictionary that fires on the test prompts (or on those that lend what stands in its place) is removed
by itself, exactly. Beside its mean drop in logit difference stand a bootstrap interval, a permutation p-value, a
q-value and a p-value adjusted over all these features (``statistics``), and its *control percentile*: the share of the
100 features nearest in firing rate, activation size and decoder norm whose removal costs less.

The estimates, of which one chooses the candidates elsewhere (``screening``), are computed on the same prompts and
compared. So is *importance by correlation*: that of a feature's largest activation on a prompt with the clean logit
difference, over prompts. It needs no intervention, and says nothing of causes.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import false_discovery_control, pearsonr, spearmanr

from saejax.causal.ablate.importance_results import EstimateFit, FeatureEffect, ImportanceSummary
from saejax.causal.columns import Columns
from saejax.causal.experiment import Experiment
from saejax.causal.results import HalvesAgreement
from saejax.causal.statistics import correlations, max_t_p, rank_correlations, sign_flip_p
from saejax.errors import UserError
from saejax.files import write_array
from saejax.interventions.feature_statistics import nearest_others
from saejax.settings import ESTIMATES, AblateConfig
from saejax.tasks.scoring import bootstrap_means, separation

NEAREST = 100  # features that a control percentile is over
PERMUTATIONS = 20_000
DISCOVERY = 0.05  # largest q-value of a discovery, and adjusted p-value of a sure one


@dataclasses.dataclass(frozen=True)
class Importance(Columns):
    """What each of the N features that fire on the test prompts is worth there; arrays [N], features rising.

    Each is what the field of its name is in ``FeatureEffect``; NaN where that is None.
    """

    kind = "importance"

    feature: np.ndarray
    firing_rate: np.ndarray
    mean_activation: np.ndarray
    gradient: np.ndarray
    integrated: np.ndarray
    relp: np.ndarray
    drop: np.ndarray
    drop_low: np.ndarray
    drop_high: np.ndarray
    accuracy_drop: np.ndarray
    effect_size: np.ndarray
    p_value: np.ndarray
    q_value: np.ndarray
    p_max_t: np.ndarray
    control_percentile: np.ndarray
    pearson: np.ndarray
    spearman: np.ndarray

    def summary(self, leaders: int, stability: HalvesAgreement, least_p: float) -> ImportanceSummary:
        """What there is to say of all features, and of so many of largest drop.

        Args:
          leaders: how many.
          stability: of the drops.
          least_p: the smallest p-value that there can be.
        """
        order_N = np.argsort(-self.drop, kind="stable")[:leaders]
        return ImportanceSummary(
            features=len(self.feature),
            discoveries=int((self.q_value <= DISCOVERY).sum()),
            sure=int((self.p_max_t <= DISCOVERY).sum()),
            estimates={
                name: EstimateFit(
                    pearson=_correlation(pearsonr, getattr(self, name), self.drop),
                    spearman=_correlation(spearmanr, getattr(self, name), self.drop),
                )
                for name in ESTIMATES
            },
            correlations={name: self._rank_agreement(getattr(self, name)) for name in ("pearson", "spearman")},
            leaders=tuple(
                FeatureEffect(**{name: _plain(values_N[n]) for name, values_N in self.columns.items()}) for n in order_N
            ),
            stability=stability,
            least_p=least_p,
        )

    def _rank_agreement(self, correlation_N: np.ndarray) -> float | None:
        defined_N = ~np.isnan(correlation_N)
        return _correlation(spearmanr, np.abs(correlation_N[defined_N]), self.drop[defined_N])


def save_drops(folder: Path, behaviour: str, drop_NxP: np.ndarray) -> None:
    """Keeps every ``drop`` that a behaviour's table sums up: of its N features on P test prompts, as .npy."""
    write_array(_drops_file(folder, behaviour), drop_NxP.astype(np.float32))


def load_drops(folder: Path, behaviour: str) -> np.ndarray:
    """What ``save_drops`` wrote, [N, P].

    Raises:
      UserError: it is missing or damaged.
    """
    path = _drops_file(folder, behaviour)
    try:
        return np.load(path)
    except (OSError, ValueError):
        raise UserError(f"{path} is missing or damaged: delete {folder} and run ablate again") from None


def _drops_file(folder: Path, behaviour: str) -> Path:
    return folder / f"{behaviour}-drops.npy"


def measure_importance(experiment: Experiment, config: AblateConfig) -> tuple[Importance, np.ndarray]:
    """Removes every feature that fires on the test prompts, one by one.

    Returns:
      What each is worth; and the drops [N, P] that say so, in which those of the size of rounding are 0.

    Raises:
      UserError: something is not finite.
    """
    statistics = experiment.statistics()
    feature_N = np.flatnonzero(statistics.fires_at_all_F)
    diffs = experiment.ablate([[feature] for feature in feature_N.tolist()])
    drop_NxP = diffs.drop_SxP
    # All features share one error of rounding per prompt, which would make many small effects agree.
    drop_NxP = np.where(np.abs(drop_NxP) > 4 * diffs.rounding_P[None, :], drop_NxP, 0.0)
    low_N, high_N = bootstrap_means(drop_NxP, config.bootstrap, config.seed)
    p_N = sign_flip_p(drop_NxP, PERMUTATIONS, config.seed)
    rate_N, size_N = statistics.firing_rate_F[feature_N], statistics.mean_activation_F[feature_N]
    largest_NxP = experiment.max_activations()[:, feature_N].T.astype(np.float64)
    found = Importance(
        feature=feature_N,
        firing_rate=rate_N,
        mean_activation=size_N,
        **{name: experiment.test_attribution(name)[feature_N] for name in ESTIMATES},
        drop=drop_NxP.mean(axis=1),
        drop_low=low_N,
        drop_high=high_N,
        accuracy_drop=((diffs.clean_P > 0).mean() - (diffs.ablated_SxP > 0).mean(axis=1)),
        effect_size=separation(drop_NxP) if len(drop_NxP) else np.zeros(0),
        p_value=p_N,
        q_value=false_discovery_control(p_N),
        p_max_t=max_t_p(drop_NxP, PERMUTATIONS, config.seed),
        control_percentile=control_percentiles(drop_NxP.mean(axis=1), statistics.coordinates(feature_N)),
        pearson=correlations(largest_NxP, diffs.clean_P[None]),
        spearman=rank_correlations(largest_NxP, diffs.clean_P[None]),
    )
    return found, drop_NxP


def control_percentiles(drop_N: np.ndarray, place_NxC: np.ndarray, nearest: int = NEAREST) -> np.ndarray:
    """The share of the nearest features whose drop is smaller than a feature's own, [N]; NaN for one feature alone.

    Args:
      drop_N: of each feature.
      place_NxC: where it stands for matching; see ``controls.coordinates``.
      nearest: how many others are looked at, at most.
    """
    if len(drop_N) < 2:
        return np.full(len(drop_N), np.nan)
    return (drop_N[nearest_others(place_NxC, nearest)] < drop_N[:, None]).mean(axis=1)


def _plain(value: np.generic) -> Any:
    """For JSON, which has no NaN."""
    return None if np.isnan(value) else value.item()


def _correlation(kind: Any, a_N: np.ndarray, b_N: np.ndarray) -> float | None:
    """None where it is not defined: fewer than two features, or all alike."""
    if len(a_N) < 2 or np.ptp(a_N) == 0 or np.ptp(b_N) == 0:
        return None
    return float(kind(a_N, b_N).statistic)
