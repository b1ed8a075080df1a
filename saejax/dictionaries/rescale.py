"""Rewrite a dictionary in other parameters that compute the same: scales, lengths, biases and gates are moved.

All kinds are homogeneous: inputs, biases and thresholds times s give activations times s. So scales and lengths of
decoder rows can be folded in and out. Functions of arrays take arrays of JAX, or of numpy on the host; functions of
dictionaries compute on the host in float64, some features at a time, and round once to the arrays' own dtype.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries.joined import row_lengths, split
from saejax.dictionaries.kinds.base import Arrays, Kind
from saejax.dictionaries.modules import Dictionary, DictionaryConfig, parameter_table, placements
from saejax.errors import UserError
from saejax.parallel.collectives import local_parts, sum_over_processes, to_host

_AT_ONCE = 2**13  # features that are computed at a time


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
    length_F = _lengths(W_dec_FxD, widths)
    return np.where(length_F > 0, length_F, 1.0)


def all_decoder_lengths(dictionary: Dictionary) -> np.ndarray:
    """Return the length of every decoder row in float64, 0 of one that is zero; also those of other processes."""
    W_dec_FxD = dictionary.W_dec_FxD[...]
    length_F = np.zeros(len(W_dec_FxD))
    for index, part_XxD in local_parts(W_dec_FxD):
        length_F[index[0]] = _lengths(part_XxD, dictionary.config.widths)
    if not isinstance(W_dec_FxD, jax.Array) or W_dec_FxD.is_fully_addressable:
        return length_F
    # Every feature is 0 in all processes but one, so that the sum of its halves is its value to the last bit.
    return sum_over_processes(length_F.view(np.uint32)).view(np.float64)


def _lengths(W_dec_FxD: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    """Return the length of every decoder row in float64, summed over the parts of a joined site."""
    parts = split(W_dec_FxD, widths)
    return np.sum([np.sqrt(np.einsum("fd,fd->f", part, part, dtype=np.float64)) for part in parts], axis=0)


def unit_decoder(dictionary: Dictionary) -> Dictionary:
    """Return the dictionary with decoder rows of length 1: activations become the lengths of what features add.

    Raises:
      UserError: a topk dictionary with rows of different lengths, whose k largest would become others.
    """
    widths, one_length = dictionary.config.widths, 0.0
    if dictionary.kind.depends_on_decoder_norms:
        length_F = all_decoder_lengths(dictionary)
        length_F[length_F == 0] = 1.0
        one_length = float(length_F.mean())
        # Rows that were normalised in float32 differ by rounding.
        if np.abs(length_F - one_length).max() > 1e-5 * one_length:
            raise UserError(
                f"this {dictionary.config.kind} dictionary has decoder rows of different lengths: with rows of length "
                "1 it would choose other features, so load it with unit_norm=False"
            )

    def unit(arrays: Arrays) -> Arrays:
        length_F = decoder_lengths(arrays["W_dec_FxD"], widths)
        # One length for all where it has to be, so that the k largest stay the same to the last bit.
        return scale_features(dictionary.kind, arrays, np.full_like(length_F, one_length) if one_length else length_F)

    return _change_by_feature(dictionary, unit)


def scale_parts(dictionary: Dictionary, scales: Sequence[float]) -> Dictionary:
    """Return a crosscoder for parts that are multiplied with other ``scales``, with the same activations."""
    config = dictionary.config
    if not config.widths or tuple(scales) == config.scales:
        return dictionary
    factor_D = np.repeat(np.divide(scales, config.scales), config.widths)

    def scale(arrays: Arrays) -> Arrays:
        scaled = dict(W_enc_DxF=arrays["W_enc_DxF"] / factor_D[:, None], W_dec_FxD=arrays["W_dec_FxD"] * factor_D[None])
        return arrays | scaled | dict(b_dec_D=arrays["b_dec_D"] * factor_D)

    return _change_by_feature(dictionary, scale, scales=tuple(scales))


def as_jumprelu(dictionary: Dictionary) -> Dictionary:
    """Return the JumpReLU dictionary that a dictionary of another kind is at inference, if its kind is ``jumprelu``."""
    return _change_by_feature(dictionary, dictionary.kind.as_jumprelu, kind="jumprelu")


def centre(dictionary: Dictionary, wanted: bool = True) -> Dictionary:
    """Return the dictionary with the decoder's bias subtracted from the input, or not: the encoder's bias makes up."""
    if dictionary.config.centred == wanted:
        return dictionary

    def move(arrays: Arrays) -> Arrays:
        shift_F = (1 if wanted else -1) * (arrays["b_dec_D"] @ arrays["W_enc_DxF"])
        return dictionary.kind.move_bias(arrays, shift_F)

    return _change_by_feature(dictionary, move, centred=wanted)


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

    def subtract_means(arrays: Arrays) -> Arrays:
        W_enc_DxF = arrays["W_enc_DxF"]
        return arrays | dict(W_enc_DxF=W_enc_DxF - W_enc_DxF.mean(axis=0, keepdims=True))

    return _change_by_feature(dictionary, subtract_means, input_norm="")


def scale_for_training(dictionary: Dictionary, inputs: float, outputs: float, dtype: str) -> Dictionary:
    """Return the dictionary of the parameters that training takes up, for scaled values.

    Args:
      dictionary: the dictionary, for raw values.
      inputs: factor of the inputs in training, above 0.
      outputs: factor of the outputs, above 0.
      dtype: dtype of the parameters.
    """
    kind = dictionary.kind

    def scale(arrays: Arrays) -> Arrays:
        return kind.resume(fold_input_scaling(kind, arrays, 1 / inputs, 1 / outputs))

    return _change_by_feature(dictionary, scale, dtype)


def _change_by_feature(
    dictionary: Dictionary, change: Callable[[Arrays], Arrays], dtype: Any = None, **facts: Any
) -> Dictionary:
    """Return a dictionary of other arrays, rounded to a dtype, with some fields of its config changed.

    Each process computes the features of its own devices, those of a device at a time: no host has a whole matrix of a
    dictionary whose features are split.

    Args:
      dictionary: the dictionary; its arrays stay on its mesh, if it is on one.
      change: makes the new arrays of some features from the old ones, float64; arrays that have no features are whole,
        and come out the same each time.
      dtype: dtype of the new arrays; None: the same as of the old ones.
      facts: fields of the new config.
    """
    config, mesh = dataclasses.replace(dictionary.config, **facts), dictionary.mesh
    dictionary = dictionary.on_mesh(mesh) if mesh else dictionary
    dtype, new = dtype or dictionary.b_dec_D.dtype, parameter_table(config)
    old = parameter_table(dictionary.config)
    rest = {name: array for name, array in dictionary.arrays.items() if name not in old}
    parts: dict[str, list[jax.Array]] = collections.defaultdict(list)
    for devices in _devices_of_features(dictionary).values():
        held = {name: _part_on(array, devices[0]) for name, array in dictionary.arrays.items() if name in old}
        for name, part in change_in_pieces(dictionary.config, held, change, dtype, config).items():
            parts[name] += [jax.device_put(part, device) if mesh else jnp.asarray(part) for device in devices]
    where = placements(config, mesh) if mesh else {}
    arrays = {
        name: jax.make_array_from_single_device_arrays(new[name][0], where[name], of_devices) if mesh else of_devices[0]
        for name, of_devices in parts.items()
    }
    return Dictionary(config, dictionary.matmul_dtype, **rest | arrays)


def change_in_pieces(
    config: DictionaryConfig,
    arrays: Arrays,
    change: Callable[[Arrays], Arrays],
    dtype: Any,
    changed_config: DictionaryConfig | None = None,
) -> Arrays:
    """Return other arrays on the host, computed in float64 some features at a time and rounded once.

    Args:
      config: what the arrays are of, which says where they have features.
      arrays: arrays on the host, of all features or of some.
      change: as for ``_change_by_feature``.
      dtype: dtype of the new arrays.
      changed_config: what the new arrays are of; None: ``config``.
    """
    old, new = parameter_table(config), parameter_table(changed_config or config)
    changed: Arrays = {}
    count = len(arrays["b_enc_F"])
    for first in range(0, count, _AT_ONCE):
        some = slice(first, first + _AT_ONCE)
        piece = {name: _features(old[name][1], array, some).astype(np.float64) for name, array in arrays.items()}
        for name, part in change(piece).items():
            axes = new[name][1]
            if name not in changed:  # arrays that have no features are the same in all pieces
                shape = [count if axis == "model" else size for axis, size in zip(axes, part.shape, strict=True)]
                changed[name] = np.empty(shape, dtype)
            _features(axes, changed[name], some)[...] = part
    return changed


def _devices_of_features(dictionary: Dictionary) -> dict[tuple[int, int], list[jax.Device | None]]:
    """Return first and last features + 1, and the devices of this process that hold them; None: wherever they are."""
    mesh, count = dictionary.mesh, dictionary.config.n_features
    if mesh is None:
        return {(0, count): [None]}
    devices_of: dict[tuple[int, int], list[jax.Device | None]] = collections.defaultdict(list)
    where = placements(dictionary.config, mesh)["b_enc_F"]
    for device, index in where.addressable_devices_indices_map((count,)).items():
        assert index is not None
        start, stop, _ = index[0].indices(count)
        devices_of[start, stop].append(device)
    return devices_of


def _part_on(array: jax.Array, device: jax.Device | None) -> np.ndarray:
    """Return the part of an array that a device holds; None: the whole."""
    if device is None:
        return to_host(array)
    return np.asarray(next(shard.data for shard in array.addressable_shards if shard.device == device))


def _features(axes: Sequence[str | None], array: np.ndarray, some: slice) -> np.ndarray:
    """Return some features of an array whose dimensions are split over these mesh axes; the whole without features."""
    return array[tuple(some if axis == "model" else slice(None) for axis in axes)]
