"""Features that a dictionary lacks, looked for in what it leaves of activations (``--train.widen``).

A token's error is a sum of features that the dictionary lacks. From the direction of an error, in which each of them
has a small part, the steps

    fires     the share ``_RATE`` of tokens whose errors e have the largest projections z = <w, e>
    w         sum of z e over these tokens, then of length 1

go to one of them: with every step more of the tokens that fire have it. That is the update of one nonnegative atom in
K-SVD (Aharon et al., 2006). A random direction is as far from one feature as from any other, and training takes it to
one only where tokens are many.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.dictionaries import Dictionary, rescale

_RATE = 0.0015  # share of tokens on which a feature that is looked for fires
_STEPS = 7
_ALIKE = 0.6  # cosine above which two directions are one feature
_LOOKED_FOR = 2  # starts for each feature that is wanted
_ROUNDS = 4  # each looks for what is left when the features found so far are taken away
_LEVEL = 16_384  # tokens from which the smallest projection of those that fire is estimated
_BLOCK = 256  # starts at once, at most


def widened(
    dictionary: Dictionary,
    n_features: int,
    acts_NxD: np.ndarray,
    seed: int = 0,
    *,
    replace: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Dictionary:
    """The same dictionary with features more, which it lacked; behind its own.

    Args:
      dictionary: an SAE for raw activations.
      n_features: how many it should have.
      acts_NxD: raw activations, the more the rarer features are: some hundred thousand.
      seed: of the tokens at which the search starts.
      replace: features that fire on none of these tokens give their places up to new ones first.
      say: is told what is found.

    Returns:
      A dictionary of at most ``n_features``: fewer if not as many different ones are found. New encoder columns and
      decoder rows have the mean length of the others, new thresholds stand where the feature takes its tokens. It is
      centred, whether the other is or not.
    """
    dictionary = rescale.centred(dictionary)  # features in errors read what is beside the decoder's bias
    own = dictionary.config.n_features
    errors_NxD, fires_F = _left_by(dictionary, acts_NxD)
    free = np.flatnonzero(~fires_F) if replace else np.zeros(0, int)
    decoder_FxD = np.asarray(dictionary.W_dec_FxD[...])
    missing = n_features - own + len(free)
    rows_CxD, level_C = missing_features(errors_NxD, missing, np.delete(decoder_FxD, free, axis=0), seed)
    say(f"found {len(rows_CxD):,} of {missing:,} features in errors" + f", {len(free):,} for dead ones" * replace)
    places = np.concatenate([free, np.arange(own, n_features)])[: len(rows_CxD)]
    length = float(np.linalg.norm(np.asarray(dictionary.W_enc_DxF[...]), axis=0).mean())
    new = dict(
        W_enc_DxF=length * rows_CxD.T,
        W_dec_FxD=float(np.linalg.norm(decoder_FxD, axis=1).mean()) * rows_CxD,
        b_enc_F=np.zeros(len(rows_CxD)),
        **{name: np.zeros(len(rows_CxD)) for name in dictionary.kind.vectors},
    )
    if "threshold_F" in new:
        new["threshold_F"] = length * level_C
    arrays = {name: np.asarray(array, np.float32) for name, array in dictionary.arrays.items()}
    wide = own + max(len(rows_CxD) - len(free), 0)
    for name, values in new.items():
        arrays[name] = _with(arrays[name], wide, places, values, axis=1 if name == "W_enc_DxF" else 0)
    config = dataclasses.replace(dictionary.config, n_features=wide, groups=())
    return Dictionary(config, dictionary.matmul_dtype, **{name: jnp.asarray(array) for name, array in arrays.items()})


def _with(array: np.ndarray, wide: int, places: np.ndarray, values: np.ndarray, axis: int) -> np.ndarray:
    """An array made ``wide`` along an axis, with values at places there."""
    pad = [(0, wide - array.shape[at] if at == axis else 0) for at in range(array.ndim)]
    made = np.moveaxis(np.pad(array, pad), axis, 0)
    made[places] = np.moveaxis(values, axis, 0)
    return np.moveaxis(made, 0, axis)


def missing_features(
    errors_NxD: np.ndarray, count: int, known_FxD: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Directions of features in errors, strongest first.

    Args:
      errors_NxD: what a dictionary leaves of tokens.
      count: how many directions are wanted.
      known_FxD: decoder rows of the dictionary; what is near to one of them is no new feature.
      seed: of the tokens at which the search starts, drawn in proportion to the square of their squared error.

    Returns:
      At most ``count`` directions [C, D] of length 1, no two of them alike, and for each the smallest projection of the
      tokens' errors on which it fires [C], above 0.
    """
    found, known = [], [known_FxD / np.maximum(np.linalg.norm(known_FxD, axis=1, keepdims=True), 1e-30)]
    random, missing = np.random.default_rng(seed), count
    block = min(1 << max(_LOOKED_FOR * count - 1, 0).bit_length(), _BLOCK)  # of all rounds: few features, little work
    for _ in range(_ROUNDS):
        size_N = np.square(np.einsum("nd,nd->n", errors_NxD, errors_NxD, dtype=np.float64))
        starts = min(_LOOKED_FOR * missing, int(np.count_nonzero(size_N)))
        if not starts:
            break
        starts_CxD = errors_NxD[random.choice(len(size_N), starts, replace=False, p=size_N / size_N.sum())]
        new = _found(jnp.asarray(errors_NxD), starts_CxD, np.concatenate(known), block)
        found.append([array[:missing] for array in new])
        errors_NxD = np.asarray(_without(jnp.asarray(errors_NxD), *map(jnp.asarray, found[-1])))
        known.append(found[-1][0])
        missing -= len(known[-1])
    nothing = np.zeros((0, errors_NxD.shape[1]), np.float32), np.zeros(0, np.float32)
    rows_CxD, level_C = (np.concatenate(parts) for parts in zip(nothing, *found, strict=True))
    return rows_CxD, level_C


