"""Firing rates and activations of features on prompts, at the positions that an ablation changes."""

import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.interventions.feature_statistics import FeatureStatistics
from saejax.interventions.split_model import CleanRun, SplitModel, in_order, of_features
from saejax.models.split import SplitPoint
from saejax.parallel.mesh import sharding


def statistics(split: SplitModel, runs: Sequence[CleanRun]) -> FeatureStatistics:
    """Return firing statistics of every feature on the prompts of clean runs.

    Raises:
      UserError: a feature's activation is not finite.
    """
    return total(split, (counts[:4] for counts in (_counts(split, run) for run in runs)))


def total(split: SplitModel, parts: Iterable[Sequence]) -> FeatureStatistics:
    """Return ``FeatureStatistics.total`` of the split's dictionary, which must be finite.

    Raises:
      UserError: a feature's activation is not finite.
    """
    statistics = FeatureStatistics.total(parts, np.asarray(_norms(split.point, split.dictionary), np.float64))
    if not np.isfinite(statistics.sum_F).all():
        feature = int(np.argmin(np.isfinite(statistics.sum_F)))
        raise UserError(
            f"feature {feature} has an activation that is not finite: the dictionary holds NaN or overflows; train it "
            "again"
        )
    return statistics


def firing_prompts(split: SplitModel, runs: Sequence[CleanRun]) -> np.ndarray:
    """Return the number of prompts on which each feature fires at an editable position, int64 [F]."""
    counts = []
    for run in runs:
        kept_B = np.arange(len(run.last_B)) < len(run.index_P)  # not the copies that pad the batch
        count_F = _firing_prompts(split.point, split.dictionary, run.read_BxTxD, run.domain_BxT, kept_B)
        counts.append(np.asarray(count_F, np.int64))
    return np.sum(counts, axis=0)


@functools.partial(jax.jit, static_argnums=0)
def _firing_prompts(
    point: SplitPoint, dictionary: Dictionary, read_BxTxD: jax.Array, domain_BxT: jax.Array, kept_B: jax.Array
) -> jax.Array:
    arrays = read_BxTxD, domain_BxT & kept_B[:, None]
    fires_BxF = of_features(dictionary, arrays, lambda f_PxTxF: dictionary.fires(f_PxTxF).any(axis=1))
    return jax.lax.with_sharding_constraint(fires_BxF.sum(axis=0), sharding(point.mesh))


def means(split: SplitModel, runs: Sequence[CleanRun]) -> np.ndarray:
    """Return every feature's mean activation over all editable positions, fp64 [F]; 0 without such positions."""
    counts = [_counts(split, run) for run in runs]
    positions, total_F = sum(count[0] for count in counts), sum(count[4] for count in counts)
    return np.asarray(total_F) / max(positions, 1)


def firing_sums(split: SplitModel, run: CleanRun) -> tuple[jax.Array, jax.Array]:
    """Return each feature's number of non-zero positions in a clean run, and its summed activations, [F] each."""
    kept_B = np.arange(len(run.last_B)) < len(run.index_P)
    return _sum(split.point, split.dictionary, run.read_BxTxD, run.domain_BxT, kept_B)


@functools.partial(jax.jit, static_argnums=0)
def _sum(
    point: SplitPoint, dictionary: Dictionary, read_BxTxD: jax.Array, domain_BxT: jax.Array, kept_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def sums(f_PxTxF: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (f_PxTxF != 0).sum(axis=1), f_PxTxF.sum(axis=1)

    fires_BxF, sum_BxF = of_features(dictionary, (read_BxTxD, domain_BxT & kept_B[:, None]), sums)
    return jax.lax.with_sharding_constraint((fires_BxF.sum(axis=0), sum_BxF.sum(axis=0)), sharding(point.mesh))


def maxima(split: SplitModel, runs: Sequence[CleanRun]) -> np.ndarray:
    """Return every feature's largest activation on each prompt, fp32 [P, F], at least 0.

    Of a linear dictionary it is the largest positive one.
    """
    return in_order((_maxima(split.point, split.dictionary, run.read_BxTxD, run.domain_BxT) for run in runs), runs)


@functools.partial(jax.jit, static_argnums=0)
def _maxima(point: SplitPoint, dictionary: Dictionary, read_BxTxD: jax.Array, domain_BxT: jax.Array) -> jax.Array:
    max_BxF = of_features(dictionary, (read_BxTxD, domain_BxT), lambda f_PxTxF: f_PxTxF.max(axis=1, initial=0.0))
    return jax.lax.with_sharding_constraint(max_BxF, sharding(point.mesh))


def _counts(split: SplitModel, run: CleanRun) -> tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the number of positions, and firing counts and sums of each feature.

    The four sums are: positions at which the feature fires; its sizes there; its distances from the prompt's end there
    (the last token is 1); its activations.
    """
    kept_B = np.arange(len(run.last_B)) < len(run.index_P)  # not the copies that fill up the batch
    n, *sums = _count(split.point, split.dictionary, run.read_BxTxD, run.domain_BxT, kept_B, run.last_B)
    fires_F, size_F, place_F, total_F = (np.asarray(array) for array in sums)
    return int(n), fires_F, size_F, place_F, total_F.astype(np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _norms(point: SplitPoint, dictionary: Dictionary) -> jax.Array:
    """Return the norms of the features' directions, [F]."""
    W_dec_FxD = dictionary.W_dec_FxD[...].astype(jnp.float32)
    return jax.lax.with_sharding_constraint(jnp.linalg.norm(W_dec_FxD, axis=1), sharding(point.mesh))


def fires_and_sizes(dictionary: Dictionary, f: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return where activations [..., F] fire, and their sizes there: 0 elsewhere, NaN where they are NaN."""
    fires = dictionary.fires(f)
    return fires, jnp.where(fires, jnp.abs(f), 0.0 * f)


@functools.partial(jax.jit, static_argnums=0)
def _count(
    point: SplitPoint,
    dictionary: Dictionary,
    read_BxTxD: jax.Array,
    domain_BxT: jax.Array,
    kept_B: jax.Array,
    last_B: jax.Array,
) -> tuple[jax.Array, ...]:
    domain_BxT = domain_BxT & kept_B[:, None]
    place_BxT = last_B[:, None] + 1 - jnp.arange(domain_BxT.shape[1])[None, :]

    def sums(f_PxTxF: jax.Array, place_PxT: jax.Array) -> tuple[jax.Array, ...]:
        fires_PxTxF, size_PxTxF = fires_and_sizes(dictionary, f_PxTxF)
        placed_PxTxF = jnp.where(fires_PxTxF, place_PxT[..., None], 0)
        return tuple(array.sum(axis=1) for array in (fires_PxTxF, size_PxTxF, placed_PxTxF, f_PxTxF))

    per_prompt = of_features(dictionary, (read_BxTxD, domain_BxT, place_BxT), sums)
    counts = domain_BxT.sum(), *(array.sum(axis=0) for array in per_prompt)
    return jax.lax.with_sharding_constraint(counts, sharding(point.mesh))
