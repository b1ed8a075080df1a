"""Gemma Scope's transcoders, a file for each layer; read only. Nothing is unpickled.

params.npz           Gemma Scope (Lieberum et al., 2024): W_enc [d, F], W_dec [F, d], b_enc, b_dec, threshold. They read
                     the norm before the MLP before its gain.
params.safetensors   Gemma Scope 2: the same in small letters, w_enc and w_dec; affine ones have
                     affine_skip_connection [d, d], applied as x @ affine_skip_connection. They read what the MLP reads.

Both predict what the MLP adds to the stream, after the norm that follows it. The layer is in the path: "layer_3/..." or
"layer_3_width_16k_l0_small/...".
"""

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from saejax.dictionaries.formats import origin, tensors
from saejax.dictionaries.modules import Dictionary, DictionaryConfig
from saejax.errors import UserError

_LAYER = re.compile(r"layer_(\d+)")
_SKIP = "affine_skip_connection"
_NAMES = {
    "w_enc": "W_enc_DxF",
    "w_dec": "W_dec_FxD",
    "b_enc": "b_enc_F",
    "b_dec": "b_dec_D",
    "threshold": "threshold_F",
}


def find_layers(folder: Path) -> list[Path]:
    """The files of the layers in a folder, in order; none if there are none.

    Raises:
      UserError: a layer is there twice, or one is missing.
    """
    found: dict[int, Path] = {}
    for file in sorted([*folder.rglob("*.npz"), *folder.rglob("params.safetensors")]):
        if named := _LAYER.search(str(file.relative_to(folder))):
            layer = int(named[1])
            if layer in found:
                raise UserError(f"{folder} holds two transcoders of layer {layer}, {found[layer]} and {file}: keep one")
            found[layer] = file
    missing = sorted(set(range(max(found, default=-1) + 1)) - set(found))
    if missing:
        raise UserError(f"{folder} holds no transcoder of layer {missing[0]}: a set has every layer from 0")
    return [found[layer] for layer in sorted(found)]


def read_config(file: Path, layer: int, model: str = "") -> DictionaryConfig:
    """What the transcoder in a file is, of this layer of a language model; no array is read.

    Raises:
      UserError: the file is missing, damaged or of another format.
    """
    shapes = _shapes(file)
    lower = {name.lower(): shape for name, shape in shapes.items()}
    if any(len(lower.get(name, ())) != 2 for name in ("w_enc", "w_dec")):
        raise UserError(f"{file} lacks matrices W_enc and W_dec: it has {', '.join(sorted(shapes)) or 'nothing'}")
    width, features = lower["w_enc"]
    wanted = dict(w_enc=(width, features), w_dec=(features, width), b_enc=(features,), b_dec=(width,))
    wanted |= dict(threshold=(features,)) | ({_SKIP: (width, width)} if _SKIP in lower else {})
    wrong = [f"{name} has the shape {lower.get(name)}" for name, shape in wanted.items() if lower.get(name) != shape]
    if wrong:
        raise UserError(f"{file} is no transcoder of Gemma Scope ({'; '.join(wrong)}): expected {wanted}")
    return DictionaryConfig(
        kind="jumprelu",
        site=f"mlp_in.{layer}",
        target=f"mlp_out.{layer}",
        d_in=width,
        n_features=features,
        skip=_SKIP in lower,
        centred=False,
        model=model,
        origin=origin.describe("gemma_scope", np.dtype(np.float32), {}),
    )


def load(file: Path, config: DictionaryConfig) -> Dictionary:
    """Reads the transcoder of a file."""
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as arrays:
            found = {name.lower(): np.asarray(arrays[name], np.float32) for name in arrays.files}
    else:
        found = {name: tensors.widened(tensor) for name, tensor in tensors.find(file).items()}
    named = {own: jnp.asarray(found[name]) for name, own in _NAMES.items()}
    if config.skip:
        named["W_skip_DxD"] = jnp.asarray(found[_SKIP])
    return Dictionary(config, **named)


def before_gain(files: Sequence[Path]) -> bool:
    """Whether the transcoders of these files read before the norm's gain."""
    return files[0].suffix == ".npz"


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    if not file.is_file():
        raise UserError(f"{file} is missing: fetch the transcoders again")
    if file.suffix != ".npz":
        return {name: tensor.shape for name, tensor in tensors.find(file).items()}
    shapes = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                with archive.open(name) as stream:
                    version = np.lib.format.read_magic(stream)
                    read = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shapes[name.removesuffix(".npy")] = read(stream)[0]
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise UserError(f"{file} is damaged ({error}): fetch the transcoders again") from None
    return shapes
