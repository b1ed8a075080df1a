"""The active features of a prompt, found by running each layer's encoder on what it reads."""

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
      layer_A, position_A, feature_A: int32 layer, position and index of each.
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
    def concatenate(cls, parts: Sequence["Active"]) -> "Active":
        """Return the features of several layers, given in the order of layers."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def of_layer(self, layer: int) -> slice:
        """Return the slice of a layer's features."""
        return slice(*np.searchsorted(self.layer_A, [layer, layer + 1]))

    @functools.cached_property
    def index_of(self) -> dict[tuple[int, int, int], int]:
        """The index of each feature, by layer, position and feature."""
        keys = zip(self.layer_A.tolist(), self.position_A.tolist(), self.feature_A.tolist(), strict=True)
        return {key: index for index, key in enumerate(keys)}

    def find(self, layer_J: np.ndarray, position_J: np.ndarray, feature_J: np.ndarray) -> np.ndarray:
        """Return the indices of some features, int64 [J].

        Raises:
          UserError: one of them is not active.
        """
        keys = zip(layer_J.tolist(), position_J.tolist(), feature_J.tolist(), strict=True)
        index_J = np.array([self.index_of.get(key, -1) for key in keys], np.int64)
        for missing in np.flatnonzero(index_J < 0)[:1]:
            raise UserError(
                f"feature {feature_J[missing]} of layer {layer_J[missing]} is not active at position "
                f"{position_J[missing]}: is the graph one of this prompt and set?"
            )
        return index_J


def active_features(encoder: Dictionary, layer: int, read_TxD: jax.Array, used_T: np.ndarray) -> Active:
    """Return a layer's active features.

    Args:
      encoder: of the layer; its decoder is not used.
      layer: its number.
      read_TxD: what the encoder reads.
      used_T: True where features are used.
    """
    length = len(read_TxD)
    size = max(1, min(length, AT_ONCE // encoder.config.n_features))  # positions that are encoded at once
    positions, features, values = [], [], []
    for start in range(0, length, size):
        chunk = slice(start, start + size)
        acts_TxF = to_host(encode_used(encoder, read_TxD[chunk], used_T[chunk]))
        # On the host and sparse: all activations of a layer are far more than those that are not 0.
        position_A, feature_A = np.nonzero(acts_TxF)
        positions.append(position_A + start)
        features.append(feature_A)
        values.append(acts_TxF[position_A, feature_A])
    feature_A, value_A = np.concatenate(features), np.concatenate(values)
    return Active(
        np.full(len(value_A), layer, np.int32),
        np.concatenate(positions).astype(np.int32),
        feature_A.astype(np.int32),
        value_A,
        to_host(encoder.b_enc_F[...])[feature_A],
    )


def activations(encoder: Dictionary, read_xD: jax.Array) -> jax.Array:
    """Return activations [..., F], 0 at attention sinks, where no feature is used."""
    acts_xF = encoder.encode(read_xD)
    return jnp.where(encoder.is_not_sink(read_xD)[..., None], acts_xF, jnp.zeros_like(acts_xF))


@jax.jit
def encode_used(encoder: Dictionary, read_xTxD: jax.Array, used_T: jax.Array) -> jax.Array:
    """Return activations [..., T, F] of what is read [..., T, D], 0 at sinks and where ``used_T`` is False."""
    acts_xTxF = activations(encoder, read_xTxD)
    used = used_T.reshape((1,) * (acts_xTxF.ndim - 2) + (-1, 1))
    return jnp.where(used, acts_xTxF, jnp.zeros_like(acts_xTxF))
