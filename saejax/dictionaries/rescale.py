"""Rewrite a dictionary in other parameters that compute the same: scales, lengths, biases and gates are moved.

All kinds are homogeneous: inputs, biases and thresholds times s give activations times s. So scales and lengths of
decoder rows can be folded in and out. Functions of arrays take those of JAX, or of numpy on the host; functions of
dictionaries compute on the host in float64 and round once to the arrays' own dtype.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from saejax.dictionaries.joined import row_lengths, split
from saejax.dictionaries.kinds.base import Arrays, Kind
from saejax.dictionaries.modules import Dictionary, placements
from saejax.errors import UserError
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import place_on


def fold_input_scaling(kind: Kind, arrays: Arrays, inputs: float, outputs: float) -> Arrays:
    """Return arrays for raw values from those for scaled ones: activations and outputs become 1 / ``outputs`` as large.

    Args:
      kind: the kind of dictionary.
      arrays: arrays of ``modules.parameter_table``, for inputs and outputs times these factors; the inverse takes
        1 / factor.
      inputs: factor of the inputs, above 0.
      outputs: factor of the outputs, above 0.
    """
    # Activations come out 1 / outputs as large, so that decoder rows keep their lengths.
    factors = dict.fromkeys(("W_enc_DxF", "W_skip_DxD"), inputs / outputs)
    factors |= dict.fromkeys(("W_dec_FxD", *kind.unscaled), 1.0)
    # Biases and thresholds are added to activations and outputs, or compared with them, and shrink as they do.
    return {name: array * factors[name] if name in factors else array / outputs for name, array in arrays.items()}


def scale_features(kind: Kind, arrays: Arrays, factor_F: Any) -> Arrays:
    """Return arrays whose feature activations are ``factor`` times as large, above 0, and which reconstruct the same.

    Exact for every kind whose choice of active features does not compare features with each other: for topk only
    where all factors are equal, or where the choice was already made between scaled activations.
    """
    of_activations = {"b_enc_F", *kind.vectors} - {*kind.unscaled}
    scaled = {name: array * factor_F for name, array in arrays.items() if name in of_activations}
    scaled |= dict(W_enc_DxF=arrays["W_enc_DxF"] * factor_F[None], W_dec_FxD=arrays["W_dec_FxD"] / factor_F[:, None])
    return arrays | {name: array.astype(arrays[name].dtype) for name, array in scaled.items()}


def unit_rows(kind: Kind, arrays: Arrays, widths: Sequence[int] = ()) -> Arrays:
    """Return JAX arrays with decoder rows of length 1: activations take over the length.

    Lengths are sums over the parts of a joined site, of these widths; (): one site.
    """
    W_dec_FxD = arrays["W_dec_FxD"]
    length_F = row_lengths(W_dec_FxD, widths) if widths else jnp.linalg.norm(W_dec_FxD, axis=-1)
    return scale_features(kind, arrays, jnp.where(length_F > 0, length_F, jnp.ones_like(length_F)))


def decoder_lengths(W_dec_FxD: np.ndarray, widths: Sequence[int] = ()) -> np.ndarray:
    """Return the length of every decoder row in float64; 1 where a row is zero, so that one can divide by it."""
    parts = split(W_dec_FxD, widths)
    length_F = np.sum([np.sqrt(np.einsum("fd,fd->f", part, part, dtype=np.float64)) for part in parts], axis=0)
    return np.where(length_F > 0, length_F, 1.0)


def unit_decoder(dictionary: Dictionary) -> Dictionary:
    """Return the dictionary with decoder rows of length 1: activations become the lengths of what features add.

    Raises:
      UserError: a topk dictionary with rows of different lengths, whose k largest would become others.
    """
    arrays = host_arrays(dictionary)
    length_F = decoder_lengths(arrays["W_dec_FxD"], dictionary.config.widths)
    if dictionary.kind.depends_on_decoder_norms:
        mean = float(length_F.mean())
        # Rows that were normalised in float32 differ by rounding.
        if np.abs(length_F - mean).max() > 1e-5 * mean:
            raise UserError(
                f"this {dictionary.config.kind} dictionary has decoder rows of different lengths: with rows of length "
                "1 it would choose other features, so load it with unit_norm=False"
            )
        # One length for all, so that the k largest stay the same to the last bit.
        length_F = np.full_like(length_F, mean)
    return _rebuild(dictionary, scale_features(dictionary.kind, arrays, length_F))


def scale_parts(dictionary: Dictionary, scales: Sequence[float]) -> Dictionary:
    """Return a crosscoder for parts that are multiplied with other ``scales``, with the same activations."""
    config = dictionary.config
    if not config.widths or tuple(scales) == config.scales:
        return dictionary
    factor_D = np.repeat(np.divide(scales, config.scales), config.widths)
    arrays = {name: array.astype(np.float64) for name, array in host_arrays(dictionary).items()}
    arrays["W_enc_DxF"] = arrays["W_enc_DxF"] / factor_D[:, None]
    arrays |= dict(W_dec_FxD=arrays["W_dec_FxD"] * factor_D[None], b_dec_D=arrays["b_dec_D"] * factor_D)
    return _rebuild(dictionary, arrays, scales=tuple(scales))


def as_jumprelu(dictionary: Dictionary) -> Dictionary:
    """Return the JumpReLU dictionary that a dictionary of another kind is at inference, if its kind is ``jumprelu``."""
    arrays = {name: array.astype(np.float64) for name, array in host_arrays(dictionary).items()}
    return _rebuild(dictionary, dictionary.kind.as_jumprelu(arrays), kind="jumprelu")


def centre(dictionary: Dictionary, wanted: bool = True) -> Dictionary:
    """Return the dictionary with the decoder's bias subtracted from the input, or not: the encoder's bias makes up."""
    if dictionary.config.centred == wanted:
        return dictionary
    arrays = {name: array.astype(np.float64) for name, array in host_arrays(dictionary).items()}
    shift_F = (1 if wanted else -1) * (arrays["b_dec_D"] @ arrays["W_enc_DxF"])
    return _rebuild(dictionary, dictionary.kind.move_bias(arrays, shift_F), centred=wanted)


def to_output_units(dictionary: Dictionary) -> Dictionary:
    """Return the dictionary with activations times the scale of each token, if it normalises tokens; else itself.

    What a feature adds is then its activation times its decoder row, which effects of features are computed from.
    """
    if dictionary.config.input_norm in ("", "center"):
        return dictionary
    config = dataclasses.replace(dictionary.config, output_units=True)
    return Dictionary(config, dictionary.matmul_dtype, **dictionary.arrays)


def drop_mean(dictionary: Dictionary) -> Dictionary:
    """Return the features without ``input_norm="center"``: (x - mean) W_enc is x times W_enc less its columns' means.

    Its outputs lack the mean of x, which features have no part in.
    """
    if dictionary.config.input_norm != "center":
        return dictionary
    arrays = {name: array.astype(np.float64) for name, array in host_arrays(dictionary).items()}
    arrays["W_enc_DxF"] = arrays["W_enc_DxF"] - arrays["W_enc_DxF"].mean(axis=0, keepdims=True)
    return _rebuild(dictionary, arrays, input_norm="")


def host_arrays(dictionary: Dictionary) -> Arrays:
    """Return the dictionary's arrays on the host."""
    return {name: to_host(array) for name, array in dictionary.arrays.items()}


def _rebuild(dictionary: Dictionary, arrays: Mapping[str, np.ndarray], **changes) -> Dictionary:
    """Return a dictionary of other arrays, rounded to its dtype, with some fields of its config changed.

    Its arrays are on the mesh of the dictionary, if that is on one.
    """
    config, mesh = dataclasses.replace(dictionary.config, **changes), dictionary.mesh
    dtype = dictionary.b_dec_D.dtype
    where: Mapping[str, Any] = placements(config, mesh) if mesh else {}
    placed = {
        name: place_on(array.astype(dtype), where[name]) if mesh else jnp.asarray(array.astype(dtype))
        for name, array in arrays.items()
    }
    return Dictionary(config, dictionary.matmul_dtype, **placed)
