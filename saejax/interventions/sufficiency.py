"""Question 6: are the top features enough? A site that holds some features alone, and everything else at its mean.

At editable positions the value of the site becomes

    x' = x - sum_{i not in S} (f_i - mean_i) W_dec_i,

where mean_i is the mean activation of feature i over the editable positions of the train prompts that rank features.
With the error term dropped it becomes x' - (x - decode(f)), too. What is left of the clean logit difference is measured
for the first k, 2 k, 4 k and 8 k features of T's dictionary in the order of their attribution, and for features of
controls.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import Dictionary
from saejax.dictionaries.matmul import matmul
from saejax.interventions.split_model import (
    PROGRAM_TOKENS,
    CleanRun,
    SiteRows,
    SplitModel,
    active_features,
    in_order,
)
from saejax.models import decoder
from saejax.models.split import SplitPoint
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import sharding

SIZES = (1, 2, 4, 8)  # kept features, as multiples of T's
SETS = 4  # sets that a program runs together: a list has as many sizes
CONTROLS = 3  # placebo sets, and untrained dictionaries: each takes as many rows as T


def keep_features(
    split: SplitModel, runs: Sequence[CleanRun], mean_F: np.ndarray, sets: Sequence[Sequence[int]]
) -> np.ndarray:
    """Return the logit difference of each prompt where some features alone are kept.

    Args:
      split: the model, split at the site.
      runs: the P prompts, from ``split.run``.
      mean_F: the activation that all other features are set to.
      sets: E sets of features, none of them empty.

    Returns:
      Float64 array ``[2, E, P]``: with the error term, and without it.
    """
    most, calls = max(map(len, sets)), []
    for first in range(0, len(sets), SETS):
        # Sets of one width, the last ones repeated: one program runs all. The first feature fills a set up, with a
        # weight of 0.
        some = [sets[min(place, len(sets) - 1)] for place in range(first, first + SETS)]
        members_ExK = np.stack([np.pad(np.asarray(members), (0, most - len(members)), mode="edge") for members in some])
        weight_ExK = np.stack([np.arange(most) < len(members) for members in some]).astype(np.float32)
        parts = []
        for run in runs:
            kept = [
                to_host(_run_kept(split.point, split.params, split.dictionary, mean_F, rows, members_ExK, weight_ExK))
                for _, rows in split.slices(run)
            ]
            parts.append(np.moveaxis(np.concatenate(kept, axis=-1), -1, 0))
        calls.append(np.moveaxis(in_order(parts, runs), 0, -1))
    return np.concatenate(calls, axis=1)[:, : len(sets)].astype(np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _run_kept(
    point: SplitPoint,
    params: decoder.Params,
    dictionary: Dictionary,
    mean_F: jax.Array,
    rows: SiteRows,
    members_ExK: jax.Array,
    weight_ExK: jax.Array,
) -> jax.Array:
    """Return the logit differences of B prompts, with and without the error term, [2, E, B]."""
    f_BxTxF = active_features(dictionary, rows.read_BxTxD, rows.domain_BxT)
    W_dec_FxD = dictionary.W_dec_FxD[...].astype(jnp.float32)
    fall_BxTxF = jnp.where(rows.domain_BxT[..., None], f_BxTxF - mean_F.astype(f_BxTxF.dtype)[None, None, :], 0.0)
    clean_BxTxD = rows.value_BxTxD.astype(jnp.float32)
    rebuilt_BxTxD = dictionary.decode(f_BxTxF, rows.read_BxTxD).astype(jnp.float32)
    # Attention sinks keep their values, as under every edit.
    error_BxTxD = jnp.where(rows.domain_BxT[..., None], clean_BxTxD - rebuilt_BxTxD, 0.0)
    means_BxTxD = clean_BxTxD - matmul(fall_BxTxF, W_dec_FxD)  # all features at their means

    def measure(value_BxTxD: jax.Array) -> jax.Array:
        ends = point.run_ends(params, rows.stream_BxTxX, value_BxTxD.astype(rows.value_BxTxD.dtype), rows.last_B)
        return point.readouts(params, ends, rows.last_B, rows.answers_Bx2)[:, 0]

    def keep(chosen: tuple[jax.Array, jax.Array]) -> jax.Array:
        members_K, weight_K = chosen
        weighted_BxTxK = fall_BxTxF[:, :, members_K] * weight_K[None, None, :]
        kept_BxTxD = means_BxTxD + matmul(weighted_BxTxK, W_dec_FxD[members_K])
        return jax.vmap(measure)(jnp.stack([kept_BxTxD, kept_BxTxD - error_BxTxD]))

    # Short prompts with all sets at once: the weights of a large model are read once, not once a set.
    together = SETS if 2 * SETS * rows.domain_BxT.size <= PROGRAM_TOKENS else 1
    values_ExRxB = jax.lax.map(keep, (members_ExK, weight_ExK), batch_size=together)
    return jax.lax.with_sharding_constraint(jnp.moveaxis(values_ExRxB, 1, 0), sharding(point.mesh))
