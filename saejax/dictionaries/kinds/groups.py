"""Nested groups of features, each of which must reconstruct the target by itself (Bussmann et al., 2025)."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.dictionaries.kinds.base import Dictionary
from saejax.dictionaries.matmul import matmul
from saejax.dictionaries.sparsity import row
from saejax.errors import UserError

# Each block has a product [B, D] in memory, shared among the devices; groups of odd sizes would need one per feature.
_MOST_BLOCKS = 64


def group_reconstructions(dictionary: Dictionary, f_BxF: jax.Array, x_BxD: jax.Array) -> list[jax.Array]:
    """Return the reconstruction of each nested group, ascending; see ``Kind.reconstructions``."""
    nested, partial = [], row(dictionary.b_dec_D[...], 2)
    if dictionary.config.skip:
        partial += matmul(x_BxD, dictionary.W_skip_DxD[...], dictionary.matmul_dtype)
    W_dec_FxO, groups = dictionary.W_dec_FxD[...], dictionary.config.groups
    for product_BxO in _group_products(f_BxF, W_dec_FxO, groups, dictionary.matmul_dtype):
        partial += product_BxO
        nested.append(partial)
    return nested


def _group_products(
    f_BxF: jax.Array, W_dec_FxD: jax.Array, groups: Sequence[int], matmul_dtype: str
) -> list[jax.Array]:
    """Return what the features between two ends of groups contribute, for each group.

    Traced with a mesh as context (``jax.sharding.use_abstract_mesh``) whose ``model`` axis has several devices,
    features are taken to be split over that axis. Slices by groups would then be sent between devices. So features are
    cut into blocks of equal size that lie in one group and on one device: each device multiplies its blocks, and the
    only sums over devices are sums of the groups' products.
    """
    devices = jax.sharding.get_abstract_mesh().shape.get("model", 1)
    # Blocks that neither the end of a group nor a border between devices cuts.
    block = math.gcd(*groups, groups[-1] // devices)
    blocks = groups[-1] // block
    if devices > 1 and groups[-1] % devices == 0 and blocks <= _MOST_BLOCKS:
        f_BxPxK, W_dec_PxKxD = f_BxF.reshape(-1, blocks, block), W_dec_FxD.reshape(blocks, block, -1)
        multiply = jax.vmap(functools.partial(matmul, matmul_dtype=matmul_dtype), in_axes=(1, 0))
        # A product with zeros and ones, not sums of slices, for the same reason.
        group_of_block_P = np.searchsorted(groups, block * np.arange(blocks), side="right")
        in_group_SxP = jnp.asarray(np.arange(len(groups))[:, None] == group_of_block_P, f_BxF.dtype)
        # In full fp32, in which a product with zeros and ones is a plain sum.
        return list(jnp.tensordot(in_group_SxP, multiply(f_BxPxK, W_dec_PxKxD), 1, precision="highest"))
    # lax.split, because its gradient is one concatenation; slices' would be a sum of arrays of the full size.
    sizes = np.diff(groups, prepend=0).tolist()
    pairs = zip(lax.split(f_BxF, sizes, axis=1), lax.split(W_dec_FxD, sizes, axis=0), strict=True)
    return [matmul(f_BxG, W_dec_GxD, matmul_dtype) for f_BxG, W_dec_GxD in pairs]


def group_counts(groups: Sequence[int]) -> jax.Array:
    """Return how many of the nested groups each feature is in, [F]."""
    return jnp.asarray(len(groups) - np.searchsorted(groups, np.arange(groups[-1]), side="right"), jnp.float32)


def group_sizes(setting: str, shares: Sequence[float], n_features: int) -> tuple[int, ...]:
    """Return groups as numbers of features, of shares that ascend to 1; ``setting`` is their name in ``--train``.

    Raises:
      UserError: the shares do not ascend to 1, or two groups of the ``n_features`` have the same size.
    """
    groups = tuple(round(share * n_features) for share in shares)
    if not groups or sorted(set(groups)) != list(groups) or groups[0] < 1 or groups[-1] != n_features:
        raise UserError(
            f"--train.{setting}={tuple(shares)} gives groups of {groups} features: expected shares ascending to 1"
        )
    return groups
