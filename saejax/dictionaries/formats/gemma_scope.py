"""Gemma Scope's SAEs and transcoders, a file for each; read only. Nothing is unpickled.

params.npz           Gemma Scope (Lieberum et al., 2024): W_enc [d, F], W_dec [F, d], b_enc, b_dec, threshold.
                     Transcoders read the norm before the MLP before its gain.
params.safetensors   Gemma Scope 2: the same in small letters, w_enc and w_dec; affine ones have
                     affine_skip_connection [d, d], applied as x @ affine_skip_connection. Transcoders read what the MLP
                     reads.

Transcoders predict what the MLP adds to the stream, after the norm that follows it. Where an SAE reads is in the path,
in the name of its repository ("gemma-scope-2b-pt-res") or a folder ("resid_post"), and so is the layer: "layer_3/..."
or "layer_3_width_16k_l0_small/...". A folder may hold several transcoders of each layer, of other widths or with more
features active; words of their names choose.
"""

import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from saejax.dictionaries.formats import hooks, origin, tensors
from saejax.dictionaries.modules import Dictionary, DictionaryConfig
from saejax.errors import UserError

_LAYER = re.compile(r"layer_(\d+)")
_FILES = ("params.npz", "params.safetensors")
_SKIP = "affine_skip_connection"
# Words of a path, and the kind of site that they mean.
_PLACES = {
    "resid_post": r"gemma-scope-[^/]*-res(-[^/]*)?/|/resid_post(_all)?/",
    "mlp_out": r"gemma-scope-[^/]*-mlp(-[^/]*)?/|/mlp_out(_all)?/",
    "heads": r"gemma-scope-[^/]*-att(-[^/]*)?/|/attn_out(_all)?/",
    "transcoder": r"gemma-scope-[^/]*-transcoders/|/transcoder(_all)?/",
}
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


def read_config(file: Path, site: str, target: str = "", model: str = "") -> DictionaryConfig:
    """What the dictionary in a file is; no array is read.

    Args:
      file: of its arrays.
      site, target: what it reads and, if it is a transcoder, predicts.
      model: name of the language model.

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
        raise UserError(f"{file} is no dictionary of Gemma Scope ({'; '.join(wrong)}): expected {wanted}")
    return DictionaryConfig(
        kind="jumprelu",
        site=site,
        target=target,
        d_in=width,
        n_features=features,
        skip=_SKIP in lower,
        centred=False,
        model=model,
        origin=origin.describe("gemma_scope", np.dtype(np.float32), {}),
    )


def find_file(folder: Path) -> Path | None:
    """The file of the dictionary in a folder; None if there is none."""
    files = [folder / name for name in _FILES if (folder / name).is_file()]
    return files[0] if len(files) == 1 else None


def load_folder(folder: Path, matmul_dtype: str = "float32", site: str = "", target: str = "") -> Dictionary:
    """Reads the dictionary in a folder.

    Args:
      folder: that ``find_file`` finds one in.
      matmul_dtype: dtype of the operands of matrix products.
      site, target: in place of what the folder's path says.

    Raises:
      UserError: it is damaged, or reads what is no site here and none is given in its place.
    """
    file = find_file(folder)
    assert file is not None
    known = ("", "") if site else _sites(file)
    config = read_config(file, site or known[0], target or known[1])
    return load(file, config, matmul_dtype)


def _sites(file: Path) -> tuple[str, str]:
    """What the dictionary of a file reads and predicts, as its path says."""
    path = file.absolute().as_posix()
    layers = _LAYER.findall(path)
    found = [place for place, words in _PLACES.items() if re.search(words, path)]
    if not layers or len(found) != 1:
        return hooks.UNKNOWN, ""
    kind, layer = found[0], layers[-1]
    if kind == "transcoder":
        if before_gain([file]):
            raise UserError(
                f"{file} reads the norm before the MLP before its gain, which is no site here: name it in a set of all "
                "layers, by --graph.transcoders, or the site that stands for it (site= and target= of load_dictionary)"
            )
        return f"mlp_in.{layer}", f"mlp_out.{layer}"
    if kind == "heads":
        raise UserError(
            f"{file} reads what the heads give before they are projected, which is no site here: name an SAE of the "
            "residual stream or of MLP outputs"
        )
    return f"{kind}.{layer}", ""


def load(file: Path, config: DictionaryConfig, matmul_dtype: str = "float32") -> Dictionary:
    """Reads the arrays of a file."""
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as arrays:
            found = {name.lower(): np.asarray(arrays[name], np.float32) for name in arrays.files}
    else:
        found = {name: tensors.widened(tensor) for name, tensor in tensors.find(file).items()}
    named = {own: jnp.asarray(found[name]) for name, own in _NAMES.items()}
    if config.skip:
        named["W_skip_DxD"] = jnp.asarray(found[_SKIP])
    return Dictionary(config, matmul_dtype, **named)


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
