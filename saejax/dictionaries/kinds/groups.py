"""Nested groups of features, each of which must rebuild the target by itself (Bussmann et al., 2025)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries.group_products import group_products
from saejax.dictionaries.kinds.base import Coder
from saejax.dictionaries.matmul import matmul
from saejax.dictionaries.sparsity import row
from saejax.errors import UserError


def group_reconstructions(member: Coder, f_BxF: jax.Array, x_BxD: jax.Array) -> list[jax.Array]:
    """What each of the member's groups gives, ascending; see ``Kind.reconstructions``."""
    arrays, matmul_dtype = member.arrays, member.matmul_dtype
    nested, partial = [], row(arrays["b_dec_D"], 2)
    if "W_skip_DxD" in arrays:
        partial += matmul(x_BxD, arrays["W_skip_DxD"], matmul_dtype)
    for product_BxD in group_products(f_BxF, arrays["W_dec_FxD"], member.config.groups, matmul_dtype):
        partial += product_BxD
        nested.append(partial)
    return nested


def group_counts(groups: Sequence[int]) -> jax.Array:
    """In how many of the nested groups each feature is [F]: in all of them in the smallest, then in one less."""
    return jnp.asarray(len(groups) - np.searchsorted(groups, np.arange(groups[-1]), side="right"), jnp.float32)


def group_sizes(setting: str, shares: Sequence[float], n_features: int) -> tuple[int, ...]:
    """Groups as numbers of features.

    Args:
      setting: which one of ``--train`` they are, for the message.
      shares: of the features, ascending to 1.
      n_features: F.

    Raises:
      UserError: they do not ascend to 1, or two are as large.
    """
    groups = tuple(round(share * n_features) for share in shares)
    if not groups or sorted(set(groups)) != list(groups) or groups[0] < 1 or groups[-1] != n_features:
        raise UserError(
            f"--train.{setting}={tuple(shares)} gives groups of {groups} features: expected shares ascending to 1"
        )
    return groups
