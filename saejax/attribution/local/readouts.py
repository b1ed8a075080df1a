"""Readouts: logits as directions of the residual stream, and programs that read the stream in edited runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.attribution.local.layers import FrozenModel
from saejax.models import decoder
from saejax.models.config import RunRules
from saejax.models.layers import einsum
from saejax.parallel.collectives import to_host

_READ = 128  # directions that are read at once, so that layers and prompts share a program


def padded(count: int, least: int = 4) -> int:
    """Return the size to which tokens, features or rows are padded, so that similar prompts share compiled programs.

    Args:
      count: their number.
      least: the size is a multiple of this, and at most a quarter larger where there are many.
    """
    step = max(least, (1 << count.bit_length()) >> 3)
    return max(-(-count // step), 1) * step


@dataclasses.dataclass(frozen=True)
class Readouts:
    """K logits or differences of two, read from the stream that leaves the last layer, at the last position."""

    pair_Kx2: np.ndarray  #: int32 tokens of a difference; the second is -1 for a logit
    vector_KxD: np.ndarray  #: fp32 directions, pulled back through the final norm
    value_K: np.ndarray  #: fp32 dot product with the stream, plus biases
    constant_K: np.ndarray  #: fp32 part of it that biases of the final norm and the unembedding are
    weight_K: np.ndarray  #: fp32 weight in influences: the probability of a token, 1 for a difference
    logit_K: np.ndarray  #: fp32 logit, or difference of two
    labels: tuple[str, ...]  #: names

    def __len__(self) -> int:
        return len(self.labels)


def read_changes(x_TxD: jax.Array, x_RxTxD: jax.Array, position_J: np.ndarray, vector_JxD: np.ndarray) -> np.ndarray:
    """Return how much dot products of directions with a stream differ from the prompt's, [R, J].

    Args:
      x_TxD: the stream of the prompt.
      x_RxTxD: the same stream in the rows.
      position_J: positions that are read.
      vector_JxD: directions that are read there.
    """
    count, parts = len(position_J), []
    for start in range(0, count, _READ):
        room = max(start + _READ - count, 0)
        position_X = np.pad(position_J[start : start + _READ], (0, room))
        vector_XxD = np.pad(vector_JxD[start : start + _READ], ((0, room), (0, 0)))
        parts.append(to_host(_read_changes(x_TxD, x_RxTxD, position_X, vector_XxD)))
    return np.concatenate(parts, axis=1)[:, :count]


@jax.jit
def _read_changes(x_TxD: jax.Array, x_RxTxD: jax.Array, position_J: jax.Array, vector_JxD: jax.Array) -> jax.Array:
    # The difference first: that of two nearly equal products would be rounding.
    return einsum("rjd,jd->rj", (x_RxTxD - x_TxD[None])[:, position_J], vector_JxD)


def read_last(
    frozen: FrozenModel, freeze: str, last_D: jax.Array, x_RxD: jax.Array, vector_KxD: np.ndarray
) -> np.ndarray:
    """Return how much readouts of the stream leaving the last layer differ from the prompt's, [R, K].

    Their directions were pulled back through the final norm with the prompt's scale. Unless that norm is frozen, each
    row has its own scale, which multiplies what is read.

    Args:
      frozen: the model.
      freeze: what the final norm keeps, one of ``layers.FREEZE_MODES``.
      last_D: the stream of the prompt at the last position.
      x_RxD: the same stream in the rows.
      vector_KxD: the readouts' directions.
    """
    count = len(vector_KxD)
    filled_XxD = np.pad(vector_KxD, ((0, padded(count, 16) - count), (0, 0)))
    return to_host(_read_last(frozen, freeze, last_D, x_RxD, filled_XxD))[:, :count]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read_last(
    frozen: FrozenModel, freeze: str, last_D: jax.Array, x_RxD: jax.Array, vector_KxD: jax.Array
) -> jax.Array:
    config = frozen.config
    if freeze == "all":
        return einsum("rd,kd->rk", x_RxD - last_D[None], vector_KxD)

    def scale(x_RxD: jax.Array) -> jax.Array:
        centred_RxD = x_RxD - jnp.mean(x_RxD, axis=-1, keepdims=True) if config.norm == "layer" else x_RxD
        return lax.rsqrt(jnp.mean(jnp.square(centred_RxD), axis=-1, keepdims=True) + config.norm_eps)

    ratio_Rx1 = scale(x_RxD) / scale(last_D[None])
    # Two products here: with a scale for each row there is no single difference to read.
    return einsum("rd,kd->rk", x_RxD, vector_KxD) * ratio_Rx1 - einsum("rd,kd->rk", last_D[None], vector_KxD)


@functools.partial(jax.jit, static_argnums=(0, 1))
def read_logits(
    frozen: FrozenModel, freeze: str, params: decoder.Params, last_D: jax.Array, x_RxD: jax.Array
) -> jax.Array:
    """Return the logits of the rows at the last position, [R, V]; see ``read_last``."""
    x_BxD = jnp.concatenate([last_D[None], x_RxD])  # the prompt comes first: its scale may be frozen
    return decoder.unembed(frozen.config, params, x_BxD[:, None], RunRules(first_fixes=freeze == "all"))[1:, 0]
