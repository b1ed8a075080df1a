"""Edits of features inside a forward pass of the language model."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from saejax.dictionaries.matmul import matmul
from saejax.models.sites import Site

POSITIONS = ("all", "last")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FeatureEdit:
    """Multiplies features by a factor at a dictionary's site; factor 0 ablates them. Made by ``Dictionary.ablate``.

        x' = x + sum_i (factor - 1) f_i(x) W_dec_i

    Only what the features add is changed, so the dictionary's error term stays. Attention sinks and
    padding pass through untouched.

    Attributes:
      site: where it applies.
      state: the dictionary's arrays.
      features_K: the feature indices.
      factor: scalar.
      graph: the dictionary's structure (static).
      positions: "all" or "last" (static).
    """

    state: nnx.State
    features_K: jax.Array
    factor: jax.Array
    site: Site = dataclasses.field(metadata=dict(static=True))
    graph: nnx.GraphDef = dataclasses.field(metadata=dict(static=True))
    positions: str = dataclasses.field(metadata=dict(static=True), default="all")

    def __call__(self, value_BxTxD: jax.Array, mask_BxT: jax.Array) -> jax.Array:
        """The edited site.

        Args:
          value_BxTxD: the site's value.
          mask_BxT: True at real positions.
        """
        dictionary = nnx.merge(self.graph, self.state)
        f_BxTxK = dictionary.encode(value_BxTxD)[..., self.features_K]
        change_BxTxD = matmul((self.factor - 1) * f_BxTxK, dictionary.W_dec_FxD[...][self.features_K])
        where_BxT = mask_BxT & dictionary.in_domain(value_BxTxD)
        if self.positions == "last":
            later_BxT = jnp.cumsum(mask_BxT[:, ::-1], axis=1)[:, ::-1]  # real positions from here on
            where_BxT &= later_BxT == 1
        change_BxTxD = jnp.where(where_BxT[..., None], change_BxTxD, 0.0)
        return value_BxTxD + change_BxTxD.astype(value_BxTxD.dtype)
