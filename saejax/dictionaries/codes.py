"""Which features of each token are active, and how much, in place of the activations of all."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.sparse import BCSR

_PACKED = 2**32  # numbers that 32 bits hold


class ByFeature(NamedTuple):
    """The entries of a code in the order of their features: N = B k of them.

    Attributes:
      order_N: their places in the code, in order of its tokens.
      starts_X: where each feature's begin, and the end of the last; F + 1 numbers.
    """

    order_N: jax.Array
    starts_X: jax.Array

    @classmethod
    def of(cls, feature_BxK: jax.Array, n_features: int) -> "ByFeature":
        """Of the features of each token, [B, K], out of ``n_features``."""
        feature_N = feature_BxK.reshape(-1)
        count = len(feature_N)
        if count * n_features < _PACKED:  # one number for both: XLA:CPU sorts single ones four times as fast
            place_N = jnp.arange(count, dtype=jnp.uint32)
            sorted_N = lax.sort(feature_N.astype(jnp.uint32) * jnp.uint32(count) + place_N, is_stable=False)
            order_N = sorted_N % jnp.uint32(count)
        else:
            order_N = jnp.argsort(feature_N)
        every_X = jnp.arange(n_features + 1, dtype=feature_N.dtype)
        starts_X = jnp.searchsorted(feature_N[order_N], every_X)
        return cls(order_N.astype(jnp.int32), starts_X.astype(jnp.int32))

    def product(self, value_BxK: jax.Array, x_BxD: jax.Array) -> jax.Array:
        """f.T @ x, [F, D], of the code f that has ``value_BxK`` in place of its values."""
        (token_N, value_N), shape = self.entries(value_BxK), (len(self.starts_X) - 1, len(x_BxD))
        return BCSR((value_N, token_N, self.starts_X), shape=shape) @ x_BxD

    def entries(self, value_BxK: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The token of each entry, and its value of those given; both [N]."""
        return self.order_N // value_BxK.shape[1], value_BxK.reshape(-1)[self.order_N]


class SparseCode(NamedTuple):
    """The active features of B tokens, at most k of each.

    Attributes:
      value_BxK: their activations; 0 where there are no more.
      feature_BxK: which features they are, int32; where the activation is 0, any.
      by_feature: the same by feature.
    """

    value_BxK: jax.Array
    feature_BxK: jax.Array
    by_feature: ByFeature

    def dense(self) -> jax.Array:
        """Activations of all features, [B, F]."""
        count, features = len(self.value_BxK), len(self.by_feature.starts_X) - 1
        row_Bx1 = jnp.arange(count, dtype=jnp.int32)[:, None]
        zeros_BxF = jnp.zeros((count, features), self.value_BxK.dtype)
        return zeros_BxF.at[row_Bx1, self.feature_BxK].add(self.value_BxK)

    def sums(self, value_BxK: jax.Array) -> jax.Array:
        """The sum of each feature's values, [F]."""
        zeros_F = jnp.zeros(len(self.by_feature.starts_X) - 1, value_BxK.dtype)
        return zeros_F.at[self.feature_BxK.reshape(-1)].add(value_BxK.reshape(-1))

    def firings(self) -> jax.Array:
        """On how many tokens each feature is active, fp32 [F]."""
        return self.sums((self.value_BxK > 0).astype(jnp.float32))