def _found(
    errors_NxD: jax.Array, starts_CxD: np.ndarray, known_RxD: np.ndarray, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where starts lead to, strongest first, without what is alike; and the levels above which they fire."""
    blocks = [_converged(errors_NxD, starts_CxD[at : at + block], block) for at in range(0, len(starts_CxD), block)]
    rows_CxD, level_C, strength_C = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    new_C = (level_C > 0) & (np.abs(rows_CxD @ known_RxD.T).max(axis=1, initial=0.0) <= _ALIKE)
    taken: list[int] = []
    for place in np.argsort(-strength_C):
        if new_C[place] and np.max(rows_CxD[taken] @ rows_CxD[place], initial=0.0) <= _ALIKE:
            taken.append(int(place))
    return rows_CxD[taken], level_C[taken]


@jax.jit
def _without(errors_NxD: jax.Array, rows_CxD: jax.Array, level_C: jax.Array) -> jax.Array:
    """Errors less the directions that fire on them."""
    z_NxC = errors_NxD @ rows_CxD.T
    return errors_NxD - jnp.where(z_NxC >= level_C[None], z_NxC, 0.0) @ rows_CxD


def _converged(errors_NxD: jax.Array, starts_CxD: np.ndarray, block: int) -> tuple[np.ndarray, ...]:
    """The directions that starts go to, their smallest projections that fire, and mean squares of those that do."""
    w_XxD = np.zeros((block, starts_CxD.shape[1]), np.float32)  # one shape, so that one program serves all
    w_XxD[: len(starts_CxD)] = starts_CxD / np.linalg.norm(starts_CxD, axis=1, keepdims=True)
    return tuple(np.asarray(array)[: len(starts_CxD)] for array in _steps(errors_NxD, jnp.asarray(w_XxD)))


@jax.jit
def _steps(errors_NxD: jax.Array, w_CxD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    few = min(len(errors_NxD), _LEVEL)
    fire = max(round(_RATE * few), 1)

    def step(_: int, carried: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        z_NxC = errors_NxD @ carried[0].T
        level_C = jnp.maximum(lax.top_k(z_NxC[:few].T, fire)[0][:, -1], 0.0)
        active_NxC = jnp.where(z_NxC >= level_C[None], z_NxC, 0.0)
        w_CxD = active_NxC.T @ errors_NxD
        length_Cx1 = jnp.linalg.norm(w_CxD, axis=1, keepdims=True)
        return w_CxD / jnp.maximum(length_Cx1, 1e-30), level_C, jnp.mean(jnp.square(active_NxC), axis=0)

    nothing_C = jnp.zeros(len(w_CxD), w_CxD.dtype)
    return lax.fori_loop(0, _STEPS, step, (w_CxD, nothing_C, nothing_C))


def _left_by(dictionary: Dictionary, acts_NxD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a dictionary leaves of activations, and which of its features fire on any of them."""
    parts = np.array_split(acts_NxD, max(len(acts_NxD) // 4096, 1))
    left = [_left(dictionary, jnp.asarray(x_BxD, jnp.float32)) for x_BxD in parts]
    errors, fires = zip(*((np.asarray(error_BxD), np.asarray(fires_F)) for error_BxD, fires_F in left), strict=True)
    return np.concatenate(errors), np.any(fires, axis=0)


@jax.jit
def _left(dictionary: Dictionary, x_BxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    f_BxF = dictionary.encode(x_BxD)
    return x_BxD - dictionary.decode(f_BxF, x_BxD), jnp.any(dictionary.fires(f_BxF), axis=0)
