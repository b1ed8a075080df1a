"""Llama Scope's SAEs, a folder for each (He et al., 2024); read only.

hyperparams.json                what it is
checkpoints/final.safetensors   encoder.weight [F, d], encoder.bias [F], decoder.weight [d, F], decoder.bias [d]

The arrays are those of training, for inputs and outputs that were scaled to a mean norm of sqrt(d). As the tool that
trained them uses them, they are for raw values, with decoder rows of length 1 (unless sparsity_include_decoder_norm is
false); the one threshold is of activations *then*. SAELens 6 leaves the rows as they are, hence has others active.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import rescale
from saejax.dictionaries.formats import hooks, origin, tensors
from saejax.dictionaries.kinds import KINDS
from saejax.dictionaries.modules import Dictionary, DictionaryConfig
from saejax.errors import UserError
from saejax.files import read_json

DESCRIPTION, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_NAMES = {"encoder.weight": "W_enc_DxF", "encoder.bias": "b_enc_F", "decoder.weight": "W_dec_FxD"}
# Settings that would compute something else, and the values that do not.
_FOLLOWED = {
    "act_fn": ("jumprelu", "topk"),
    "norm_activation": ("dataset-wise", "inference"),
    "use_glu_encoder": (False, None),
}


def load(folder: Path, matmul_dtype: str = "float32", site: str = "", target: str = "") -> Dictionary:
    """Reads a folder.

    Args:
      folder: holds ``hyperparams.json``.
      matmul_dtype: dtype of the operands of matrix products.
      site, target: sites in place of those that the description names.

    Raises:
      UserError: it is damaged, or asks for what no dictionary here does.
    """
    file = folder / DESCRIPTION
    settings = read_json(file)
    d, f = _sizes(file, settings)
    weights = folder / WEIGHTS
    biased = settings.get("use_decoder_bias", True)
    found = tensors.find(weights)
    shapes = {"encoder.weight": (f, d), "encoder.bias": (f,), "decoder.weight": (d, f)}
    tensors.check(weights, found, shapes | ({"decoder.bias": (d,)} if biased else {}))
    arrays = {own: tensors.widened(found[name]).T for name, own in _NAMES.items()}
    arrays["b_dec_D"] = tensors.widened(found["decoder.bias"]) if biased else np.zeros(d, np.float32)
    read, predicted = (settings.get(f"hook_point_{side}") for side in ("in", "out"))
    config = DictionaryConfig(
        kind="jumprelu",
        site=site or hooks.to_site(read),
        target=target or ("" if predicted in (read, None) else hooks.to_site(predicted)),
        d_in=d,
        n_features=f,
        centred=bool(settings.get("apply_decoder_bias_to_pre_encoder", False)),
        origin=origin.describe("llama_scope", found["encoder.weight"].dtype, settings),
    )
    arrays = _for_raw_values(arrays, file, settings)
    return Dictionary(config, matmul_dtype, **{name: jnp.asarray(array) for name, array in arrays.items()})


def _for_raw_values(arrays: dict[str, np.ndarray], file: Path, settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays for raw values, with decoder rows of length 1, and the thresholds of activations then."""
    kind, d, f = KINDS["jumprelu"], len(arrays["W_enc_DxF"]), len(arrays["b_enc_F"])
    inputs = outputs = 1.0
    if settings.get("norm_activation", "dataset-wise") == "dataset-wise":
        norms = settings.get("dataset_average_activation_norm")
        if not isinstance(norms, dict) or not all(norms.get(side, 0) > 0 for side in ("in", "out")):
            raise UserError(f"{file}: dataset_average_activation_norm is {norms!r}: expected norms above 0, in and out")
        inputs, outputs = (math.sqrt(d) / norms[side] for side in ("in", "out"))
    by_length = settings.get("sparsity_include_decoder_norm", True)
    factor_F = rescale.decoder_lengths(arrays["W_dec_FxD"]) if by_length else np.full(f, outputs / inputs)
    made = rescale.scale_features(kind, rescale.fold_input_scaling(kind, arrays, inputs, outputs), factor_F)
    return dict(made, threshold_F=np.full(f, settings["jump_relu_threshold"], np.float32))


def _sizes(file: Path, settings: Any) -> tuple[int, int]:
    """Width and features of a folder whose settings can be followed."""
    if not isinstance(settings, dict):
        raise UserError(f"{file} is not the description of a Llama Scope folder")
    for name, known in _FOLLOWED.items():
        if (value := settings.get(name, known[0])) not in known:
            raise UserError(f"{file}: {name} is {value!r}, which no dictionary here has: expected {known[0]!r}")
    if not (isinstance(threshold := settings.get("jump_relu_threshold"), int | float) and threshold > 0):
        raise UserError(f"{file}: jump_relu_threshold is {threshold!r}: expected a number above 0")
    d = settings.get("d_model")
    sizes = dict(d_model=d, d_sae=settings.get("d_sae") or settings.get("expansion_factor", 0) * (d or 0))
    wrong = [f"{key} is {value!r}" for key, value in sizes.items() if not isinstance(value, int) or value < 1]
    if wrong:
        raise UserError(f"{file}: {', '.join(wrong)}: expected whole numbers above 0")
    return sizes["d_model"], sizes["d_sae"]
