"""Gemma Scope's transcoders, a file for each layer; read only. Nothing is unpickled.

params.npz           Gemma Scope (Lieberum et al., 2024): W_enc [d, F], W_dec [F, d], b_enc, b_dec, threshold. They read
                     the norm before the MLP before its gain.
params.safetensors   Gemma Scope 2: the same in small letters, w_enc and w_dec; affine ones have
                     affine_skip_connection [d, d], applied as x @ affine_skip_connection. They read what the MLP reads.

Both predict what the MLP adds to the stream, after the norm that follows it. The layer is in the path: "layer_3/..." or
"layer_3_width_16k_l0_small/...". A folder may hold several of each layer, of other widths or with more features
active; words of their names choose.
"""

import re
import zipfile
from collections.abc import Iterable, Sequence
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


def find_layers(folder: Path, choice: Sequence[str] = ()) -> list[Path]:
    """The files of the layers in a folder, in order; none if there are none.

    Args:
      choice: see ``chosen_layers``.

    Raises:
      UserError: of a layer there is none, or several of which ``choice`` leaves not one.
    """
    files = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*.*")) if file.is_file()]
    return [folder / file for file in chosen_layers(files, choice, str(folder))]


def chosen_layers(files: Iterable[str], choice: Sequence[str], where: str) -> list[str]:
    """Of the paths of a folder's files those of its transcoders, one for each layer, in order; none if there are none.

    Args:
      files: paths within the folder; those that are no transcoders' are left out.
      choice: words of the paths, such as "16k", "small" or "affine", that tell which of several transcoders of a layer
        is meant. A number that is no word of any stands for the nearest L0, each layer's own.
      where: name of the folder, for messages.

    Raises:
      UserError: of a layer there is none, or several of which ``choice`` leaves not one; the message lists them.
    """
    by_layer: dict[int, dict[str, str]] = {}
    for file in files:
        named = _LAYER.search(file)
        if named and (file.endswith(".npz") or file.rpartition("/")[2] == "params.safetensors"):
            name = (file[: named.start()] + file[named.end() :]).rpartition("/")[0].strip("/_")
            by_layer.setdefault(int(named[1]), {})[name or file] = file
    missing = sorted(set(range(max(by_layer, default=-1) + 1)) - set(by_layer))
    if missing:
        raise UserError(f"{where} holds no transcoder of layer {missing[0]}: a set has every layer from 0")
    found = []
    for layer, names in sorted(by_layer.items()):
        kept = _meant(list(names), choice) if len(names) > 1 else list(names)
        if len(kept) != 1:
            has = f"{len(names)} transcoders of layer {layer} ({', '.join(sorted(names))})"
            told = f"none of them is {' '.join(choice)}" if not kept else "words of their names tell which"
            example = ",".join(re.split("[_/]", min(names))[1::2])
            raise UserError(f"{where} holds {has}: {told}, such as --graph.l0={example}")
        found.append(names[kept[0]])
    return found


def _meant(names: list[str], choice: Sequence[str]) -> list[str]:
    """Which of several names of a layer's transcoders have all words of a choice."""
    for word in choice:
        own = [name for name in names if word in re.split("[_/]", name)]
        numbers = {name: int(number[1]) for name in names if (number := re.search(r"l0_(\d+)", name))}
        widths = {re.sub(r"l0_\d+", "", name) for name in numbers}
        if not own and word.isdigit() and len(widths) == 1:
            own = [min(numbers, key=lambda name: abs(numbers[name] - int(word)))]
        names = own or (names if word.isdigit() and numbers else [])
    exact = [name for name in names if re.split("[_/]", name)[-1] in choice]  # "small" is not "small_affine"
    return exact if len(exact) == 1 else names


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


def is_one(file: Path) -> bool:
    """Whether a file that a set lists is of this format: by its name, or by the names of its tensors."""
    return file.suffix == ".npz" or (file.is_file() and "w_enc" in tensors.find(file))


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
