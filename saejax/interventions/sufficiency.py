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
from saejax.interventions.edits import ZERO
from saejax.interventions.rows import EditedRun, PromptTree, prompt_trees
from saejax.interventions.split_model import PROGRAM_TOKENS, CleanRun, SplitModel, active_features
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
    most = max(map(len, sets))
    values_2xExP = np.zeros((2, len(sets), sum(len(run.index_P) for run in runs)))
    for run in runs:
        clean = run.stream_BxTxX, run.value_BxTxD, run.read_BxTxD, run.domain_BxT, split.past(run)[1]
        for rows in prompt_trees(split, EditedRun(run, ZERO), PROGRAM_TOKENS // (2 * SETS)):
            place_X = rows.place_SxR.reshape(-1)
            answers_Xx2, prompt_Q = run.answers_Bx2[place_X], run.index_P[place_X[place_X >= 0]]
            for first in range(0, len(sets), SETS):
                # Sets of one width, the last ones repeated: one program runs all. The first feature fills a set up,
                # with a weight of 0.
                some = [sets[min(place, len(sets) - 1)] for place in range(first, first + SETS)]
                widened = [np.pad(np.asarray(members), (0, most - len(members)), mode="edge") for members in some]
                weight_GxK = np.array([np.arange(most) < len(members) for members in some], np.float32)
                fixed = split.point, split.params, split.dictionary, mean_F, clean, rows, answers_Xx2
                measured_2xGxX = to_host(_run_kept(*fixed, np.stack(widened), weight_GxK))
                values_2xExP[:, first : first + SETS, prompt_Q] = measured_2xGxX[:, : len(sets) - first, place_X >= 0]
    return values_2xExP


@functools.partial(jax.jit, static_argnums=0)
def _run_kept(
    point: SplitPoint,
    params: decoder.Params,
    dictionary: Dictionary,
    mean_F: jax.Array,
    clean: tuple,
    rows: PromptTree,
    answers_Xx2: jax.Array,
    members_ExK: jax.Array,
    weight_ExK: jax.Array,
) -> jax.Array:
    """Return the logit differences of X rows of a clean run, with and without the error term, [2, E, X]."""
    stream, value_SxNxO, read_SxNxD, domain_SxN = (rows.tree.take(array) for array in clean[:4])
    f_SxNxF = active_features(dictionary, read_SxNxD, domain_SxN)
    W_dec_FxO = dictionary.W_dec_FxD[...].astype(jnp.float32)
    fall_SxNxF = jnp.where(domain_SxN[..., None], f_SxNxF - mean_F.astype(f_SxNxF.dtype)[None, None, :], 0.0)
    clean_SxNxO = value_SxNxO.astype(jnp.float32)
    rebuilt_SxNxO = dictionary.decode(f_SxNxF, read_SxNxD).astype(jnp.float32)
    # Attention sinks keep their values, as under every edit.
    error_SxNxO = jnp.where(domain_SxN[..., None], clean_SxNxO - rebuilt_SxNxO, 0.0)
    means_SxNxO = clean_SxNxO - matmul(fall_SxNxF, W_dec_FxO)  # all features at their means

    last_X = rows.tree.last_positions(rows.end_SxC, point.positions)

    def measure(edited_SxNxO: jax.Array) -> jax.Array:
        edited_SxNxO = edited_SxNxO.astype(value_SxNxO.dtype)
        ends = point.run_shared_ends(params, clean[4], rows.tree, stream, edited_SxNxO, rows.end_SxC)
        return point.readouts(params, ends, last_X, answers_Xx2)[:, 0]

    def keep(chosen: tuple[jax.Array, jax.Array]) -> jax.Array:
        members_K, weight_K = chosen
        weighted_SxNxK = fall_SxNxF[:, :, members_K] * weight_K[None, None, :]
        kept_SxNxO = means_SxNxO + matmul(weighted_SxNxK, W_dec_FxO[members_K])
        return jax.vmap(measure)(jnp.stack([kept_SxNxO, kept_SxNxO - error_SxNxO]))

    # Short prompts with all sets at once: the weights of a large model are read once, not once a set.
    together = SETS if 2 * SETS * domain_SxN.shape[1] <= PROGRAM_TOKENS else 1
    values_Ex2xX = jax.lax.map(keep, (members_ExK, weight_ExK), batch_size=together)
    return jax.lax.with_sharding_constraint(jnp.moveaxis(values_Ex2xX, 1, 0), sharding(point.mesh))
