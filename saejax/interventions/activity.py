"""Firing rates and activations of features on prompts, at the positions that an ablation changes."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.interventions.split_model import CleanRun, SplitModel, in_order, of_features
from saejax.models.split import SplitPoint
from saejax.parallel.mesh import sharding


class FeatureStatistics(NamedTuple):
    """Sums over some positions, of each feature; totals are int64 and float64."""

    positions: Any  #: number of positions counted
    fires_F: Any  #: at how many of them the feature fires
    sum_F: Any  #: the sizes of its activations there
    nonzero_F: Any = 0  #: positions at which it is not 0
    total_F: Any = 0.0  #: its activations at all positions
    prompts_F: Any = 0  #: prompts on which it fires

    @classmethod
    def total(cls, counts: Iterable["FeatureStatistics"]) -> "FeatureStatistics":
        """Add up the counts of disjoint sets of positions.

        Raises:
          UserError: a feature's activation is not finite.
        """
        # int64 and float64 on the host: sums over many prompts leave the exact range of the device's types.
        wide = [
            [np.asarray(a, np.float64 if jnp.issubdtype(a.dtype, jnp.floating) else np.int64) for a in arrays]
            for arrays in counts
        ]
        total = cls(*(np.sum(arrays, axis=0) for arrays in zip(*wide, strict=True)))
        if not np.isfinite(total.sum_F).all():
            raise UserError(
                f"feature {int(np.argmin(np.isfinite(total.sum_F)))} has an activation that is not finite: the "
                "dictionary holds NaN or overflows; train it again"
            )
        return total._replace(positions=int(total.positions))

    @property
    def firing_rate_F(self) -> np.ndarray:
        """Share of the positions at which each feature fires, 0 to 1."""
        return self.fires_F / max(self.positions, 1)

    @property
    def mean_activation_F(self) -> np.ndarray:
        """Mean activation where the feature fires; 0 for one that never does."""
        return self.sum_F / np.maximum(self.fires_F, 1)

    @property
    def mean_F(self) -> np.ndarray:
        """Mean activation over all positions, also those at which the feature is silent; 0 without positions."""
        return self.total_F / max(self.positions, 1)

    def of(self, feature: int) -> dict[str, float]:
        """Return a feature's ``firing_rate`` and ``mean_activation``, for JSON."""
        return dict(
            firing_rate=float(self.firing_rate_F[feature]), mean_activation=float(self.mean_activation_F[feature])
        )


@functools.partial(jax.jit, static_argnums=0)
def count_firings(
    point: SplitPoint, dictionary: Dictionary, read_BxTxD: jax.Array, domain_BxT: jax.Array, kept_B: jax.Array
) -> FeatureStatistics:
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

    per_row = of_features(point.mesh, dictionary, (read_BxTxD, domain_BxT), sums)
    counts = FeatureStatistics(domain_BxT.sum(), *(array.sum(axis=0) for array in per_row))
    return jax.lax.with_sharding_constraint(counts, sharding(point.mesh))


def count_run(split: SplitModel, run: CleanRun) -> FeatureStatistics:
    """Return ``count_firings`` of the prompts of a clean run, on the devices."""
    kept_B = np.arange(len(run.last_B)) < len(run.index_P)
    return count_firings(split.point, split.dictionary, run.read_BxTxD, run.domain_BxT, kept_B)


def statistics(split: SplitModel, runs: Sequence[CleanRun]) -> FeatureStatistics:
    """Return firing statistics of every feature on the prompts of clean runs.

    Raises:
      UserError: a feature's activation is not finite.
    """
    return FeatureStatistics.total(count_run(split, run) for run in runs)


def maxima(split: SplitModel, runs: Sequence[CleanRun]) -> np.ndarray:
    """Return every feature's largest activation on each prompt, fp32 [P, F], at least 0.

    Of a linear dictionary it is the largest positive one.
    """
    return in_order((_maxima(split.point, split.dictionary, run.read_BxTxD, run.domain_BxT) for run in runs), runs)


@functools.partial(jax.jit, static_argnums=0)
def _maxima(point: SplitPoint, dictionary: Dictionary, read_BxTxD: jax.Array, domain_BxT: jax.Array) -> jax.Array:
    max_BxF = of_features(
        point.mesh, dictionary, (read_BxTxD, domain_BxT), lambda f_PxTxF: f_PxTxF.max(axis=1, initial=0.0)
    )
    return jax.lax.with_sharding_constraint(max_BxF, sharding(point.mesh))
