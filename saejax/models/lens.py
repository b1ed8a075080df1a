"""Lenses: what the stream leaving each layer says of the next token, read as if it were the last layer's.

logit lens       softmax(unembed(norm(h)))            (nostalgebraist, 2020)
Jacobian lens    softmax(unembed(norm(J_l h)))        J_l carries h to the last layer as the model does on average
                                                      (Gurnee et al., 2026; ``lens_fit`` fits it)

with the model's own final norm, unembedding and soft cap. The last layer is always read directly. The control of both
is the same lens on streams that a random rotation has turned: as long, as different from each other, and meaningless.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.errors import UserError
from saejax.models import decoder
from saejax.models.config import DecoderConfig

_ROWS = 256  # positions whose logits exist at one time: 50 MB for a vocabulary of 49,152


@dataclasses.dataclass(frozen=True)
class JacobianLens:
    """The mean Jacobians of a model.

    Attributes:
      maps_LxDxD: of each layer but the last, d (last layer's stream) / d (stream leaving the layer); [out, in].
      n_prompts: over which they are the mean.
    """

    maps_LxDxD: np.ndarray
    n_prompts: int

    def check(self, config: DecoderConfig) -> "JacobianLens":
        """The lens; a ``UserError`` if it is of a model of another shape."""
        layers, width = self.maps_LxDxD.shape[:2]
        if (layers, width) != (config.n_layers - 1, config.d_model):
            raise UserError(
                f"the lens has {layers} maps of {width} dimensions: expected {config.n_layers - 1} of "
                f"{config.d_model}, one for each layer of the model but the last"
            )
        return self


@dataclasses.dataclass(frozen=True)
class LensReading:
    """What a lens reads at L layers, at each of T positions of B prompts; what stands beyond a prompt means nothing.

    Attributes:
      ids_LxBxTxC: the likeliest next tokens, first the likeliest.
      logp_LxBxTxC: their log-probabilities, nats.
      answer_logp_LxBxTxN: log-probabilities of the tokens that were asked for.
      answer_rank_LxBxTxN: how many tokens are likelier than each of these.
      kl_LxBxT: Kullback-Leibler divergence of the reading from the model's own next-token probabilities, nats.
    """

    ids_LxBxTxC: np.ndarray
    logp_LxBxTxC: np.ndarray
    answer_logp_LxBxTxN: np.ndarray
    answer_rank_LxBxTxN: np.ndarray
    kl_LxBxT: np.ndarray


@dataclasses.dataclass(frozen=True)
class LensOutput(LensReading):
    """A reading, and that of its control: the same lens on streams turned by a random rotation."""

    control: LensReading


def read(
    config: DecoderConfig,
    params: decoder.Params,
    x_LxBxTxD: jax.Array,
    jacobian: JacobianLens | None,
    answers: tuple[int, ...],
    top: int,
    seed: int,
) -> LensOutput:
    """What a lens says of streams.

    Args:
      x_LxBxTxD: the streams leaving all layers.
      jacobian: None: the logit lens.
      answers: ids of tokens whose probabilities are wanted everywhere.
      top: of the likeliest tokens, so many are given.
      seed: of the control's rotation.
    """
    layers, width = x_LxBxTxD.shape[0], x_LxBxTxD.shape[-1]
    maps_LxDxD = None
    if jacobian is not None:
        identity_1xDxD = np.eye(width, dtype=np.float32)[None]
        maps_LxDxD = jnp.asarray(np.concatenate([jacobian.check(config).maps_LxDxD, identity_1xDxD]), jnp.float32)
    rotation_DxD = jnp.asarray(np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))[0], np.float32)
    x_LxNxD = x_LxBxTxD.reshape(layers, -1, width)
    places, parts = x_LxNxD.shape[1], []
    for start in range(0, places, _ROWS):
        chunk_LxNxD = x_LxNxD[:, start : start + _ROWS]
        missing = places_at_once(places) - chunk_LxNxD.shape[1]  # of one shape, so that one program is compiled
        chunk_LxNxD = jnp.pad(chunk_LxNxD, ((0, 0), (0, missing), (0, 0)))
        given = maps_LxDxD, rotation_DxD, np.asarray(answers, np.int32)
        parts.append(jax.device_get(read_places(config, min(top, config.vocab), params, chunk_LxNxD, *given)))
    shape = x_LxBxTxD.shape[:3]

    def reading(which: int) -> dict[str, np.ndarray]:
        joined = (np.concatenate(arrays, axis=1)[:, :places] for arrays in zip(*(part[which] for part in parts)))
        names = (field.name for field in dataclasses.fields(LensReading))
        return {name: array.reshape(*shape, *array.shape[2:]) for name, array in zip(names, joined, strict=True)}

    return LensOutput(**reading(0), control=LensReading(**reading(1)))


def places_at_once(places: int) -> int:
    """How many of so many ``places`` are read together."""
    return min(_ROWS, places)


@functools.partial(jax.jit, static_argnums=(0, 1))
def read_places(
    config: DecoderConfig,
    top: int,
    params: decoder.Params,
    x_LxNxD: jax.Array,
    maps_LxDxD: jax.Array | None,
    rotation_DxD: jax.Array,
    answers_X: jax.Array,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """The arrays of a ``LensReading`` and of its control, for places in one row; layer after layer.

    Args:
      top: as for ``read``.
      x_LxNxD: the streams.
      maps_LxDxD: those of a Jacobian lens; None: the logit lens.
      rotation_DxD: the control's.
      answers_X: ids of tokens whose probabilities are wanted.
    """
    final_NxV = jax.nn.log_softmax(decoder.unembed(config, params, x_LxNxD[-1]))

    def said(x_NxD: jax.Array) -> tuple[jax.Array, ...]:
        logp_NxV = jax.nn.log_softmax(decoder.unembed(config, params, x_NxD))
        logp_NxC, ids_NxC = lax.top_k(logp_NxV, top)
        own_NxX = logp_NxV[:, answers_X]
        likelier = [jnp.sum(logp_NxV > own_NxX[:, i : i + 1], axis=1) for i in range(own_NxX.shape[1])]
        rank_NxX = jnp.stack(likelier, axis=1) if likelier else jnp.zeros(own_NxX.shape, jnp.int32)
        return ids_NxC, logp_NxC, own_NxX, rank_NxX, jnp.sum(jnp.exp(final_NxV) * (final_NxV - logp_NxV), axis=1)

    def carried(x_NxD: jax.Array, map_DxD: jax.Array | None) -> jax.Array:
        if map_DxD is None:
            return x_NxD
        wide_NxD = x_NxD.astype(map_DxD.dtype)
        return jnp.matmul(wide_NxD, map_DxD.T, precision="highest").astype(x_NxD.dtype)

    def at_layer(each: tuple[jax.Array, jax.Array | None]) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        x_NxD, map_DxD = each
        return said(carried(x_NxD, map_DxD)), said(carried(carried(x_NxD, rotation_DxD), map_DxD))

    return lax.map(at_layer, (x_LxNxD, maps_LxDxD))
