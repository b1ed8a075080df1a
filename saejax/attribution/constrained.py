"""A forward pass of the decoder in which all that a graph holds constant is held: what its edges claim, tried out.

Each run of a batch adds a vector to the output of one MLP at one position. All take the factors of norms and the
attention weights of the run without a change, and of the MLPs only what skip paths make of the change.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from saejax.attribution.frozen import FrozenModel
from saejax.attribution.replacement import Replacement
from saejax.models import decoder
from saejax.models.attention import full_reaches
from saejax.models.layers import einsum


def run_constrained(
    replacement: Replacement, layer_R: np.ndarray, position_R: np.ndarray, vector_RxD: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """Runs the prompt once for each change.

    Args:
      layer_R, position_R: of the MLP output that is changed.
      vector_RxD: what is added to it.

    Returns:
      By how much what each transcoder reads changes [L, R, T, D], and by how much the logits at the last position do,
      before they are capped and less the mean over the vocabulary [R, V].
    """
    streams, params = replacement.streams, replacement.model.params
    changes = np.asarray(layer_R, np.int32), np.asarray(position_R, np.int32), np.asarray(vector_RxD, np.float32)
    last = np.int32(len(replacement.ids_P) - 1)
    return _run(replacement.frozen, params, streams.stream_LxTxD[0], streams.skip_LxDxD, last, *changes)


@functools.partial(jax.jit, static_argnums=0)
def _run(
    frozen: FrozenModel,
    params: decoder.Params,
    x_TxD: jax.Array,
    skip_LxDxD: jax.Array | None,
    last: jax.Array,
    layer_R: jax.Array,
    position_R: jax.Array,
    vector_RxD: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    config = dataclasses.replace(frozen.original, first_fixes=True, logit_cap=None)
    reaches = full_reaches(config, len(x_TxD))
    at_RxT = jnp.arange(len(x_TxD))[None] == position_R[:, None]

    def step(x_BxTxD: jax.Array, part: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
        layer, skip_DxD = part
        seen: dict[str, jax.Array] = {}
        change_RxTxD = jnp.where((at_RxT & (layer_R == layer)[:, None])[..., None], vector_RxD[:, None], 0)

        def hook(kind: str, value_BxTxD: jax.Array) -> jax.Array:
            seen[kind] = value_BxTxD
            if kind != "mlp_out":
                return value_BxTxD
            read_BxTxD = frozen.read(params, layer, seen, config)
            moved_BxTxD = read_BxTxD - read_BxTxD[:1]
            skip_BxTxD = 0 if skip_DxD is None else einsum("btd,de->bte", moved_BxTxD, skip_DxD)
            return value_BxTxD[:1] + skip_BxTxD + jnp.pad(change_RxTxD, ((1, 0), (0, 0), (0, 0)))

        x_BxTxD = decoder.block(config, params, layer, x_BxTxD, reaches, hook)
        read_BxTxD = frozen.read(params, layer, seen, config)
        return x_BxTxD, read_BxTxD[1:] - read_BxTxD[:1]

    x_BxTxD = jnp.broadcast_to(x_TxD, (len(layer_R) + 1, *x_TxD.shape))
    x_BxTxD, read_LxRxTxD = jax.lax.scan(step, x_BxTxD, (jnp.arange(config.n_layers), skip_LxDxD))
    logits_BxV = decoder.unembed(config, params, x_BxTxD[:, last])
    moved_RxV = logits_BxV[1:] - logits_BxV[:1]
    return read_LxRxTxD, moved_RxV - moved_RxV.mean(axis=1, keepdims=True)
