"""Firing rates and activations of features on prompts, at the positions that an ablation changes."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial import cKDTree

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
    def total(cls, parts: Iterable[tuple[int, np.ndarray, np.ndarray]]) -> "FeatureStatistics":
        """Add up (positions, fires_F, sum_F) of disjoint sets of positions, in float64.

        Raises:
          UserError: a feature's activation is not finite.
        """
        positions, fires_F, sum_F = 0, np.int64(0), np.float64(0)
        for count, part_fires_F, part_sum_F in parts:
            positions += int(count)
            fires_F, sum_F = fires_F + np.asarray(part_fires_F, np.int64), sum_F + np.asarray(part_sum_F, np.float64)
        if not np.isfinite(sum_F).all():
            raise UserError(
                f"feature {int(np.argmin(np.isfinite(sum_F)))} has an activation that is not finite: the dictionary "
                "holds NaN or overflows; train it again"
            )
        return cls(positions, np.asarray(fires_F), np.asarray(sum_F))

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


def statistics(split: SplitModel, runs: Sequence[CleanRun]) -> FeatureStatistics:
    """Return firing statistics of every feature on the prompts of clean runs.

    Raises:
      UserError: a feature's activation is not finite.
    """
    counts = (_count(split, run) for run in runs)
    return FeatureStatistics.total((int(count[0]), np.asarray(count[1]), np.asarray(count[2])) for count in counts)


def firing_prompts(split: SplitModel, runs: Sequence[CleanRun]) -> np.ndarray:
    """Return the number of prompts on which each feature fires at an editable position, int64 [F]."""
    return np.sum([np.asarray(_count(split, run)[5], np.int64) for run in runs], axis=0)


def means(split: SplitModel, runs: Sequence[CleanRun]) -> np.ndarray:
    """Return every feature's mean activation over all editable positions, fp64 [F]; 0 without such positions."""
    counts = [_count(split, run) for run in runs]
    total_F = np.sum([np.asarray(count[4], np.float64) for count in counts], axis=0)
    return total_F / max(sum(int(count[0]) for count in counts), 1)


def firing_sums(split: SplitModel, run: CleanRun) -> tuple[jax.Array, jax.Array]:
    """Return each feature's number of non-zero positions in a clean run, and its summed activations, [F] each."""
    return _count(split, run)[3:5]


def maxima(split: SplitModel, runs: Sequence[CleanRun]) -> np.ndarray:
    """Return every feature's largest activation on each prompt, fp32 [P, F], at least 0.

    Of a linear dictionary it is the largest positive one.
    """
    return in_order((_maxima(split.point, split.dictionary, run.read_BxTxD, run.domain_BxT) for run in runs), runs)


@functools.partial(jax.jit, static_argnums=0)
def _maxima(point: SplitPoint, dictionary: Dictionary, read_BxTxD: jax.Array, domain_BxT: jax.Array) -> jax.Array:
    max_BxF = of_features(dictionary, (read_BxTxD, domain_BxT), lambda f_PxTxF: f_PxTxF.max(axis=1, initial=0.0))
    return jax.lax.with_sharding_constraint(max_BxF, sharding(point.mesh))


def fires_and_sizes(dictionary: Dictionary, f: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return where activations [..., F] fire, and their sizes there: 0 elsewhere, NaN where they are NaN."""
    fires = dictionary.fires(f)
    return fires, jnp.where(fires, jnp.abs(f), 0.0 * f)


def _count(split: SplitModel, run: CleanRun) -> tuple[jax.Array, ...]:
    """Return the number of positions, and ``_sums`` of each feature over the prompts of a clean run, [F] each."""
    kept_B = np.arange(len(run.last_B)) < len(run.index_P)  # not the copies that fill up the batch
    return _sums(split.point, split.dictionary, run.read_BxTxD, run.domain_BxT, kept_B)


@functools.partial(jax.jit, static_argnums=0)
def _sums(
    point: SplitPoint, dictionary: Dictionary, read_BxTxD: jax.Array, domain_BxT: jax.Array, kept_B: jax.Array
) -> tuple[jax.Array, ...]:
    """Return the number of positions and, of each feature, five sums over the kept rows.

    The sums are: positions at which the feature fires; its sizes there; positions at which it is not 0; its
    activations; rows in which it fires.
    """
    domain_BxT = domain_BxT & kept_B[:, None]

    def sums(f_PxTxF: jax.Array) -> tuple[jax.Array, ...]:
        fires_PxTxF, size_PxTxF = fires_and_sizes(dictionary, f_PxTxF)
        over_positions = (fires_PxTxF, size_PxTxF, f_PxTxF != 0, f_PxTxF)
        return *(array.sum(axis=1) for array in over_positions), fires_PxTxF.any(axis=1)

    per_row = of_features(dictionary, (read_BxTxD, domain_BxT), sums)
    counts = domain_BxT.sum(), *(array.sum(axis=0) for array in per_row)
    return jax.lax.with_sharding_constraint(counts, sharding(point.mesh))


def coordinates(rate_N: np.ndarray, size_N: np.ndarray) -> np.ndarray:
    """Return the coordinates of N features by which similar ones are found, [N, 2].

    They are the logarithms of firing rate and mean activation, each in units of its standard deviation; 0 where all
    features have the same.

    Args:
      rate_N: firing rates, above 0.
      size_N: mean activations where the features fire, above 0.
    """
    log_Nx2 = np.log(np.stack([rate_N, size_N], axis=1))
    spread_2 = log_Nx2.std(axis=0) if len(log_Nx2) else np.zeros(2)
    return log_Nx2 / np.where(spread_2 > _MIN_SPREAD, spread_2, np.inf)


def nearest_others(place_Nx2: np.ndarray, most: int) -> np.ndarray:
    """Return the nearest others of each of N features by ``place_Nx2``, at most ``most``, [N, A]. N is at least 2."""
    count = len(place_Nx2)
    nearest_NxA = cKDTree(place_Nx2).query(place_Nx2, k=min(most + 1, count))[1]
    itself_NxA = nearest_NxA == np.arange(count)[:, None]
    itself_NxA[~itself_NxA.any(axis=1), -1] = True  # of many at one place it may not be among those found
    return nearest_NxA[~itself_NxA].reshape(count, -1)
