"""Reconstruction transfer: a dictionary evaluated at another site, of another layer, seed or model.

*Directly* it reads and reconstructs the other site as it is. *Between affine maps* the other site's values are mapped
to the dictionary's own site, and its reconstruction is mapped back (Chen et al., 2025, arXiv 2506.06609, who learn both
maps together; here each is a ridge regression on half of the text, its ridge chosen by cross-validation there). Both
are compared with the same dictionary after a random rotation, which shares nothing with the site but its sparsity.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.dictionaries import Dictionary, DictionaryConfig, rescale
from saejax.evaluation.reconstruction import reconstruct
from saejax.matching.rows import rotate
from saejax.matching.transfer.results import FittedMap, Rebuilt, ReconstructionTransfer

_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # relative to the mean variance of the input's dimensions
_FOLDS = 3
ROWS_PER_DIMENSION = 4  # below this many rows per dimension a map is not to be trusted


class AffineMap(NamedTuple):
    """x -> x matrix + shift, and the ridge that it was fitted with, relative to the mean variance."""

    matrix_DxK: np.ndarray
    shift_K: np.ndarray
    ridge: float

    @classmethod
    def fit(cls, x_NxD: np.ndarray, y_NxK: np.ndarray) -> "AffineMap":
        """Return the ridge regression from x to y, its ridge chosen by 3-fold cross-validation."""
        from sklearn.linear_model import RidgeCV
        from sklearn.model_selection import KFold

        # In float64, because the normal equations square the condition number.
        x_NxD, y_NxK = x_NxD.astype(np.float64), y_NxK.astype(np.float64)
        # The constant keeps a site whose values never vary from dividing by zero.
        scale = np.square(x_NxD - x_NxD.mean(axis=0)[None]).sum() / x_NxD.shape[1] + 1e-12
        # Folds of consecutive rows, as these are of the same texts: folds are then of different texts.
        model = RidgeCV([ridge * scale for ridge in _RIDGES], scoring="neg_mean_squared_error", cv=KFold(_FOLDS)).fit(
            x_NxD, y_NxK
        )
        return cls(model.coef_.T, model.intercept_, float(model.alpha_ / scale))

    def apply(self, x_NxD: np.ndarray) -> np.ndarray:
        """Return the mapped rows, float64 [N, K]."""
        return x_NxD @ self.matrix_DxK + self.shift_K[None]

    def r2(self, x_NxD: np.ndarray, y_NxK: np.ndarray) -> float:
        """Return the share of y's variance that the map explains on some rows."""
        total = np.square(y_NxK - y_NxK.mean(0, dtype=np.float64)[None]).sum(dtype=np.float64)
        return 1 - float(np.square(y_NxK - self.apply(x_NxD)).sum() / max(total, 1e-30))


class DictionaryOnText(NamedTuple):
    """A dictionary and the values of its site [N, D], on the half of the text that fits maps and on the other."""

    dictionary: Dictionary
    fit_NxD: np.ndarray
    measure_NxD: np.ndarray


def insert_maps(dictionary: Dictionary, into: AffineMap, back: AffineMap, native: Dictionary) -> Dictionary:
    """Return the dictionary of another site that maps values in, encodes, decodes, and maps back.

    Args:
      dictionary: an SAE of D dimensions.
      into: map from the other site to the dictionary's.
      back: map from the dictionary's site to the other.
      native: dictionary of the other site, whose site and sink rule are used.
    """
    # Without centring, the maps can be multiplied into the weights: no third kind of dictionary is needed.
    plain = rescale.centre(dictionary, False)
    arrays = {name: np.asarray(array, np.float64) for name, array in plain.arrays.items()}
    moved = plain.kind.move_bias(arrays, into.shift_K @ arrays["W_enc_DxF"])
    moved |= dict(
        W_enc_DxF=into.matrix_DxK @ arrays["W_enc_DxF"],
        W_dec_FxD=arrays["W_dec_FxD"] @ back.matrix_DxK,
        b_dec_D=arrays["b_dec_D"] @ back.matrix_DxK + back.shift_K,
    )
    arrays_fp32 = {name: jnp.asarray(array, jnp.float32) for name, array in moved.items()}
    return Dictionary(_at_site(plain.config, native.config), plain.matmul_dtype, **arrays_fp32)


def evaluate_at_other_site(
    moved: DictionaryOnText, native: DictionaryOnText, mesh: Mesh, batch: int, seed: Sequence[int]
) -> ReconstructionTransfer:
    """Return the scores of a dictionary at another site, and the scores of the site's own dictionary.

    Args:
      moved: the dictionary and the values of its own site.
      native: the dictionary of the other site and its values, on the same tokens.
      mesh: the devices.
      batch: tokens in a batch.
      seed: seed of the rotation.
    """
    # The null goes through the same maps: they alone explain part of the variance.
    straight, rotated = rescale.centre(moved.dictionary), rotate(moved.dictionary, seed)
    (into, into_figures), (back, back_figures) = _fit_map(native, moved), _fit_map(moved, native)
    mapped = [insert_maps(version, into, back, native.dictionary) for version in (straight, rotated)]
    affine, affine_null = _evaluate(mapped, native, mesh, batch)
    (native_scores,) = _evaluate([native.dictionary], native, mesh, batch)
    direct, direct_null = None, None
    if into_figures.width == back_figures.width:
        config = _at_site(straight.config, native.dictionary.config)
        unchanged = [Dictionary(config, version.matmul_dtype, **version.arrays) for version in (straight, rotated)]
        direct, direct_null = _evaluate(unchanged, native, mesh, batch)
    return ReconstructionTransfer(native_scores, direct, direct_null, affine, affine_null, into_figures, back_figures)


def _fit_map(source: DictionaryOnText, target: DictionaryOnText) -> tuple[AffineMap, FittedMap]:
    """Return a map from the site of one dictionary to another's site, and its figures."""
    fitted, (rows, width) = AffineMap.fit(source.fit_NxD, target.fit_NxD), source.fit_NxD.shape
    r2 = fitted.r2(source.measure_NxD, target.measure_NxD)
    return fitted, FittedMap(source.dictionary.config.site, width, rows, r2, fitted.ridge)


def _at_site(config: DictionaryConfig, native: DictionaryConfig) -> DictionaryConfig:
    """Return the description of a dictionary at the site of another, with that one's sink rule."""
    return dataclasses.replace(config, d_in=native.d_in, site=native.site, target="", max_norm=native.max_norm)


def _evaluate(dictionaries: Sequence[Dictionary], native: DictionaryOnText, mesh: Mesh, batch: int) -> list[Rebuilt]:
    scores = reconstruct(dictionaries, [(native.measure_NxD,)], mesh, batch)
    return [Rebuilt(score.explained_variance, score.l0) for score in scores]
