"""Firing rates and activations of features on prompts, at the positions that an ablation changes."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.interventions.split_model import CleanRun, SplitModel, in_order, of_features
from saejax.models.split import SplitPoint
from saejax.parallel.mesh import sharding

_MIN_SPREAD = 1e-4  # logarithms with a smaller standard deviation differ by rounding


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """Firing rates and activations of features at some positions.

    Attributes:
      positions: number of positions counted.
      fires_F: at how many of them each feature fires, int64.
      sum_F: the sizes of each feature's activations summed over those, float64.
    """

    positions: int
    fires_F: np.ndarray
    sum_F: np.ndarray

    @classmethod
    def total(cls, counts: Iterable["Firings"]) -> "FeatureStatistics":
        """Add up the counts of disjoint sets of positions, in float64.

        Raises:
          UserError: a feature's activation is not finite.
        """
        counts = list(counts)
        # int64 and float64 on the host: sums over many prompts leave the exact range of the device's types.
        fires_F = np.sum([np.asarray(count.fires_F, np.int64) for count in counts], axis=0)
        sum_F = np.sum([np.asarray(count.size_F, np.float64) for count in counts], axis=0)
        if not np.isfinite(sum_F).all():
            raise UserError(
                f"feature {int(np.argmin(np.isfinite(sum_F)))} has an activation that is not finite: the dictionary "
                "holds NaN or overflows; train it again"
            )
        return cls(sum(int(count.positions) for count in counts), fires_F, sum_F)

    @property
    def firing_rate_F(self) -> np.ndarray:
        """Share of the positions at which each feature fires, 0 to 1."""
        return self.fires_F / max(self.positions, 1)

    @property
    def mean_activation_F(self) -> np.ndarray:
        """Mean activation where the feature fires; 0 for one that never does."""
        return self.sum_F / np.maximum(self.fires_F, 1)

    def firing(self, features: Sequence[int]) -> list[int]:
        """Return those of some features that fire anywhere."""
        return [feature for feature in features if self.fires_F[feature] > 0]

    def of(self, feature: int) -> dict[str, float]:
        """Return a feature's ``firing_rate`` and ``mean_activation``, for JSON."""
        return dict(
            firing_rate=float(self.firing_rate_F[feature]), mean_activation=float(self.mean_activation_F[feature])
        )


class Firings(NamedTuple):
    """Sums over some positions, of each feature.

    Attributes:
      positions: number of positions.
      fires_F: positions at which it fires.
      size_F: the sizes of its activations there.
      nonzero_F: positions at which it is not 0.
      total_F: its activations.
      rows_F: rows in which it fires.
    """

    positions: jax.Array
    fires_F: jax.Array
    size_F: jax.Array
    nonzero_F: jax.Array
    total_F: jax.Array
    rows_F: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def count_firings(
    point: SplitPoint, dictionary: Dictionary, read_BxTxD: jax.Array, domain_BxT: jax.Array, kept_B: jax.Array
) -> Firings:
    """Return sums over the editable positions of the kept rows.

    Args:
      point: where the model is split (static).
      dictionary: the dictionary of the features.
      read_BxTxD: what it reads.
      domain_BxT: True at editable positions.
      kept_B: True for the rows that count: not for copies that pad a batch.
    """
    # Copies that fill a batch would count their prompt twice.
    domain_BxT = domain_BxT & kept_B[:, None]

    def sums(f_PxTxF: jax.Array) -> tuple[jax.Array, ...]:
        fires_PxTxF = dictionary.fires(f_PxTxF)
        size_PxTxF = jnp.where(fires_PxTxF, jnp.abs(f_PxTxF), 0.0 * f_PxTxF)  # NaN where an activation is NaN
        over_positions = (fires_PxTxF, size_PxTxF, f_PxTxF != 0, f_PxTxF)
        return *(array.sum(axis=1) for array in over_positions), fires_PxTxF.any(axis=1)

    per_row = of_features(dictionary, (read_BxTxD, domain_BxT), sums)
    counts = Firings(domain_BxT.sum(), *(array.sum(axis=0) for array in per_row))
    return jax.lax.with_sharding_constraint(counts, sharding(point.mesh))


