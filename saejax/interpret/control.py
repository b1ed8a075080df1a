"""Controls of labels: random directions that fire as often as features, and a frozen-random dictionary.

Random directions are the bar that a label has to exceed. The frozen-random dictionary has the same size, but a random
encoder that is not trained; only its decoder is fitted (the *frozen encoder* of Korznikov et al., 2026, arXiv
2602.14111).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, cg

from saejax.activations.store import Store
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.dictionaries.input_norm import normalise
from saejax.dictionaries.kinds.topk import is_plain_topk
from saejax.interpret.firings import encode_tokens, used_rows

LEAST, MOST = 19, 1024  # random directions: one more exceeds all of 19 with probability 1/20
_ROWS = 32_768  # rows of the store that set thresholds
_FITTED, _COUNTED = 16_384, 2048  # rows that fit a decoder, and that match an L0
_RIDGE, _STEPS = 1e-3, 10  # relative to the mean of the Gram matrix's diagonal; steps of conjugate gradients
_CHUNK = 1024  # rows encoded at once


def random_directions(store: Store, dictionary: Dictionary, rate_F: np.ndarray, seed: int) -> Dictionary:
    """Return a dictionary of random directions, uniform on the sphere, with thresholds that set their firing rates.

    It has the dictionary's sites, and decoder rows, which tell what tokens a direction promotes.

    Args:
      store: activations of the dictionary's sites.
      dictionary: the dictionary that they are a control of.
      rate_F: its firing rates; the directions' rates are spread evenly over the ranks of those above 0.
      seed: seed of the directions.
    """
    # Rates are taken evenly from the dictionary's ranks, so that directions and features have the same distribution.
    # One for a dictionary that never fires, so that it has a page that says so. Of few live features rates return:
    # all of four directions are exceeded by every fifth one, which would have a label.
    live = np.sort(rate_F[rate_F > 0]) if rate_F.any() else np.zeros(1)
    count = min(MOST, max(len(live), LEAST)) if rate_F.any() else 1
    rate = live[np.linspace(0, len(live) - 1, count).round().astype(np.int64)]
    rows = spread(used_rows(store, "train", dictionary.site, dictionary.config.target), _ROWS)
    norm = dictionary.config.input_norm
    x_NxD = _normalised(store.read(dictionary.site, rows).astype(np.float32), norm)[0]
    W_enc_DxG = _directions(x_NxD.shape[1], count, seed)
    # Thresholds come from ranks, so that no distribution of projections has to be assumed.
    pre_GxN = np.sort((x_NxD @ W_enc_DxG).T, axis=1)
    above = np.clip(np.round(rate * len(rows)).astype(np.int64), 1, len(rows))
    threshold_G = pre_GxN[np.arange(count), np.maximum(len(rows) - above - 1, 0)]
    config = DictionaryConfig(
        kind="standard",
        site=dictionary.site,
        target=dictionary.config.target,
        d_in=x_NxD.shape[1],
        target_width=dictionary.config.target_width,
        n_features=count,
        centred=False,
        input_norm=norm,
    )
    # What an SAE's feature reads is what it writes, about; a transcoder's has nothing to do with it.
    rows_GxO = _directions(config.d_out, count, [seed, 1]).T if config.target else W_enc_DxG.T
    zeros = jnp.zeros(config.d_out)
    arrays = dict(W_enc_DxF=W_enc_DxG, W_dec_FxD=rows_GxO, b_enc_F=-threshold_G, b_dec_D=zeros)
    return Dictionary(config, **{name: jnp.asarray(array) for name, array in arrays.items()})


def frozen_random(store: Store, dictionary: Dictionary, seed: int) -> Dictionary:
    """Return a frozen-random dictionary of the size and sparsity of another one, at its sites.

    Encoder directions are uniform on the sphere and read the input minus its mean; where the dictionary normalises
    tokens, so does this one. A TopK kind keeps its k, and its sign; any other becomes a JumpReLU with one threshold for
    all features that gives the same mean L0. The decoder is fitted by ``fit_decoder``.

    Args:
      store: activations of the dictionary's sites.
      dictionary: the dictionary that it is a control of.
      seed: seed of the directions.
    """
    original = dictionary.config
    rows = spread(store.rows("train", *{original.site, original.target or original.site}), _FITTED)
    x_NxD = store.read(original.site, rows).astype(np.float32)
    y_NxO = store.read(original.target, rows).astype(np.float32) if original.target else x_NxD
    read_NxD, scale_Nx1, shift_Nx1 = _normalised(x_NxD, original.input_norm)
    # The norm is undone on what is decoded, so the decoder is fitted to what gives the target then.
    y_NxO = (y_NxO - shift_Nx1) / np.where(scale_Nx1 > 0, scale_Nx1, 1)
    W_enc_DxF, mean_D = _directions(original.d_in, original.n_features, seed), read_NxD.mean(axis=0)
    names = ("site", "target", "d_in", "target_width", "n_features", "input_norm")
    shape: dict[str, Any] = dict(centred=False, **{name: getattr(original, name) for name in names})
    # The mean is subtracted by way of the bias: no centring that the original has not is needed.
    b_enc_F = -mean_D @ W_enc_DxF
    # Encoding reads no decoder; it is fitted below.
    W_dec_FxO = np.zeros((original.n_features, original.d_out))
    arrays = dict(W_enc_DxF=W_enc_DxF, b_enc_F=b_enc_F, W_dec_FxD=W_dec_FxO, b_dec_D=y_NxO.mean(axis=0))
    if is_plain_topk(dictionary.kind):
        config = DictionaryConfig(kind="topk", k=original.k, signed=original.signed, **shape)
    else:
        counted = slice(None, None, -(-len(rows) // _COUNTED))
        fires = _encode(dictionary, x_NxD[counted]).count_nonzero()
        pre = (read_NxD[counted] @ W_enc_DxF + b_enc_F).reshape(-1)
        at = min(max(len(pre) - fires, 0), len(pre) - 1)
        # Not below 0: a JumpReLU with a negative threshold would pass negative activations.
        threshold = max(float(np.partition(pre, at)[at]), 0.0)
        config = DictionaryConfig(kind="jumprelu", **shape)
        arrays |= dict(threshold_F=np.full(original.n_features, threshold, np.float32))
    arrays = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    f_NxF = _encode(_placed_like(dictionary, config, arrays), x_NxD)
    arrays |= dict(W_dec_FxD=fit_decoder(f_NxF, y_NxO - arrays["b_dec_D"]))
    return _placed_like(dictionary, config, arrays)


def _placed_like(other: Dictionary, config: DictionaryConfig, arrays: dict[str, Any]) -> Dictionary:
    """Return a dictionary of these arrays on the devices of another one."""
    dictionary = Dictionary(config, **arrays)
    return dictionary.on_mesh(other.mesh) if other.mesh else jax.tree.map(jnp.asarray, dictionary)


def fit_decoder(f_NxF: sparse.csr_array, y_NxD: np.ndarray) -> np.ndarray:
    """Return decoder rows [F, D] that reconstruct ``y_NxD`` by ridge regression; 0 for a feature that never fires.

    Conjugate gradients on the normal equations, preconditioned by their diagonal (Hestenes and Stiefel, 1952),
    ``_STEPS`` steps for each output: products of sparse matrices, so that the number of features is not limited.
    """
    diagonal_F = np.asarray(f_NxF.power(2).sum(axis=0)).reshape(-1)
    # Relative to a typical feature's Gram diagonal: frequent features hardly notice it, rare ones are damped.
    ridge = np.float32(_RIDGE * diagonal_F.mean())
    scale_F, f_FxN = (1 / np.maximum(diagonal_F + ridge, 1e-30)).astype(np.float32), f_NxF.T.tocsr()
    gram = LinearOperator((len(scale_F),) * 2, lambda v_F: f_FxN @ (f_NxF @ v_F) + ridge * v_F, dtype=np.float32)
    options = dict(maxiter=_STEPS, rtol=1e-6, M=sparse.diags_array(scale_F))
    right_DxF = (f_FxN @ y_NxD.astype(np.float32)).T
    return np.stack([cg(gram, right_F, **options)[0] for right_F in right_DxF], axis=1)


def _encode(dictionary: Dictionary, x_NxD: np.ndarray) -> sparse.csr_array:
    """Return the activations of a store's rows; attention sinks are not among these, so no norm excludes any."""
    largest = float(np.finfo(np.float32).max)
    return encode_tokens(dictionary.with_sink_norms(lambda site: largest, replace=True), x_NxD, _CHUNK)[0]


def _normalised(x_NxD: np.ndarray, norm: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what a dictionary with this norm reads, and each token's scale and shift; see ``normalise``."""
    if not norm:
        return x_NxD, np.ones_like(x_NxD[:, :1]), np.zeros_like(x_NxD[:, :1])
    read_NxD, scale_Nx1, shift_Nx1 = map(np.asarray, normalise(jnp.asarray(x_NxD), norm))
    return read_NxD, scale_Nx1, shift_Nx1


def _directions(width: int, count: int, seed: int | list[int]) -> np.ndarray:
    """Return unit columns, uniform on the sphere, [D, F]."""
    W_enc_DxF = np.random.default_rng(seed).standard_normal((width, count), np.float32)
    return W_enc_DxF / np.linalg.norm(W_enc_DxF, axis=0)


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """Return at most ``most`` of the rows, evenly spaced."""
    return rows[:: -(-len(rows) // most)]
