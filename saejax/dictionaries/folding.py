"""The same function in other parameters: lengths, biases and gates moved from one array of a dictionary to another.

Computed on the host in float64 and rounded once to the arrays' own dtype.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries.modules import Dictionary
from saejax.errors import UserError

Arrays = dict[str, np.ndarray]


def scale_features(arrays: Mapping[str, np.ndarray], factor_F: np.ndarray) -> Arrays:
    """Arrays whose feature activations are ``factor_F`` times as large, and which reconstruct the same.

    Exact for every kind whose choice of active features does not compare features with each other: for topk only
    where all factors are equal, or where the choice was already made between scaled activations.

    Args:
      arrays: of ``modules.parameter_table``.
      factor_F: above 0.
    """
    factor_F = np.asarray(factor_F, np.float64)
    scaled = {name: np.asarray(array) for name, array in arrays.items()}
    scaled["W_enc_DxF"] = _multiply(scaled["W_enc_DxF"], factor_F[None])
    scaled["W_dec_FxD"] = _multiply(scaled["W_dec_FxD"], 1 / factor_F[:, None])
    for name in ("b_enc_F", "b_mag_F", "threshold_F"):
        if name in scaled:
            scaled[name] = _multiply(scaled[name], factor_F)
    return scaled


def decoder_lengths(W_dec_FxD: np.ndarray) -> np.ndarray:
    """Length of every decoder row in float64; 1 where a row is zero, so that one can divide by it."""
    length_F = np.sqrt(np.einsum("fd,fd->f", W_dec_FxD, W_dec_FxD, dtype=np.float64))
    return np.where(length_F > 0, length_F, 1.0)


def unit_decoder(dictionary: Dictionary) -> Dictionary:
    """The same dictionary with decoder rows of length 1: activations become the lengths of what features add.

    Raises:
      UserError: a topk dictionary with rows of different lengths, whose k largest would become others.
    """
    arrays = _host(dictionary)
    length_F = decoder_lengths(arrays["W_dec_FxD"])
    if dictionary.config.kind == "topk":
        mean = float(length_F.mean())
        if np.abs(length_F - mean).max() > 1e-5 * mean:
            raise UserError(
                "this topk dictionary has decoder rows of different lengths: with rows of length 1 it would choose "
                "other features, so load it with unit_norm=False"
            )
        length_F = np.full_like(length_F, mean)
    return _made(dictionary, scale_features(arrays, length_F))


def as_jumprelu(dictionary: Dictionary) -> Dictionary:
    """A gated dictionary as the JumpReLU dictionary that it is (Rajamanoharan et al., 2024).

    Gate and magnitude share the projection p, so the gate p + b_gate > 0 is a threshold on the magnitude:

        f = max(m, 0) where m = exp(r) p + b_mag > b_mag - exp(r) b_gate
    """
    arrays = {name: array.astype(np.float64) for name, array in _host(dictionary).items()}
    scale_F, b_gate_F, b_mag_F = np.exp(arrays.pop("r_mag_F")), arrays["b_enc_F"], arrays.pop("b_mag_F")
    arrays |= dict(
        W_enc_DxF=arrays["W_enc_DxF"] * scale_F[None],
        b_enc_F=b_mag_F,
        threshold_F=np.maximum(b_mag_F - scale_F * b_gate_F, 0.0),
    )
    return _made(dictionary, arrays, kind="jumprelu")


def uncentred(dictionary: Dictionary) -> Dictionary:
    """The same dictionary without subtracting the decoder's bias from the input: the encoder's bias does it."""
    if not dictionary.config.centred:
        return dictionary
    arrays = {name: array.astype(np.float64) for name, array in _host(dictionary).items()}
    shift_F = arrays["b_dec_D"] @ arrays["W_enc_DxF"]
    arrays["b_enc_F"] = arrays["b_enc_F"] - shift_F
    if "b_mag_F" in arrays:
        arrays["b_mag_F"] = arrays["b_mag_F"] - np.exp(arrays["r_mag_F"]) * shift_F
    return _made(dictionary, arrays, centred=False)


def _multiply(array: np.ndarray, factor: np.ndarray) -> np.ndarray:
    return (array * factor).astype(array.dtype)


def _host(dictionary: Dictionary) -> Arrays:
    return {name: np.asarray(array) for name, array in dictionary.arrays.items()}


def _made(dictionary: Dictionary, arrays: Mapping[str, np.ndarray], **changes) -> Dictionary:
    config = dataclasses.replace(dictionary.config, **changes)
    dtype = dictionary.b_dec_D.dtype
    placed: dict[str, jax.Array] = {name: jnp.asarray(array.astype(dtype)) for name, array in arrays.items()}
    return Dictionary(config, dictionary.operands, **placed)
