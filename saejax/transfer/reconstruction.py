"""A dictionary in the place of another: at another layer, of another seed, in another model.

*Directly* it reads and rebuilds the other one's site as it is. *Between affine maps* the site's values are first mapped
to those that the dictionary knows, and its reconstruction is mapped back (Chen et al., 2025, arXiv 2506.06609, who
learn both maps together; here each is fitted by least squares on half of the text, and judged on the other). Beside
both stands the same dictionary turned by a random rotation, which shares nothing with the site but its sparsity; what
it explains between maps is what their ranks and means explain.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.dictionaries import Dictionary, rescale
from saejax.evaluation.reconstruction import reconstruct
from saejax.transfer.compared import rotated
from saejax.transfer.results import Rebuilt, ReconstructionTransfer

_RIDGE = 1e-3  # of the mean variance of the dimensions that are mapped
Losses = Callable[[Sequence[Dictionary]], list[float | None]]  # cross-entropy recovered by each, at the place at hand


class AffineMap(NamedTuple):
    """x -> x matrix + shift."""

    matrix_DxK: np.ndarray
    shift_K: np.ndarray

    @classmethod
    def fitted(cls, x_NxD: np.ndarray, y_NxK: np.ndarray) -> "AffineMap":
        """The map with the least squared error from x to y, a little regularised, so that few rows do."""
        mean_D, mean_K = x_NxD.mean(0, dtype=np.float64), y_NxK.mean(0, dtype=np.float64)
        x_NxD, y_NxK = x_NxD - mean_D[None], y_NxK - mean_K[None]
        gram_DxD = x_NxD.T @ x_NxD
        gram_DxD += np.eye(len(gram_DxD)) * (_RIDGE * np.trace(gram_DxD) / len(gram_DxD) + 1e-12)
        matrix_DxK = np.linalg.solve(gram_DxD, x_NxD.T @ y_NxK)
        return cls(matrix_DxK, mean_K - mean_D @ matrix_DxK)


class DictionaryOnText(NamedTuple):
    """A dictionary's site on shared text: values [N, D] on the half that fits maps, and on that which judges."""

    dictionary: Dictionary
    fit_NxD: np.ndarray
    judge_NxD: np.ndarray


def between(dictionary: Dictionary, into: AffineMap, back: AffineMap, there: Dictionary) -> Dictionary:
    """The dictionary of another place that maps values in, encodes, decodes, and maps back.

    Args:
      dictionary: an SAE of D dimensions.
      into: from the other place to that of the dictionary.
      back: from the dictionary's place to the other.
      there: the dictionary of the other place, whose site and rule of sinks are taken over.
    """
    own = rescale.uncentred(dictionary)
    arrays = {name: np.asarray(array, np.float64) for name, array in own.arrays.items()}
    moved = own.kind.move_bias(arrays, into.shift_K @ arrays["W_enc_DxF"])
    moved |= dict(
        W_enc_DxF=into.matrix_DxK @ arrays["W_enc_DxF"],
        W_dec_FxD=arrays["W_dec_FxD"] @ back.matrix_DxK,
        b_dec_D=arrays["b_dec_D"] @ back.matrix_DxK + back.shift_K,
    )
    config = dataclasses.replace(
        own.config, d_in=len(back.shift_K), site=there.config.site, target="", max_norm=there.config.max_norm
    )
    return Dictionary(
        config, own.matmul_dtype, **{name: jnp.asarray(array, jnp.float32) for name, array in moved.items()}
    )


def at_home(place: DictionaryOnText, mesh: Mesh, batch: int, losses: Losses | None) -> Rebuilt:
    """What a dictionary makes of its own site."""
    return _scores([place.dictionary], place, mesh, batch, losses)[0]


def onto(
    moved: DictionaryOnText,
    place: DictionaryOnText,
    own: Rebuilt,
    mesh: Mesh,
    batch: int,
    seed: Sequence[int],
    losses: Losses | None,
) -> ReconstructionTransfer:
    """A dictionary in the place of another.

    Args:
      moved: it, and the values that it knows; token by token the same text as those of
      place: where it is put.
      own: what the dictionary that is there makes of it.
      mesh: the devices; ``batch``: tokens encoded at a time.
      seed: of the rotation.
      losses: measures cross-entropy recovered at the place; None: it is not wanted.
    """
    straight, turned = rescale.centred(moved.dictionary), rotated(moved.dictionary, seed)
    into, back = (AffineMap.fitted(*pair) for pair in ((place.fit_NxD, moved.fit_NxD), (moved.fit_NxD, place.fit_NxD)))
    mapped = [between(one, into, back, place.dictionary) for one in (straight, turned)]
    affine, affine_null = _scores(mapped, place, mesh, batch, losses)
    if moved.fit_NxD.shape[1] != place.fit_NxD.shape[1]:
        return ReconstructionTransfer(own, None, None, affine, affine_null)
    as_they_are = [moved_to(one, place.dictionary) for one in (straight, turned)]
    direct, direct_null = _scores(as_they_are, place, mesh, batch, losses)
    return ReconstructionTransfer(own, direct, direct_null, affine, affine_null)


def moved_to(dictionary: Dictionary, there: Dictionary) -> Dictionary:
    """A dictionary as it is at the site of another, whose rule of sinks it takes over."""
    config = dataclasses.replace(dictionary.config, site=there.config.site, target="", max_norm=there.config.max_norm)
    return Dictionary(config, dictionary.matmul_dtype, **dictionary.arrays)


def _scores(
    dictionaries: Sequence[Dictionary], place: DictionaryOnText, mesh: Mesh, batch: int, losses: Losses | None
) -> list[Rebuilt]:
    scores = reconstruct(dictionaries, [(place.judge_NxD,)], mesh, batch)
    recovered = losses(dictionaries) if losses else [None] * len(scores)
    return [Rebuilt(one.explained_variance, one.l0, ce) for one, ce in zip(scores, recovered, strict=True)]
