"""The controls of labels: random directions that fire as often as features do, and a frozen-random dictionary.

The first are the bar that a label has to beat. The second is a whole dictionary of the same size in which nothing was
learnt of where features fire, the *frozen encoder* of Korznikov et al. (2026, arXiv 2602.14111): its directions are
drawn and stay, and only what they write is fitted.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from saejax.activations.store import Store
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.dictionaries.kinds.topk import is_plain_topk

MOST = 1024  # directions
_ROWS = 32_768  # of the store, from which thresholds are taken
_FITTED, _COUNTED = 16_384, 2048  # rows to which a decoder is fitted, and by which an L0 is matched
_RIDGE, _STEPS = 1e-3, 10  # share of the mean of the Gram matrix's diagonal, and steps of conjugate gradients
_CHUNK = 1024  # rows that are encoded at once


def random_directions(store: Store, dictionary: Dictionary, rate_F: np.ndarray, seed: int) -> Dictionary:
    """A dictionary of random directions, uniform on the sphere, each with a threshold that gives it a firing rate.

    Args:
      store: activations of the dictionary's site.
      dictionary: whose features it is compared with.
      rate_F: how often these fire; the directions' rates are spread evenly over the ranks of those above 0.
      seed: of the directions.
    """
    live = np.sort(rate_F[rate_F > 0])
    count = min(MOST, len(live))
    rate = live[np.linspace(0, len(live) - 1, count).round().astype(np.int64)]
    rows = spread(store.rows("train", dictionary.site), _ROWS)
    x_NxD = store.read(dictionary.site, rows).astype(np.float32)
    W_enc_DxG = _directions(x_NxD.shape[1], count, seed)
    pre_GxN = np.sort((x_NxD @ W_enc_DxG).T, axis=1)
    above = np.clip(np.round(rate * len(rows)).astype(np.int64), 1, len(rows))
    threshold_G = pre_GxN[np.arange(count), np.maximum(len(rows) - above - 1, 0)]
    config = DictionaryConfig(
        kind="standard", site=dictionary.site, d_in=x_NxD.shape[1], n_features=count, centred=False
    )
    zeros = jnp.zeros(x_NxD.shape[1])
    arrays = dict(W_enc_DxF=W_enc_DxG, W_dec_FxD=W_enc_DxG.T, b_enc_F=-threshold_G, b_dec_D=zeros)
    return Dictionary(config, **{name: jnp.asarray(array) for name, array in arrays.items()})


def frozen_random(store: Store, dictionary: Dictionary, seed: int) -> Dictionary:
    """A frozen-random dictionary as large and as sparse as another one, at its sites.

    Directions of the encoder are uniform on the sphere, of the input less its mean. A kind that keeps k of a token's
    activations keeps as many; in place of any other stands one threshold for all features (a JumpReLU), with which as
    many fire on a token as do of the dictionary, on the mean. The decoder is fitted by ``fitted_decoder``.

    Args:
      store: activations of the dictionary's sites.
      dictionary: which it is like.
      seed: of the directions.
    """
    own = dictionary.config
    rows = spread(store.rows("train", *{own.site, own.target or own.site}), _FITTED)
    x_NxD = store.read(own.site, rows).astype(np.float32)
    y_NxD = store.read(own.target, rows).astype(np.float32) if own.target else x_NxD
    W_enc_DxF, mean_D = _directions(own.d_in, own.n_features, seed), x_NxD.mean(axis=0)
    shape: dict[str, Any] = dict(
        site=own.site, target=own.target, d_in=own.d_in, n_features=own.n_features, centred=False
    )
    b_enc_F = -mean_D @ W_enc_DxF
    arrays = dict(W_enc_DxF=W_enc_DxF, b_enc_F=b_enc_F, W_dec_FxD=W_enc_DxF.T, b_dec_D=y_NxD.mean(axis=0))
    if is_plain_topk(dictionary.kind):
        config = DictionaryConfig(kind="topk", k=own.k, **shape)
    else:
        counted = slice(None, None, -(-len(rows) // _COUNTED))
        fires = sum(map(sparse.csr_array.count_nonzero, _codes(dictionary, x_NxD[counted])))
        pre = (x_NxD[counted] @ W_enc_DxF + b_enc_F).reshape(-1)
        at = min(max(len(pre) - fires, 0), len(pre) - 1)
        threshold = max(float(np.partition(pre, at)[at]), 0.0)
        config = DictionaryConfig(kind="jumprelu", **shape)
        arrays |= dict(threshold_F=np.full(own.n_features, threshold, np.float32))
    arrays = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    f_NxF = sparse.vstack(list(_codes(Dictionary(config, **arrays), x_NxD)), format="csr")
    arrays |= dict(W_dec_FxD=jnp.asarray(fitted_decoder(f_NxF, y_NxD - np.asarray(arrays["b_dec_D"]))))
    return Dictionary(config, **arrays)


def fitted_decoder(f_NxF: sparse.csr_array, y_NxD: np.ndarray) -> np.ndarray:
    """Decoder rows [F, D] that rebuild ``y_NxD`` from activations by ridge regression; 0 where a feature never fires.

    Conjugate gradients on the normal equations, scaled by their diagonal (Hestenes and Stiefel, 1952), one by one for
    every output, ``_STEPS`` steps: each takes two sparse products, so that any number of features will do.
    """
    diagonal_F = np.asarray(f_NxF.power(2).sum(axis=0)).reshape(-1)
    ridge = np.float32(_RIDGE * diagonal_F.mean())
    scale_Fx1 = (1 / np.maximum(diagonal_F + ridge, 1e-30)).astype(np.float32)[:, None]
    transposed_FxN = f_NxF.T.tocsr()
    left_FxD = transposed_FxN @ y_NxD.astype(np.float32)
    W_FxD, step_FxD = np.zeros_like(left_FxD), scale_Fx1 * left_FxD
    size_D = np.sum(left_FxD * step_FxD, axis=0)
    for _ in range(_STEPS):
        turned_FxD = transposed_FxN @ (f_NxF @ step_FxD) + ridge * step_FxD
        length_D = size_D / np.maximum(np.sum(step_FxD * turned_FxD, axis=0), 1e-30)
        W_FxD += length_D * step_FxD
        left_FxD -= length_D * turned_FxD
        scaled_FxD = scale_Fx1 * left_FxD
        size_D, before_D = np.sum(left_FxD * scaled_FxD, axis=0), size_D
        step_FxD = scaled_FxD + size_D / np.maximum(before_D, 1e-30) * step_FxD
    return W_FxD


def _codes(dictionary: Dictionary, x_NxD: np.ndarray) -> Iterator[sparse.csr_array]:
    """The activations of rows, chunk by chunk, in compressed rows."""
    for start in range(0, len(x_NxD), _CHUNK):
        rows = x_NxD[start : start + _CHUNK]
        f_BxF = _encode(dictionary, np.pad(rows, ((0, _CHUNK - len(rows)), (0, 0))))
        yield sparse.csr_array(np.asarray(f_BxF)[: len(rows)])


@jax.jit
def _encode(dictionary: Dictionary, x_BxD: jax.Array) -> jax.Array:
    """Activations, 0 where a feature does not fire."""
    f_BxF = dictionary.encode(x_BxD)
    return jnp.where(dictionary.kind.fires(f_BxF, dictionary.numbers), f_BxF, 0.0)


def _directions(width: int, count: int, seed: int) -> np.ndarray:
    """Unit columns [D, F], uniform on the sphere."""
    W_enc_DxF = np.random.default_rng(seed).standard_normal((width, count), np.float32)
    return W_enc_DxF / np.linalg.norm(W_enc_DxF, axis=0)


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many rows, evenly spread."""
    return rows[:: -(-len(rows) // most)]
