"""File formats of dictionaries, told apart by their files.

dictionary.json, arrays/                      our own (``own``)
cfg.json, sae_weights.safetensors             SAELens, version 6 (``saelens``)
cfg.json, sae.safetensors                     sparsify (``sparsify``), read only
params.npz, params.safetensors                Gemma Scope 1 and 2 (``gemma_scope``), read only
hyperparams.json, checkpoints/                Llama Scope (``llama_scope``), read only
layer0.sae.pt, ...                            Qwen-Scope (``qwen_scope``), a file for each, read only
config.yaml, layer_0.safetensors, ...         circuit-tracer (``circuit_tracer``): a set of transcoders

Each is in a folder here, or in one on the hub, hf://ORG/NAME[/FOLDER][@REVISION] (``place``).

Nothing but tensors is unpickled, and that of Qwen-Scope alone.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from saejax.dictionaries import rescale
from saejax.dictionaries.formats import circuit_tracer, gemma_scope, llama_scope, own, qwen_scope, saelens, sparsify
from saejax.dictionaries.formats.circuit_tracer_settings import DESCRIPTION as SET
from saejax.dictionaries.formats.place import located
from saejax.dictionaries.modules import Dictionary, DictionaryConfig
from saejax.errors import UserError, one_of
from saejax.models.sites import Site

FORMATS = {"saejax": own.save, "saelens": saelens.save}


def load_dictionary(
    path: str | os.PathLike, matmul_dtype: str = "float32", site: str = "", target: str = "", unit_norm: bool = False
) -> Dictionary:
    """Loads a dictionary from its folder, such as ``runs/demo/train/topk``, or one of another tool.

    Features, their activations and the lengths of decoder rows are those of the file.

    Args:
      path: the folder, or hf://ORG/NAME[/FOLDER][@REVISION] of the hub; of Qwen-Scope the file in it.
      matmul_dtype: dtype of the operands of its matrix products.
      site, target: what it reads and predicts, in place of what its files say; for files that name a place of which
        there is none here.
      unit_norm: bring decoder rows to length 1, so that activations become the lengths of what features add, as they
        are for dictionaries trained here. Not possible for topk where the lengths differ.

    Raises:
      UserError: no dictionary is there, its files are damaged, or they ask for what no dictionary here does.
    """
    folder = located(path)
    load = _reader(folder)
    if load is None:
        raise UserError(f"{folder} holds no dictionary {_instead(folder)}")
    dictionary = load(matmul_dtype, site, target)
    return rescale.unit_decoder(dictionary) if unit_norm else dictionary


def read_config(path: str | os.PathLike) -> DictionaryConfig:
    """What the dictionary in a folder is; of one in our own format no array is read. Raises as ``load_dictionary``."""
    for folder in (located(path), located(path) / "dictionary"):
        if (folder / own.DESCRIPTION).exists():
            return own.read_config(folder)
    return load_dictionary(path).config


def folders_of(path: str | os.PathLike) -> list[Path]:
    """The folder itself if it holds a dictionary, or those in it that do, such as the members of ``train/topk``.

    Raises:
      UserError: no dictionary is there.
    """
    found = list(_readers(located(path)))
    if not found:
        load_dictionary(path)  # says what is there instead
    return found


def load_all(path: str | os.PathLike, matmul_dtype: str = "float32") -> dict[str, Dictionary]:
    """Loads the dictionary of a folder, or all members of a stack such as ``runs/demo/train/topk``, by their folders.

    Raises:
      UserError: no dictionary is there, or one is damaged.
    """
    return {str(folder): load_dictionary(folder, matmul_dtype) for folder in folders_of(path)}


def load_transcoders(
    path: str | os.PathLike, matmul_dtype: str = "float32", site: str = "", target: str = ""
) -> list[Dictionary]:
    """Loads the transcoders of several layers, in the order of layers.

    Args:
      path: a circuit-tracer set, or a folder of folders that ``load_dictionary`` loads, such as the stack
        ``runs/plt/train/standard``.
      matmul_dtype: dtype of the operands of their matrix products.
      site, target: kinds of site in place of those that a set's description names, such as "mlp_in".

    Raises:
      UserError: no transcoders are there, or two of one layer, or they are damaged.
    """
    folder = located(path)
    if (folder / SET).exists():
        return circuit_tracer.load(folder, matmul_dtype, site, target)
    readers = _readers(folder).values()
    loaded = [load(matmul_dtype, "", "") for load in readers]
    if not loaded:
        raise UserError(f"{folder} holds no transcoders: name a circuit-tracer set or a stack that was trained")
    layers = [Site.parse(dictionary.config.target or dictionary.config.site).layer for dictionary in loaded]
    for dictionary, layer in zip(loaded, layers, strict=True):
        if not dictionary.config.target:
            raise UserError(f"{folder} holds an SAE of {dictionary.site}: expected transcoders only")
        if layers.count(layer) > 1:
            raise UserError(f"{folder} holds several transcoders of layer {layer}: name a folder with one for each")
    return [dictionary for _, dictionary in sorted(zip(layers, loaded, strict=True), key=lambda pair: pair[0])]


def save_dictionary(folder: str | os.PathLike, dictionary: Dictionary, format: str = "saejax") -> None:
    """Writes a dictionary; it appears whole or not at all, and nothing is replaced.

    Args:
      folder: where to; made if missing.
      format: "saejax" (every process of a run must call it) or "saelens".

    Raises:
      UserError: the folder holds a dictionary already, or the format has nothing like this one.
    """
    if format == "circuit_tracer":
        raise UserError("circuit_tracer is a format of sets with one transcoder for every layer: use save_transcoders")
    FORMATS[one_of(format, FORMATS, "format")](Path(folder), dictionary)


def save_transcoders(folder: str | os.PathLike, transcoders: Sequence[Dictionary]) -> None:
    """Writes a circuit-tracer set; it appears whole or not at all, and nothing is replaced.

    Args:
      folder: where to; made if missing.
      transcoders: one for every layer from 0.

    Raises:
      UserError: the folder holds a set already, or these do not make one.
    """
    circuit_tracer.save(Path(folder), transcoders)


def _readers(folder: Path) -> dict[Path, Callable[[str, str, str], Dictionary]]:
    """What reads the dictionary in a folder, or if there is none those in the folders in it."""
    inside = sorted(child for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []
    inside += qwen_scope.find_layers(folder)
    for folders in ([folder], inside):
        if found := {each: load for each in folders if (load := _reader(each))}:
            return found
    return {}


def _reader(folder: Path) -> Callable[[str, str, str], Dictionary] | None:
    """What reads the dictionary in a folder, given matmul_dtype, site and target; None if there is none."""
    for candidate in (folder, folder / "dictionary"):
        if (candidate / own.DESCRIPTION).exists():
            return lambda matmul_dtype, site, target: _replaced(own.load(candidate, matmul_dtype), site, target)
    for format in (saelens, sparsify):
        if (folder / format.WEIGHTS).exists():
            return lambda matmul_dtype, site, target: format.load(folder, matmul_dtype, site, target)
    if gemma_scope.find_file(folder):
        return lambda matmul_dtype, site, target: gemma_scope.load_folder(folder, matmul_dtype, site, target)
    if (folder / llama_scope.DESCRIPTION).exists():
        return lambda matmul_dtype, site, target: llama_scope.load(folder, matmul_dtype, site, target)
    if qwen_scope.is_one(folder):
        return lambda matmul_dtype, site, target: qwen_scope.load(folder, matmul_dtype, site, target)
    return None


def _replaced(dictionary: Dictionary, site: str, target: str) -> Dictionary:
    if not site and not target:
        return dictionary
    config = dictionary.config
    config = dataclasses.replace(config, site=site or config.site, target=target or config.target)
    return Dictionary(config, dictionary.matmul_dtype, **dictionary.arrays)


def _instead(folder: Path) -> str:
    """What a folder without a dictionary holds, and what to name instead."""
    if (folder / SET).exists():
        return "but a set of transcoders: use load_transcoders"
    if (folder / saelens.DESCRIPTION).exists():
        return f"but its description alone: {saelens.WEIGHTS} or {sparsify.WEIGHTS} is missing"
    if inside := sorted(child.name for child in _readers(folder) if child != folder):
        return f"but folders of such: name one, such as {folder / inside[0]}, of {', '.join(inside)}"
    others = "one of SAELens, sparsify, Gemma Scope or Llama Scope, or a file of Qwen-Scope"
    return f"({own.DESCRIPTION} is missing): name a folder that the train stage finished, {others}"
