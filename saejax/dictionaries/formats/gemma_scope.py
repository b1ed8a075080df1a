"""Gemma Scope's SAEs, transcoders and crosscoders; read only.

params.npz                   Gemma Scope (Lieberum et al., 2024): W_enc [d, F], W_dec [F, d], b_enc, b_dec, threshold.
                             Transcoders read the norm before the MLP before its gain.
params.safetensors           Gemma Scope 2: the same in small letters, w_enc and w_dec; affine ones have
                             affine_skip_connection [d, d], applied as x @ affine_skip_connection. Transcoders read what
                             the MLP reads.
params_layer_{i}.safetensors a crosscoder of layers that the folder's name lists: features that read layer i, w_enc
                             [d, F], and write to all of them, w_dec [F, P, d]. (Without such a name the files are a
                             cross-layer transcoder's, see ``circuit_tracer``.)

Transcoders predict what the MLP adds to the stream, after the norm that follows it. Where an SAE reads is in the path,
in the name of its repository ("gemma-scope-2b-pt-res") or a folder ("resid_post"), and so is the layer: "layer_3/..."
or "layer_3_width_16k_l0_small/..."; "embedding/..." is the stream before layer 0. A folder may hold several transcoders
of each layer, of other widths or with more features active; words of their names choose.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saejax.dictionaries.formats import hooks, tensors
from saejax.dictionaries.kinds.base import Arrays
from saejax.dictionaries.modules import DictionaryConfig
from saejax.errors import UserError

FILES = ("params.npz", "params.safetensors")
PARAMS = "params_layer_{}.safetensors"
SKIP = "affine_skip_connection"
AFFINE = "_affine"  # ends the names of folders of Gemma Scope 2 whose transcoders have a skip path
_LAYER = re.compile(r"layer_(\d+)")
_CROSSCODER = re.compile(r"layer_(\d+(?:_\d+)+)_width")
# Words of a path, and the kind of site that they mean.
_SITES = {
    "resid_post": r"gemma-scope-[^/]*-res(-[^/]*)?/|/resid_post(_all)?/",
    "mlp_out": r"gemma-scope-[^/]*-mlp(-[^/]*)?/|/mlp_out(_all)?/",
    "attn_z": r"gemma-scope-[^/]*-att(-[^/]*)?/|/attn_out(_all)?/",
    "transcoder": r"gemma-scope-[^/]*-transcoders/|/transcoder(_all)?/",
}
_REPOSITORY = re.compile(r"gemma-scope-(2-)?(\d+[bm])-(pt|it)")
_VERSION_1 = {"W_enc_DxF": "W_enc", "W_dec_FxD": "W_dec"}
_VERSION_2 = {"W_enc_DxF": "w_enc", "W_dec_FxD": "w_dec"}
_VECTORS = {"b_enc_F": "b_enc", "b_dec_D": "b_dec", "threshold_F": "threshold"}


def layout_of(state: Iterable[str]) -> dict[str, str]:
    """Return the layout of a file with tensors of these names."""
    names = set(state)
    skip = {"W_skip_DxD": SKIP} if SKIP in names else {}
    return (_VERSION_2 if "w_enc" in names else _VERSION_1) | _VECTORS | skip


def find_file(folder: Path) -> Path | None:
    """Return the file of the one dictionary in a folder; None if there is none."""
    if folder.name in FILES:
        return folder
    files = [folder / name for name in FILES if (folder / name).is_file()]
    return files[0] if len(files) == 1 else None


def parse(folder: Path) -> tensors.Published:
    """Describe the dictionary in a folder that ``find_file`` finds one in."""
    file = find_file(folder)
    assert file is not None
    parsed = parse_file(file, *_sites(file), _model(file))
    if not _is_of_embedding(file):
        return parsed
    # It was trained on rows of the table, and the stream has them times the root of the width.
    scale = parsed.config.d_in**0.5
    factors = dict(W_enc_DxF=1 / scale, W_dec_FxD=scale, b_dec_D=scale)
    return dataclasses.replace(
        parsed, fold=lambda arrays: {name: array * factors.get(name, 1.0) for name, array in arrays.items()}
    )


def parse_file(file: Path, site: str, target: str, model: str = "") -> tensors.Published:
    """Describe the dictionary of a file that reads ``site`` and, if a transcoder, predicts ``target`` of ``model``."""
    state = tensors.open_tensors(file)
    if file.parent.name.endswith(AFFINE) and SKIP not in state:
        raise UserError(f"{file} has no {SKIP}, and its folder's name ends in {AFFINE}: download it again")
    facts: dict[str, Any] = dict(kind="jumprelu", centred=False, bos="always", model=model)
    return tensors.describe(file, state, layout_of(state), site=site, target=target, **facts)


def is_crosscoder(folder: Path) -> bool:
    """Return whether a folder holds a crosscoder: by its name, which lists layers, and a file for each."""
    return bool(_CROSSCODER.search(folder.name)) and (folder / PARAMS.format(0)).is_file()


def parse_crosscoder(folder: Path) -> tensors.Published:
    """Describe a crosscoder, in a folder named after its layers, as one dictionary of a joined site.

    The features of each file read one part of it, so the joint encoder is block-diagonal.

    Raises:
      UserError: a file is missing, or the files do not make one crosscoder.
    """
    named = _CROSSCODER.search(folder.absolute().name)
    assert named is not None
    layers = named[1].split("_")
    files = [folder / PARAMS.format(index) for index in range(len(layers))]
    opened = [tensors.open_tensors(file) for file in files]
    parts = [tensors.arrange(file, state, layout_of(state))[0] for file, state in zip(files, opened, strict=True)]
    width, features = parts[0]["W_enc_DxF"].shape[0], parts[0]["W_enc_DxF"].shape[-1]
    wanted = dict(W_enc_DxF=(width, features), W_dec_FxD=(features, len(layers), width))
    wanted |= dict(b_enc_F=(features,), b_dec_D=(width,), threshold_F=(features,))
    for file, part in zip(files, parts, strict=True):
        for name, shape in wanted.items():
            if part[name].shape != shape:
                raise UserError(
                    f"{file} is no part of a crosscoder: {name[:5]} is {part[name].shape}, expected {shape}"
                )
        if "W_skip_DxD" in part:
            raise UserError(f"{file} has {SKIP}, which crosscoders here do not have")
    count = len(layers)
    config = DictionaryConfig(
        kind="jumprelu",
        site="+".join(f"resid_post.{layer}" for layer in layers),
        d_in=count * width,
        n_features=count * features,
        centred=False,
        bos="always",
        widths=(width,) * count,
        scales=(1.0,) * count,
        model=_model(folder / "file"),
    )
    # The first part's tensors stand for all: the others are read when these are folded.
    return tensors.Published(config, parts[0], fold=lambda first: _join(parts, width, features))


def _join(parts: Sequence[dict[str, tensors.Tensor]], width: int, features: int) -> Arrays:
    """Return the arrays of a crosscoder as one dictionary of the joined site, whose encoder is block-diagonal."""
    read = [{name: part[name].read() for name in part} for part in parts]
    count = len(parts)
    W_enc_DxF = np.zeros((count * width, count * features), np.float32)
    for index, part in enumerate(read):
        rows, columns = slice(index * width, (index + 1) * width), slice(index * features, (index + 1) * features)
        W_enc_DxF[rows, columns] = part["W_enc_DxF"]
    joined = {name: np.concatenate([part[name] for part in read]) for name in ("b_enc_F", "b_dec_D", "threshold_F")}
    W_dec_FxD = np.concatenate([part["W_dec_FxD"].reshape(features, count * width) for part in read])
    return joined | dict(W_enc_DxF=W_enc_DxF, W_dec_FxD=W_dec_FxD)


def find_layers(folder: Path, choice: Sequence[str]) -> list[Path]:
    """Return the files of a folder's transcoders; see ``choose_layers``."""
    files = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*.*")) if file.is_file()]
    return [folder / file for file in choose_layers(files, choice, str(folder))]


