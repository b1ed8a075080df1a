"""Features that a dictionary lacks: found in its errors (``--train.widen``), and kept apart (``--train.alignment``).

A token's error is a sum of features that the dictionary lacks. From the direction w of one error, these steps converge
to one of them (the update of one nonnegative atom in K-SVD; Aharon et al., 2006): active are the share ``_RATE`` of
tokens whose errors e have the largest projections z = <w, e>; w becomes the sum of z e over these, normalised.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.dictionaries import Dictionary, rescale

_RATE, _STEPS, _SAME = 0.0015, 7, 0.6  # share of active tokens; steps of a search; cosine of directions that are one
_STARTS, _ROUNDS = 2, 4  # starts per feature wanted; rounds, each on the errors that features found so far leave


def alignment(W_enc_DxF: jax.Array, W_dec_FxD: jax.Array) -> jax.Array:
    """Return the sum over features of 1 - cos(column of ``W_enc_DxF``, row of ``W_dec_FxD``); cos(0, x) is 0.

    A feature's direction lies between its decoder row (drawn to what fires with it) and encoder column (away from it).
    """
    dots_F = jnp.sum(W_enc_DxF.T * W_dec_FxD, axis=-1)
    squares_F = jnp.sum(jnp.square(W_enc_DxF.T), axis=-1) * jnp.sum(jnp.square(W_dec_FxD), axis=-1)
    return jnp.sum(1 - dots_F * lax.rsqrt(jnp.maximum(squares_F, 1e-24)))  # a root has no gradient at 0


def widen(sae: Dictionary, total: int, acts_NxD: np.ndarray, seed: int, replace: bool, say: Callable) -> Dictionary:
    """Return an SAE with at most ``total`` features, new ones found in its errors on raw activations; it is centred.

    Args:
      sae: the SAE; its features keep their indices.
      total: number of features wanted; there are fewer if not as many distinct ones are found.
      acts_NxD: some hundred thousand raw activations.
      seed: seed of the tokens at which the search starts.
      replace: first overwrite features that fire on none of these tokens.
      say: takes a line on what was found.
    """
    sae = rescale.centre(sae)  # features in errors read the input less the decoder's bias
    parts = np.array_split(acts_NxD.astype(np.float32), max(len(acts_NxD) // 4096, 1))
    blocks = [_errors(sae, x_BxD) for x_BxD in parts]
    errors_NxD, fires_F = np.concatenate([error for error, _ in blocks]), np.any([fires for _, fires in blocks], axis=0)
    count, decoder_FxD = sae.config.n_features, np.asarray(sae.W_dec_FxD[...])
    dead = np.flatnonzero(~fires_F & replace)
    wanted = total - count + len(dead)
    rows_CxD, level_C = missing_features(errors_NxD, wanted, np.delete(decoder_FxD, dead, axis=0), seed)
    say(f"found {len(rows_CxD):,} of {wanted:,} features in errors" + f", {len(dead):,} for dead ones" * replace)
    index_C = np.concatenate([dead, np.arange(count, total)])[: len(rows_CxD)]
    added = max(len(rows_CxD) - len(dead), 0)
    length = np.linalg.norm(np.asarray(sae.W_enc_DxF[...]), axis=0).mean()
    row_length = np.linalg.norm(decoder_FxD, axis=1).mean()
    new = dict.fromkeys(("b_enc_F", *sae.kind.vectors), 0.0)
    new |= dict(W_enc_DxF=length * rows_CxD.T, W_dec_FxD=row_length * rows_CxD)
    new |= dict(threshold_F=length * level_C) if "threshold_F" in new else {}
    arrays = {name: np.array(array, np.float32) for name, array in sae.arrays.items()}
    for name, values in new.items():
        axis = arrays[name].ndim - 1 if name.endswith("F") else 0
        arrays[name] = np.pad(arrays[name], [(0, added if i == axis else 0) for i in range(arrays[name].ndim)])
        arrays[name][(slice(None), index_C) if axis else index_C] = values
    config = dataclasses.replace(sae.config, n_features=count + added, groups=())
    return Dictionary(config, sae.matmul_dtype, **{name: jnp.asarray(array) for name, array in arrays.items()})


def missing_features(errors_NxD: np.ndarray, count: int, rows_FxD: np.ndarray, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Return unit directions [C, D] of features in errors, strongest first, and the projections above which they fire.

    At most ``count`` of them, no two alike, and none like one of ``rows_FxD``. Searches start at tokens drawn, by
    ``seed``, in proportion to the square of their squared error.
    """
    known_FxD = rows_FxD / np.maximum(np.linalg.norm(rows_FxD, axis=1, keepdims=True), 1e-30)
    directions, levels = [known_FxD, np.zeros((0, known_FxD.shape[1]), np.float32)], [np.zeros(0, np.float32)]
    rng = np.random.default_rng(seed)
    block = min(1 << max(_STARTS * count - 1, 0).bit_length(), 256)  # one shape, so that one program serves all starts
    for _ in range(_ROUNDS):
        size_N = np.square(np.einsum("nd,nd->n", errors_NxD, errors_NxD, dtype=np.float64))
        missing = count - sum(map(len, levels))
        if not (starts := min(_STARTS * missing, int(np.count_nonzero(size_N)))):
            break
        # Tokens of large error lack most: a start there soon meets a feature that is missing.
        tokens = rng.choice(len(size_N), starts, replace=False, p=size_N / size_N.sum())
        w = errors_NxD[np.resize(tokens, starts + -starts % block)].astype(np.float32)
        new_rows = [_search(jnp.asarray(errors_NxD), part) for part in np.split(w, len(w) // block)]
        rows, level, strength = (np.concatenate(parts)[:starts] for parts in zip(*new_rows, strict=True))
        is_new = (level > 0) & (np.abs(rows @ np.concatenate(directions).T).max(axis=1, initial=0.0) <= _SAME)
        taken: list[int] = []
        for i in np.argsort(-strength):
            if len(taken) < missing and is_new[i] and np.max(rows[taken] @ rows[i], initial=0.0) <= _SAME:
                taken.append(int(i))
        directions.append(rows[taken])
        levels.append(level[taken])
        z = errors_NxD @ directions[-1].T
        # The next round searches in what the features of this one leave.
        errors_NxD = errors_NxD - np.where(z >= levels[-1], z, 0.0).astype(np.float32) @ directions[-1]
    return np.concatenate(directions[1:]), np.concatenate(levels)


@jax.jit
def _search(errors_NxD: jax.Array, w_CxD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the directions that starts converge to, their smallest active projections, and mean squares of those."""
    w_CxD /= jnp.linalg.norm(w_CxD, axis=1, keepdims=True)
    sampled = min(len(errors_NxD), 16_384)  # tokens from which the smallest active projection is estimated

    def step(_: int, carried: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        z_NxC = errors_NxD @ carried[0].T
        largest_CxK = lax.top_k(z_NxC[:sampled].T, max(round(_RATE * sampled), 1))[0]
        level_C = jnp.maximum(largest_CxK.min(axis=1), 0.0)  # not by a slice, of which XLA makes a sort of all values
        active_NxC = jnp.where(z_NxC >= level_C[None], z_NxC, 0.0)
        w_CxD = active_NxC.T @ errors_NxD
        length_Cx1 = jnp.linalg.norm(w_CxD, axis=1, keepdims=True)
        return w_CxD / jnp.maximum(length_Cx1, 1e-30), level_C, jnp.mean(jnp.square(active_NxC), axis=0)

    return lax.fori_loop(0, _STEPS, step, (w_CxD, *jnp.zeros((2, len(w_CxD)), w_CxD.dtype)))


@jax.jit
def _errors(dictionary: Dictionary, x_BxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    f_BxF = dictionary.encode(x_BxD)
    return x_BxD - dictionary.decode(f_BxF, x_BxD), jnp.any(dictionary.fires(f_BxF), axis=0)
