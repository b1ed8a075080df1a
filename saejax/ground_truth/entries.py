"""The active features of synthetic vectors, and the vectors that they make."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.sparse import BCSR


class ActiveEntries(NamedTuple):
    """What B vectors are made of: E entries of each.

    Attributes:
      value_BxE: activations; 0 of an entry that is of no active feature.
      feature_BxE: of which features, int32.
    """

    value_BxE: jax.Array
    feature_BxE: jax.Array

    def dense(self, features: int) -> jax.Array:
        """Activations of all features, [B, J]."""
        zeros_BxJ = jnp.zeros((len(self.value_BxE), features), self.value_BxE.dtype)
        return zeros_BxJ.at[jnp.arange(len(zeros_BxJ))[:, None], self.feature_BxE].add(self.value_BxE)

    def total(self, directions_JxD: jax.Array, one_device: bool) -> jax.Array:
        """The sum of each vector's directions, [B, D].

        Args:
          directions_JxD: of all features.
          one_device: whether vectors are not spread over several: then a CPU multiplies by a sparse matrix.
        """

        def dense(code: ActiveEntries) -> jax.Array:
            return jnp.matmul(code.dense(len(directions_JxD)), directions_JxD, precision="highest")

        def sparse(code: ActiveEntries) -> jax.Array:
            batch, entries = code.value_BxE.shape
            arrays = *(part.reshape(-1) for part in code), jnp.arange(0, batch * entries + 1, entries, dtype=jnp.int32)
            return BCSR(arrays, shape=(batch, len(directions_JxD))) @ directions_JxD

        return lax.platform_dependent(self, cpu=sparse if one_device else dense, default=dense)