def _count(split: SplitModel, run: CleanRun) -> Firings:
    """Return ``count_firings`` of the prompts of a clean run."""
    kept_B = np.arange(len(run.last_B)) < len(run.index_P)
    return count_firings(split.point, split.dictionary, run.read_BxTxD, run.domain_BxT, kept_B)


def statistics(split: SplitModel, runs: Sequence[CleanRun]) -> FeatureStatistics:
    """Return firing statistics of every feature on the prompts of clean runs.

    Raises:
      UserError: a feature's activation is not finite.
    """
    return FeatureStatistics.total(_count(split, run) for run in runs)


def statistics_and_prompts(split: SplitModel, runs: Sequence[CleanRun]) -> tuple[FeatureStatistics, np.ndarray]:
    """Return ``statistics`` and ``firing_prompts`` from one pass over the prompts."""
    counts = [_count(split, run) for run in runs]
    return FeatureStatistics.total(counts), _total_rows(counts)


def firing_prompts(split: SplitModel, runs: Sequence[CleanRun]) -> np.ndarray:
    """Return the number of prompts on which each feature fires at an editable position, int64 [F]."""
    return _total_rows(_count(split, run) for run in runs)


def _total_rows(counts: Iterable[Firings]) -> np.ndarray:
    return np.sum([np.asarray(count.rows_F, np.int64) for count in counts], axis=0)


def means(split: SplitModel, runs: Sequence[CleanRun]) -> np.ndarray:
    """Return every feature's mean activation over all editable positions, fp64 [F]; 0 without such positions."""
    counts = [_count(split, run) for run in runs]
    total_F = np.sum([np.asarray(count.total_F, np.float64) for count in counts], axis=0)
    # Positions at which it is silent count, too: the mean replaces its activation everywhere.
    return total_F / max(sum(int(count.positions) for count in counts), 1)


def firing_sums(split: SplitModel, run: CleanRun) -> tuple[jax.Array, jax.Array]:
    """Return each feature's number of non-zero positions in a clean run, and its summed activations, [F] each."""
    count = _count(split, run)
    return count.nonzero_F, count.total_F


def maxima(split: SplitModel, runs: Sequence[CleanRun]) -> np.ndarray:
    """Return every feature's largest activation on each prompt, fp32 [P, F], at least 0.

    Of a linear dictionary it is the largest positive one.
    """
    return in_order((_maxima(split.point, split.dictionary, run.read_BxTxD, run.domain_BxT) for run in runs), runs)


@functools.partial(jax.jit, static_argnums=0)
def _maxima(point: SplitPoint, dictionary: Dictionary, read_BxTxD: jax.Array, domain_BxT: jax.Array) -> jax.Array:
    max_BxF = of_features(dictionary, (read_BxTxD, domain_BxT), lambda f_PxTxF: f_PxTxF.max(axis=1, initial=0.0))
    return jax.lax.with_sharding_constraint(max_BxF, sharding(point.mesh))


def coordinates(rate_N: np.ndarray, size_N: np.ndarray) -> np.ndarray:
    """Return the coordinates of N features by which similar ones are found, [N, 2].

    They are the logarithms of firing rate and mean activation, each in units of its standard deviation; 0 where all
    features have the same.

    Args:
      rate_N: firing rates, above 0.
      size_N: mean activations where the features fire, above 0.
    """
    # Logarithms, because rates and activations range over orders of magnitude: 1 % and 2 % differ as 10 % and 20 %.
    log_Nx2 = np.log(np.stack([rate_N, size_N], axis=1))
    spread_2 = log_Nx2.std(axis=0) if len(log_Nx2) else np.zeros(2)
    return log_Nx2 / np.where(spread_2 > _MIN_SPREAD, spread_2, np.inf)
