"""The logit lens: the stream leaving each layer, read as if it were the last layer's (nostalgebraist, 2020).

    softmax(unembed(norm(h)))

with the model's own final norm, unembedding and soft cap. The control is the same lens on streams that a random
rotation has turned: of equal norms and equal distances from one another, but meaningless.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.models import decoder
from saejax.models.config import DecoderConfig
from saejax.short_reprs import has_short_repr

_CHUNK = 256  # positions whose logits exist at one time: 50 MB for a vocabulary of 49,152


@dataclasses.dataclass(frozen=True)
class LensReading:
    """Next-token predictions of L layers at each of T positions of B prompts; meaningless beyond a prompt's end."""

    ids_LxBxTxC: np.ndarray  #: the most probable next tokens, in descending order
    logp_LxBxTxC: np.ndarray  #: their log-probabilities, nats
    answer_logp_LxBxTxN: np.ndarray  #: log-probabilities of the given answers
    answer_rank_LxBxTxN: np.ndarray  #: number of tokens that are more probable than each answer
    #: Kullback-Leibler divergence of the reading from the model's own next-token distribution, nats.
    kl_LxBxT: np.ndarray


@has_short_repr
@dataclasses.dataclass(frozen=True)
class LensOutput(LensReading):
    """A reading and its control: the same lens on randomly rotated streams."""

    control: LensReading


def read_lens(
    config: DecoderConfig, params: decoder.Params, x_LxBxTxD: jax.Array, answers: tuple[int, ...], top: int, seed: int
) -> LensOutput:
    """Read the streams x, leaving all layers, through the logit lens.

    Returned are the ``top`` most probable tokens, and log-probabilities and ranks of the tokens ``answers``. The seed
    is that of the control's rotation.
    """
    layers, width = x_LxBxTxD.shape[0], x_LxBxTxD.shape[-1]
    # On the host in fp64: a seed gives the same rotation on every device.
    rotation_DxD = jnp.asarray(np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))[0], np.float32)
    x_LxNxD = x_LxBxTxD.reshape(layers, -1, width)
    positions, chunks = x_LxNxD.shape[1], []
    for start in range(0, positions, _CHUNK):
        chunk_LxNxD = x_LxNxD[:, start : start + _CHUNK]
        missing = min(_CHUNK, positions) - chunk_LxNxD.shape[1]  # all chunks have one shape, for one program
        chunk_LxNxD = jnp.pad(chunk_LxNxD, ((0, 0), (0, missing), (0, 0)))
        answer_ids = np.asarray(answers, np.int32)
        arrays = read_positions(config, min(top, config.vocab), params, chunk_LxNxD, rotation_DxD, answer_ids)
        chunks.append(jax.device_get(arrays))
    shape = x_LxBxTxD.shape[:3]

    def join(which: int) -> dict[str, np.ndarray]:
        """Return the arrays of the reading (0) or its control (1), chunks put together."""
        joined = (np.concatenate(arrays, axis=1)[:, :positions] for arrays in zip(*(chunk[which] for chunk in chunks)))
        names = (field.name for field in dataclasses.fields(LensReading))
        return {name: array.reshape(*shape, *array.shape[2:]) for name, array in zip(names, joined, strict=True)}

    return LensOutput(**join(0), control=LensReading(**join(1)))


def carry(x_BxTxD: jax.Array, jacobian_DxD: np.ndarray | jax.Array) -> jax.Array:
    """Carry a layer's stream to the last layer by its mean first-order effect.

    Args:
      x_BxTxD: the stream leaving the layer.
      jacobian_DxD: the mean Jacobian; rows are dimensions of the last layer's stream.

    Returns:
      The carried stream, computed in fp32, in the stream's dtype.
    """
    carried_BxTxD = jnp.einsum("btd,ed->bte", x_BxTxD.astype(jnp.float32), jacobian_DxD, precision="highest")
    return carried_BxTxD.astype(x_BxTxD.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def read_positions(
    config: DecoderConfig,
    top: int,
    params: decoder.Params,
    x_LxNxD: jax.Array,
    rotation_DxD: jax.Array,
    answers_X: jax.Array,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Return the arrays of a ``LensReading`` and of its control for N positions, computed layer by layer.

    For the arguments see ``read_lens``; ``config`` and ``top`` are static, ``rotation`` is the control's.
    """
    final_NxV = jax.nn.log_softmax(decoder.unembed(config, params, x_LxNxD[-1]))

    def read(x_NxD: jax.Array) -> tuple[jax.Array, ...]:
        """Return a reading of one layer's positions."""
        logp_NxV = jax.nn.log_softmax(decoder.unembed(config, params, x_NxD))
        logp_NxC, ids_NxC = lax.top_k(logp_NxV, top)
        answer_NxX = logp_NxV[:, answers_X]
        # One answer at a time: all of them at once would be [N, V, X].
        ranks = [jnp.sum(logp_NxV > answer_NxX[:, i : i + 1], axis=1) for i in range(answer_NxX.shape[1])]
        rank_NxX = jnp.stack(ranks, axis=1) if ranks else jnp.zeros(answer_NxX.shape, jnp.int32)
        kl_N = jnp.sum(jnp.exp(final_NxV) * (final_NxV - logp_NxV), axis=1)
        return ids_NxC, logp_NxC, answer_NxX, rank_NxX, kl_N

    def rotate(x_NxD: jax.Array) -> jax.Array:
        """Return the control's streams."""
        float32_NxD = x_NxD.astype(rotation_DxD.dtype)
        # In full fp32: a rounded rotation would change norms, and the control should differ in direction alone.
        return jnp.matmul(float32_NxD, rotation_DxD.T, precision="highest").astype(x_NxD.dtype)

    # Layer by layer: the logits of all layers at once would take L times the memory.
    return lax.map(lambda x_NxD: (read(x_NxD), read(rotate(x_NxD))), x_LxNxD)
