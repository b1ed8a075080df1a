"""Which features of a prompt are active, and what the transcoder of a layer leaves over."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.parallel.collectives import to_host

AT_ONCE = 1 << 26  # activations of a layer that are in memory at once


@dataclasses.dataclass(frozen=True)
class Active:
    """The features that are active in a prompt, in the order (layer, position, feature).

    Attributes:
      layer_A, position_A, feature_A: int32, where.
      value_A: fp32 activation, which for active features is the pre-activation.
      b_enc_A: fp32 bias of the encoder, a part of it.
    """

    layer_A: np.ndarray
    position_A: np.ndarray
    feature_A: np.ndarray
    value_A: np.ndarray
    b_enc_A: np.ndarray

    def __len__(self) -> int:
        return len(self.layer_A)

    @classmethod
    def joined(cls, parts: Sequence["Active"]) -> "Active":
        """The features of several layers, given in their order."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    @functools.cached_property
    def place_of(self) -> dict[tuple[int, int, int], int]:
        """The place of each, by layer, position and feature."""
        own = zip(self.layer_A.tolist(), self.position_A.tolist(), self.feature_A.tolist(), strict=True)
        return {key: place for place, key in enumerate(own)}

    def places(self, layer_J: np.ndarray, position_J: np.ndarray, feature_J: np.ndarray) -> np.ndarray:
        """Which of them some features at positions are, int64 [J].

        Raises:
          UserError: one of those is not active.
        """
        wanted = zip(layer_J.tolist(), position_J.tolist(), feature_J.tolist(), strict=True)
        place_J = np.array([self.place_of.get(key, -1) for key in wanted], np.int64)
        for missing in np.flatnonzero(place_J < 0)[:1]:
            raise UserError(
                f"feature {feature_J[missing]} of layer {layer_J[missing]} is not active at position "
                f"{position_J[missing]}: is the graph one of this prompt and set?"
            )
        return place_J


def active_features(
    transcoder: Dictionary, layer: int, read_TxD: jax.Array, out_TxD: jax.Array, used_T: np.ndarray
) -> tuple[Active, dict[str, jax.Array]]:
    """What a layer's transcoder makes of its input.

    Args:
      transcoder: or an SAE.
      layer: its number.
      read_TxD: what it reads.
      out_TxD: what it predicts: the MLP's output, or of an SAE what it reads.
      used_T: True where features are used, from some position on.

    Returns:
      Its active features; and the layer's parts of ``replacement.Streams``, by the names of their stacks.
    """
    length, features = len(read_TxD), transcoder.config.n_features
    size = max(1, min(length, AT_ONCE // features))
    active, errors, rest = [], [], []
    for start in range(0, length, size):
        chunk = slice(start, start + size)
        acts_TxF, error_TxD, left_TxD = explain(transcoder, read_TxD[chunk], out_TxD[chunk], used_T[chunk])
        acts_TxF = to_host(acts_TxF)
        position_A, feature_A = np.nonzero(acts_TxF)
        active.append((position_A + start, feature_A, acts_TxF[position_A, feature_A]))
        errors.append(error_TxD)
        rest.append(left_TxD)
    position_A, feature_A, value_A = map(np.concatenate, zip(*active, strict=True))
    b_enc_A = to_host(transcoder.b_enc_F[...])[feature_A]
    first_UxD = jnp.concatenate(rest)[: int(np.argmax(used_T))]
    part = dict(error_LxTxD=jnp.concatenate(errors), first_LxUxD=first_UxD, b_dec_LxD=transcoder.b_dec_D[...])
    if transcoder.config.skip:
        part["skip_LxDxD"] = transcoder.W_skip_DxD[...]
    layer_A = np.full(len(value_A), layer, np.int32)
    return Active(layer_A, position_A.astype(np.int32), feature_A.astype(np.int32), value_A, b_enc_A), part


def activations(dictionary: Dictionary, read_xD: jax.Array) -> jax.Array:
    """Activations [..., F]: at attention sinks, where no feature is used, 0."""
    acts_xF = dictionary.encode(read_xD)
    return jnp.where(dictionary.is_not_sink(read_xD)[..., None], acts_xF, jnp.zeros_like(acts_xF))


@jax.jit
def explain(
    transcoder: Dictionary, read_TxD: jax.Array, out_TxD: jax.Array, used_T: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Activations [T, F], errors [T, D], and where no features are used the MLP's output less the skip path [T, D].

    Args:
      read_TxD, out_TxD: what it reads, and what the MLP adds.
      used_T: where features are used; elsewhere activations and errors are 0.
    """
    acts_TxF = activations(transcoder, read_TxD)
    acts_TxF = jnp.where(used_T[:, None], acts_TxF, jnp.zeros_like(acts_TxF))
    left_TxD = out_TxD - transcoder.decode(acts_TxF, read_TxD)
    error_TxD = jnp.where(used_T[:, None], left_TxD, jnp.zeros_like(left_TxD))
    return acts_TxF, error_TxD, left_TxD + transcoder.b_dec_D[...][None]
