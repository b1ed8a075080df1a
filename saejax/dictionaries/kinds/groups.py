"""Nested groups of features, each of which must reconstruct the target by itself (Bussmann et al., 2025)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.dictionaries.kinds.base import Dictionary
from saejax.dictionaries.matmul import matmul
from saejax.dictionaries.sparsity import row
from saejax.errors import UserError


def group_reconstructions(dictionary: Dictionary, f_BxF: jax.Array, x_BxD: jax.Array) -> list[jax.Array]:
    """Return the reconstruction of each nested group, ascending; see ``Kind.reconstructions``."""
    sizes = np.diff(dictionary.config.groups, prepend=0).tolist()
    nested, partial = [], row(dictionary.b_dec_D[...], 2)
    if dictionary.config.skip:
        partial += matmul(x_BxD, dictionary.W_skip_DxD[...], dictionary.matmul_dtype)
    # lax.split, because its gradient is one concatenation; slices' would be a sum of arrays of the full size.
    groups = zip(lax.split(f_BxF, sizes, axis=1), lax.split(dictionary.W_dec_FxD[...], sizes, axis=0), strict=True)
    for f_BxG, W_dec_GxD in groups:
        partial += matmul(f_BxG, W_dec_GxD, dictionary.matmul_dtype)
        nested.append(partial)
    return nested


def group_counts(groups: Sequence[int]) -> jax.Array:
    """Return how many of the nested groups each feature is in, [F]."""
    return jnp.asarray(len(groups) - np.searchsorted(groups, np.arange(groups[-1]), side="right"), jnp.float32)


def group_sizes(setting: str, shares: Sequence[float], n_features: int) -> tuple[int, ...]:
    """Return groups as numbers of features.

    Args:
      setting: name of their setting in ``--train``, for the message.
      shares: shares of the features, ascending to 1.
      n_features: F.

    Raises:
      UserError: they do not ascend to 1, or two have the same size.
    """
    groups = tuple(round(share * n_features) for share in shares)
    if not groups or sorted(set(groups)) != list(groups) or groups[0] < 1 or groups[-1] != n_features:
        raise UserError(
            f"--train.{setting}={tuple(shares)} gives groups of {groups} features: expected shares ascending to 1"
        )
    return groups
