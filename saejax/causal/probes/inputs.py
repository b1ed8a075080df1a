"""What probes see of each prompt: features and raw activations at one position, or over all that are read."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.interventions.split_model import SplitModel, in_order, of_features
from saejax.models.split import SplitPoint
from saejax.parallel.mesh import sharding
from saejax.tasks.behaviours import Prompt


def pooled_inputs(split: SplitModel, prompts: Sequence[Prompt], pool: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What the probes see of each prompt, over the positions that the dictionary reads: neither padding nor sinks.

    Args:
      prompts: N of them.
      pool: "last", "max" or "mean".

    Returns:
      ``features`` [N, F] and ``raw`` activations [N, D] of the site that the dictionary reads, fp32, 0 for prompts
      without such a position; and which prompts have one, bool [N].

    Raises:
      UserError: an activation is not finite.
    """
    runs = split.run(prompts)
    arrays = ((run.read_BxTxD, run.domain_BxT, run.last_B) for run in runs)
    parts = [pool_prompts(split.point, pool, split.dictionary, *some) for some in arrays]
    features_NxF, raw_NxD, read_N = (in_order(part, runs) for part in zip(*parts, strict=True))
    for feature in np.flatnonzero(~np.isfinite(features_NxF).all(axis=0))[:1]:
        raise UserError(
            f"feature {feature} has an activation that is not finite: the dictionary holds NaN or overflows; train it "
            "again"
        )
    return dict(features=features_NxF.astype(np.float32), raw=raw_NxD.astype(np.float32)), read_N


@functools.partial(jax.jit, static_argnums=(0, 1))
def pool_prompts(
    point: SplitPoint,
    pool: str,
    dictionary: Dictionary,
    read_BxTxD: jax.Array,
    domain_BxT: jax.Array,
    last_B: jax.Array,
) -> tuple[jax.Array, ...]:
    """Features [B, F], raw activations [B, D], and whether the prompt has a position that is seen [B].

    Args:
      pool: as for ``pooled_inputs``.
      domain_BxT, last_B: as in a ``CleanRun``.
      read_BxTxD: what the dictionary reads: of a transcoder its input, whose features these are, not its target.
    """
    is_last_BxT = jnp.arange(domain_BxT.shape[1])[None, :] == last_B[:, None]
    seen_BxT = domain_BxT & is_last_BxT if pool == "last" else domain_BxT
    over = functools.partial(_over_positions, largest=pool == "max")
    features_BxF = of_features(dictionary, (read_BxTxD, domain_BxT, seen_BxT), over)
    pooled = features_BxF, over(read_BxTxD, seen_BxT), seen_BxT.any(axis=1)
    return jax.lax.with_sharding_constraint(pooled, sharding(point.mesh))


def _over_positions(x_BxTxC: jax.Array, seen_BxT: jax.Array, largest: bool) -> jax.Array:
    """Maximum or mean [B, C] over the positions that are seen; 0 where there are none."""
    x_BxTxC = x_BxTxC.astype(jnp.float32)
    seen_BxTx1 = seen_BxT[:, :, None]
    if largest:
        highest_BxC = jnp.where(seen_BxTx1, x_BxTxC, -jnp.inf).max(axis=1)
        return jnp.where(seen_BxTx1.any(axis=1), highest_BxC, 0.0)
    return jnp.where(seen_BxTx1, x_BxTxC, 0.0).sum(axis=1) / jnp.maximum(seen_BxTx1.sum(axis=1), 1)
