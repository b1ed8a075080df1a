"""Latent scaling: is what a crosscoder writes to one part alone absent from the other parts (Minder et al., 2025)?

The decoder row of a feature can vanish at a part that has the concept: a penalty shrinks it to zero where the concept
is weak (*complete shrinkage*), or other features stand for the concept there (*latent decoupling*). For a feature j
that is private to part p, with direction d = d_jp there and activation f_n on token n, find how much of it is in values
y of part q:

    beta_q(y) = argmin_b sum_n |b f_n d - y_n|^2 = sum_n f_n <d, y_n> / (|d|^2 sum_n f_n^2)

    nu_error          = beta_q(x_q - x^_q + f d_jq) / beta_p(x_p - x^_p + f d_jp)
    nu_reconstruction = beta_q(x^_q) / beta_p(x^_p)

x^ is the reconstruction; the error is taken without the feature itself, so that beta_p is about 1 for a feature that
part p has. Near 0 both ratios say that the feature is of this part alone; nu_error is above 0 after complete shrinkage,
nu_reconstruction after latent decoupling (arXiv 2504.02922, section 3). Values are scaled as the crosscoder reads them.
Of several other parts the largest ratio counts. Parts of another width are of another space and are left out.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from saejax.dictionaries import Dictionary
from saejax.dictionaries.joined import split
from saejax.parallel.mesh import BY_DOCUMENT, by_filled_row, fitting_sharding

MOST_ERROR, MOST_RECONSTRUCTION = 0.2, 0.5  # ratios below which a private feature is of its part alone
_AT_ONCE = 1024  # features whose products with values are made at once


class LatentScaling(NamedTuple):
    """The ratios of private features; NaN for all others, and where part p does not have the feature itself."""

    error_F: np.ndarray  #: nu_error, float64
    reconstruction_F: np.ndarray  #: nu_reconstruction, float64

    def is_specific(self) -> np.ndarray:
        """Return whether a private feature is of its part alone, bool [F]: both ratios are below their limits."""
        with np.errstate(invalid="ignore"):
            return (self.error_F < MOST_ERROR) & (self.reconstruction_F < MOST_RECONSTRUCTION)


def scale_latents(
    dictionary: Dictionary, part_F: np.ndarray, read: Callable[[], Iterable[Sequence[np.ndarray]]]
) -> LatentScaling:
    """Measure how much of each private feature of a crosscoder its other parts have.

    Args:
      dictionary: the crosscoder.
      part_F: the part that each feature is private to; -1: to none, and it is left out.
      read: returns an iterator over blocks of joined values, ([n, D],) each; called once for every thousand features
        of a part.
    """
    widths = dictionary.config.widths
    ratios_2xF = np.full((2, len(part_F)), np.nan)
    for part, width in enumerate(widths):
        others = tuple(other for other, wide in enumerate(widths) if other != part and wide == width)
        private_X = np.flatnonzero(part_F == part)
        for start in range(0, len(private_X) if others else 0, _AT_ONCE):
            features_C = private_X[start : start + _AT_ONCE]
            ratios_2xF[:, features_C] = _measure_ratios(dictionary, features_C, (part, *others), read())
    return LatentScaling(*ratios_2xF)


def _measure_ratios(
    dictionary: Dictionary, features_C: np.ndarray, parts: tuple[int, ...], blocks: Iterable[Sequence[np.ndarray]]
) -> np.ndarray:
    """Return both ratios [2, C] of features that are private to the first of these parts; blocks add up in float64."""
    # Filled up, so that each number of features does not compile a program of its own.
    filled_K = np.pad(features_C, (0, -len(features_C) % 64), mode="edge")
    sums_2xPxK, square_K = np.zeros((2, len(parts), len(filled_K))), np.zeros(len(filled_K))
    for x_NxD, *_ in blocks:
        placed_BxD = by_filled_row(dictionary.mesh, x_NxD) if dictionary.mesh else x_NxD
        sums = _add_up(dictionary, placed_BxD, filled_K, np.int32(len(x_NxD)), parts, dictionary.mesh)
        of_block_2xPxK, of_block_K = map(np.asarray, sums)
        sums_2xPxK += of_block_2xPxK
        square_K += of_block_K
    rows = split(np.asarray(dictionary.W_dec_FxD[filled_K], np.float64), dictionary.config.widths)
    row_PxKxX = np.stack([rows[part] for part in parts])
    # The feature's own row at each part, without which the error is taken.
    sums_2xPxK[0] += square_K * np.einsum("pkx,kx->pk", row_PxKxX, row_PxKxX[0])
    own_2xK, others_2xK = sums_2xPxK[:, 0], sums_2xPxK[:, 1:].max(axis=1)
    return np.divide(others_2xK, own_2xK, out=np.full_like(own_2xK, np.nan), where=own_2xK > 0)[:, : len(features_C)]


@functools.partial(jax.jit, static_argnames=("parts", "mesh"))
def _add_up(
    dictionary: Dictionary,
    x_NxD: jax.Array,
    features_K: jax.Array,
    count: jax.Array,
    parts: tuple[int, ...],
    mesh: Mesh | None,
) -> tuple[jax.Array, jax.Array]:
    """Return sum f <d, y> [2, P, K] of the errors and the reconstructions of parts, and sum f^2 [K].

    Rows from ``count`` on fill up a block, and count nothing; features are split over the mesh's axis ``model``.
    """
    widths = dictionary.config.widths
    f_NxK = jnp.where(jnp.arange(len(x_NxD))[:, None] < count, dictionary.encode(x_NxD)[:, features_K], 0.0)
    if mesh:
        f_NxK = lax.with_sharding_constraint(f_NxK, fitting_sharding(mesh, f_NxK.shape, BY_DOCUMENT, "model"))
    values, rebuilt = split(x_NxD, widths), split(dictionary(x_NxD), widths)
    d_KxX = split(dictionary.W_dec_FxD[features_K], widths)[parts[0]]
    ys = jnp.stack([jnp.stack([values[part] - rebuilt[part], rebuilt[part]]) for part in parts], axis=1)
    along_2xPxNxK = jnp.einsum("spnx,kx->spnk", ys, d_KxX)
    return jnp.einsum("spnk,nk->spk", along_2xPxNxK, f_NxK), jnp.sum(jnp.square(f_NxK), axis=0)
