"""SAELens folders, version 6: ``cfg.json`` and ``sae_weights.safetensors``.

Read are the architectures standard, topk, jumprelu, gated, transcoder, jumprelu_transcoder, skip_transcoder and
jumprelu_skip_transcoder. Every setting is honoured, or folded into the arrays, or refused by name. Folded: decoder
norms by which a topk scales its pre-activations (``rescale_acts_by_decoder_norm``), and thresholds below 0, which act
like 0.

Written are all kinds but linear. batchtopk and matryoshka become jumprelu, as SAELens itself saves them, and
``metadata`` says what they were trained as. Gated transcoders, of which SAELens has none, become the equal
jumprelu_transcoder. A folder that came from SAELens is written with all it said.
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import rescale
from saejax.dictionaries.formats import hooks, origin, saelens_settings, tensors
from saejax.dictionaries.kinds import by_name
from saejax.dictionaries.modules import Dictionary, DictionaryConfig, parameter_table
from saejax.errors import UserError
from saejax.files import read_json, write_json

DESCRIPTION, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_FORMAT = "saelens"
_UNIT = 1e-6  # how far from 1 a length is by rounding alone


def load(folder: Path, matmul_dtype: str = "float32", site: str = "", target: str = "") -> Dictionary:
    """Reads a folder.

    Args:
      folder: holds ``cfg.json`` and ``sae_weights.safetensors``.
      matmul_dtype: dtype of the operands of matrix products.
      site, target: sites in place of those that the folder names.

    Raises:
      UserError: it is damaged, from before version 6, or of an architecture or with a setting that is not known here.
    """
    file = Path(folder) / DESCRIPTION
    settings = read_json(file)
    config = saelens_settings.understand(file, settings, site, target)
    names = _names(config)
    found = tensors.find(file.with_name(WEIGHTS))
    table = parameter_table(config)
    tensors.check(file.with_name(WEIGHTS), found, {name: table[own][0] for name, own in names.items()})
    arrays = {own: tensors.widened(found[name]) for name, own in names.items()}
    if config.skip:
        arrays["W_skip_DxD"] = arrays["W_skip_DxD"].T
    if settings.get("rescale_acts_by_decoder_norm"):
        length_F = rescale.decoder_lengths(arrays["W_dec_FxD"])
        if np.abs(length_F - 1).max() > _UNIT:  # SAELens trains with the setting, and saves rows of length 1
            arrays = rescale.scale_features(by_name(config.kind), arrays, length_F)
    if "threshold_F" in table:  # SAELens multiplies max(pre, 0) by the gate
        arrays["threshold_F"] = np.maximum(arrays["threshold_F"], 0)
    described = origin.describe(_FORMAT, found["W_enc"].dtype, settings)
    placed = {name: jnp.asarray(array) for name, array in arrays.items()}
    return Dictionary(dataclasses.replace(config, origin=described), matmul_dtype, **placed)


def save(folder: Path, dictionary: Dictionary) -> None:
    """Writes a folder that SAELens loads with ``SAE.load_from_disk``.

    Args:
      folder: made if missing; ``cfg.json`` is written last.

    Raises:
      UserError: SAELens has nothing like this dictionary, or the folder holds one already.
    """
    trained_as, dictionary = dictionary.config.kind, _expressible(dictionary)
    config = dictionary.config
    arrays, dtype = tensors.host_arrays(dictionary)
    if config.skip:
        arrays["W_skip_DxD"] = arrays["W_skip_DxD"].T
    if "threshold_F" in arrays and arrays["threshold_F"].min(initial=0) < 0:
        raise UserError("this dictionary has thresholds below 0, under which SAELens would not let anything pass")
    with tensors.whole_folder(folder, DESCRIPTION, WEIGHTS) as beside:
        tensors.write(beside / WEIGHTS, {name: arrays[own] for name, own in _names(config).items()})
        before = origin.settings_of(config, _FORMAT)
        described = dataclasses.replace(config, kind=trained_as)
        write_json(beside / DESCRIPTION, saelens_settings.describe(described, dtype, before))


def check(config: DictionaryConfig) -> None:
    """Raises a ``UserError`` if SAELens has nothing like such a dictionary."""
    saelens_settings.architecture(config)
    hooks.to_hook(config.site), hooks.to_hook(config.target)


def _expressible(dictionary: Dictionary) -> Dictionary:
    """The same dictionary in a form that SAELens has."""
    check(dictionary.config)
    kind, transcoder, _ = saelens_settings.ARCHITECTURES[saelens_settings.architecture(dictionary.config)]
    if kind != dictionary.config.kind:
        dictionary = rescale.as_jumprelu(dictionary)
    return rescale.uncentred(dictionary) if transcoder else dictionary  # its transcoders do not centre


def _names(config: DictionaryConfig) -> dict[str, str]:
    """Our names of arrays by those of the file."""
    names = tensors.plain_names(config)
    if config.kind == "gated":
        names["b_gate"] = names.pop("b_enc")
    return names