def choose_layers(files: Iterable[str], choice: Sequence[str], where: str) -> list[str]:
    """Return the paths of a folder's transcoders, one for each layer, in order; none if there are none.

    Args:
      files: paths within the folder; paths of other files are left out.
      choice: words of the paths, such as "16k", "small" or "affine", that tell which of several transcoders of a layer
        is meant. A number that is no word of any stands for the nearest L0, each layer's own.
      where: name of the folder, for messages.

    Raises:
      UserError: a layer has no file, or several of which ``choice`` does not leave exactly one; the message lists them.
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
    chosen = []
    for layer, names in sorted(by_layer.items()):
        kept = _match_words(list(names), choice)
        if len(kept) != 1:
            has = f"{len(names)} transcoders of layer {layer} ({', '.join(sorted(names))})"
            hint = f"none of them is {' '.join(choice)}" if not kept else "words of their names tell which"
            example = ",".join(re.split("[_/]", min(names))[1::2])
            raise UserError(f"{where} holds {has}: {hint}, such as --graph.l0={example}")
        chosen.append(names[kept[0]])
    return chosen


def _match_words(names: list[str], choice: Sequence[str]) -> list[str]:
    """Return which of several names of a layer's transcoders have all words of a choice."""
    for word in choice:
        with_word = [name for name in names if word in re.split("[_/]", name)]
        numbers = {name: int(number[1]) for name in names if (number := re.search(r"l0_(\d+)", name))}
        widths = {re.sub(r"l0_\d+", "", name) for name in numbers}
        if not with_word and word.isdigit() and len(widths) == 1:
            with_word = [min(numbers, key=lambda name: abs(numbers[name] - int(word)))]
        names = with_word or (names if word.isdigit() and numbers else [])
    exact = [name for name in names if re.split("[_/]", name)[-1] in choice]  # "small" is not "small_affine"
    return exact if len(exact) == 1 else names


def _sites(file: Path) -> tuple[str, str]:
    """Return what the dictionary of a file reads and predicts, as its path says."""
    path = file.absolute().as_posix()
    if _is_of_embedding(file):
        return "resid_pre.0", ""
    layers = _LAYER.findall(path)
    matched = [kind for kind, words in _SITES.items() if re.search(words, path)]
    if not layers or len(matched) != 1:
        return hooks.UNKNOWN, ""
    kind, layer = matched[0], layers[-1]
    if kind == "transcoder":
        # Transcoders of Gemma Scope 1 read the norm before its gain, transcoders of 2 the MLP's input.
        return f"{hooks.NORMED if file.suffix == '.npz' else 'mlp_in'}.{layer}", f"mlp_out.{layer}"
    return f"{kind}.{layer}", ""


def _is_of_embedding(file: Path) -> bool:
    """Return whether the path of a file belongs to an SAE of Gemma 2's token embeddings."""
    return "embedding" in file.absolute().parts and bool(re.search(_SITES["resid_post"], file.absolute().as_posix()))


def _model(file: Path) -> str:
    """Return the model that the name of the repository names; "" for none."""
    named = _REPOSITORY.search(file.absolute().as_posix())
    if not named:
        return ""
    second, size, training = named.groups()
    plain = training == "pt" and (not second or size == "270m")  # names without "-pt"
    return f"google/gemma-{'3' if second else '2'}-{size}" + ("" if plain else f"-{training}")
