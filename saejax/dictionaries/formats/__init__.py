"""File formats of dictionaries: one table of how each is recognised and read.

dictionary.json, arrays/                       our own (``own``)
cfg.json, sae_weights.safetensors              SAELens, all versions (``saelens``)
cfg.json, sae.safetensors                      sparsify (``published``)
ae.pt, config.json                             dictionary_learning (``published``)
params.npz, params.safetensors                 Gemma Scope 1 and 2 (``gemma_scope``)
params_layer_{i}.safetensors in layer_7_13_... Gemma Scope 2's crosscoders (``gemma_scope``)
hyperparams.json, config.json with sae_type    Llama Scope, Llama-Scope-R1, Llama-Scope-2 (``published``)
model.safetensors, config.json with num_layers crosscoders of science-of-finetuning (``published``)
layer3.sae.pt, NAME.pth, NAME.pt               Qwen-Scope, Goodfire, DeepSeek-R1 by qresearch (``published``)
autoencoders/6.pt, cc_weights.pt               OpenAI, crosscoders of Kissane et al. (``published``)
config.yaml, layer_0.safetensors, ...          sets of transcoders of all layers (``circuit_tracer``), or one file

Each is in a folder here, on the hub, hf://ORG/NAME[/FOLDER][@REVISION], or named as in SAELens' registry,
saelens:RELEASE/SAE_ID (``place``). Every format is folded at load time into the one affine form of ``modules``, with
the conventions of its training in ``DictionaryConfig``. Written are our own format, SAELens' and circuit-tracer's.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from jax.sharding import Mesh

from saejax.arguments import check_classes, suggests_names
from saejax.dictionaries import rescale
from saejax.dictionaries.check import check_dictionary
from saejax.dictionaries.formats import circuit_tracer, gemma_scope, hooks, own, published, saelens
from saejax.dictionaries.formats.place import REGISTRY, registry_overrides, resolve_path
from saejax.dictionaries.formats.tensors import DTYPES, Published, description_errors
from saejax.dictionaries.modules import Dictionary, DictionaryConfig
from saejax.errors import UserError, file_errors, one_of
from saejax.loaded_units import compare_dictionary
from saejax.models.sites import parse_site, site_parts
from saejax.parallel.mesh import check_mesh
from saejax.progress import show_progress

WRITERS = {"saejax": own.save, "saelens": saelens.save}


@dataclasses.dataclass(frozen=True)
class Format:
    """A published format of single dictionaries."""

    name: str  #: name of the tool or release
    #: whether a folder, or a file, holds a dictionary of it; looks at names, and at settings where it must.
    matches: Callable[[Path], Any]
    parse: Callable[[Path], Published]  #: describes the dictionary at a path without reading its arrays


# The first that matches is taken: formats that one name tells come before formats that need a look at settings.
FORMATS = (
    Format("SAELens", lambda path: (path / saelens.WEIGHTS).is_file() and _has_cfg(path), saelens.parse),
    Format("sparsify", lambda path: (path / "sae.safetensors").is_file(), published.parse_sparsify),
    Format("dictionary_learning", published.find_dictionary_learning, published.parse_dictionary_learning),
    Format("Gemma Scope", gemma_scope.find_file, gemma_scope.parse),
    Format("Gemma Scope 2 crosscoders", gemma_scope.is_crosscoder, gemma_scope.parse_crosscoder),
    Format("Llama Scope", published.find_llama_scope, published.parse_llama_scope),
    Format("science-of-finetuning", published.is_crosscoder, published.parse_crosscoder),
    Format("Qwen-Scope, Goodfire, OpenAI, qresearch", published.find_pickled, published.parse_pickled),
    Format("circuit-tracer, one layer", circuit_tracer.is_layer, circuit_tracer.parse_layer),
)


_IN_FOLDERS = (saelens.WEIGHTS, "sae.safetensors")  # files that may be named in place of their folders


def _has_cfg(folder: Path) -> bool:
    """Return whether the weights beside it are SAELens': its description is there, or no other one is."""
    return (folder / saelens.DESCRIPTION).is_file() or not (folder / "config.json").is_file()


@dataclasses.dataclass(frozen=True)
class Located:
    """A dictionary that was found at a path."""

    config: DictionaryConfig  #: what it is
    format: str  #: the name of its format
    load: Callable[[str, str, Mesh | None], Dictionary]  #: reads it, given ``matmul_dtype``, ``dtype`` and ``mesh``


@file_errors()
def load_dictionary(
    path: str | os.PathLike,
    matmul_dtype: str = "float32",
    site: str = "",
    target: str = "",
    unit_norm: bool = False,
    dtype: str = "float32",
    lm: Any = None,
    mesh: Mesh | None = None,
) -> Dictionary:
    """Load a dictionary from its folder, such as ``runs/demo/train/topk``, or one of another tool.

    Features, their activations and the lengths of decoder rows stay as in the file. A warning is logged if results
    of another dictionary of the same name were loaded before.

    Args:
      path: the folder; hf://ORG/NAME[/FOLDER][@REVISION] on the hub; or saelens:RELEASE/SAE_ID. For formats with a
        file for each layer, that file.
      matmul_dtype: dtype of the operands of its matrix products.
      site: the site that it reads, in place of what its files say; for files that name a place of which there is
        none here.
      target: the site that it predicts, likewise.
      unit_norm: bring decoder rows to length 1, so that activations become the lengths of what features add, as they
        are for dictionaries trained here. Not possible for topk where the lengths differ.
      dtype: dtype of its matrices on the device: "float32", "bfloat16", or "auto" (the file's). Products are summed in
        float32 whatever it is, and biases and thresholds are float32.
      lm: a language model; the dictionary is then measured on a sample of text, see ``check_dictionary``.
      mesh: the devices, over whose axis ``model`` features are split, of which each reads its part; all processes that
        have some must call this together. None: on the first device of this process, and committed to none, so that it
        goes with values on whatever devices they are.

    Raises:
      UserError: no dictionary is there, its files are damaged, or they ask for what no dictionary here does.
    """
    one_of(matmul_dtype, DTYPES[:2], "matmul_dtype"), one_of(dtype, DTYPES, "dtype")
    if mesh is not None:
        check_mesh(mesh)
    located = _locate(path, site, target)
    logging.info("%s", describe(located.config, located.format))
    if not os.fspath(path).startswith(("hf:", REGISTRY)) and (warning := compare_dictionary(path)):
        logging.warning("%s", warning)
    dictionary = located.load(matmul_dtype, dtype, mesh)
    if unit_norm:
        dictionary = rescale.unit_decoder(dictionary)
    if lm is not None:
        check_dictionary(lm, dictionary)
    return dictionary


@suggests_names
class SAE:
    """SAELens' way to load a dictionary of its registry, for those who know it."""

    @staticmethod
    def from_pretrained(release: str, sae_id: str) -> Dictionary:
        """Load a dictionary of SAELens' registry; see ``load_dictionary``, which takes ``saelens:RELEASE/SAE_ID``.

        Args:
          release: name of the release, such as "gpt2-small-res-jb".
          sae_id: name of the dictionary in it, such as "blocks.8.hook_resid_pre".
        """
        return load_dictionary(f"{REGISTRY}{release}/{sae_id}")


def read_config(path: str | os.PathLike, site: str = "", target: str = "") -> DictionaryConfig:
    """Return the configuration of a dictionary without reading its arrays; see ``load_dictionary``."""
    return _locate(path, site, target).config


def folders_of(path: str | os.PathLike) -> list[Path]:
    """Return the folder itself if it holds a dictionary, or those in it that do, such as the members of ``train/topk``.

    Raises:
      UserError: no dictionary is there.
    """
    paths = _find_all(_resolve(path))
    if not paths:
        _locate(path)  # raises, and says what is there instead
    return paths


def load_all(path: str | os.PathLike) -> dict[str, Dictionary]:
    """Load the dictionary of a folder, or all members of a stack such as ``runs/demo/train/topk``, by their folders.

    Raises:
      UserError: no dictionary is there, or one is damaged.
    """
    return {str(folder): load_dictionary(folder) for folder in folders_of(path)}


@file_errors()
def load_transcoders(
    path: str | os.PathLike, matmul_dtype: str = "float32", site: str = "", target: str = "", dtype: str = "float32"
) -> list[Dictionary]:
    """Load the transcoders of several layers, in the order of layers.

    Args:
      path: a circuit-tracer set, or a folder of folders that ``load_dictionary`` loads, such as the stack
        ``runs/plt/train/standard``.
      matmul_dtype: as for ``load_dictionary``.
      site: kind of the sites read, in place of the kind in a set's description, such as "mlp_in".
      target: kind of the sites predicted, likewise.
      dtype: as for ``load_dictionary``.

    Raises:
      UserError: no transcoders are there, or two of one layer, or they are damaged.
    """
    folder = resolve_path(path)
    loads: list[Callable[[], Dictionary]]
    if circuit_tracer.is_set(folder):
        opened = circuit_tracer.open_transcoders(folder, site, target)
        loads = [functools.partial(opened.load, layer, matmul_dtype, dtype) for layer in range(len(opened.layers))]
    else:
        loads = [functools.partial(entry.load, matmul_dtype, dtype, None) for entry in locate_transcoders(folder)]
    loaded: list[Dictionary] = []
    with show_progress("load_transcoders") as on_progress:
        for load in loads:
            loaded.append(load())
            on_progress(len(loaded), len(loads))
    return loaded


def locate_transcoders(folder: Path) -> list[Located]:
    """Return the transcoders in the folders of a folder, in the order of layers, without reading arrays.

    Raises:
      UserError: there are none, two are of one layer, or one is an SAE.
    """
    located = [_locate(child) for child in _find_all(folder)]
    if not located:
        raise UserError(f"{folder} holds no transcoders: name a circuit-tracer set or a stack that was trained")
    for entry in located:
        if not entry.config.target:
            other = "graphs of SAEs take saejax.open_saes(FOLDER), or --graph.dictionaries"
            raise UserError(f"{folder} holds an SAE of {entry.config.site}: expected transcoders only; {other}")
    layers = [hooks.layer_of(entry.config.target) for entry in located]
    for layer in layers:
        if layers.count(layer) > 1:
            raise UserError(f"{folder} holds several transcoders of layer {layer}: name a folder with one for each")
    return [entry for _, entry in sorted(zip(layers, located, strict=True), key=lambda pair: pair[0])]


@check_classes
def save_dictionary(folder: str | os.PathLike, dictionary: Dictionary, format: str = "saejax") -> None:
    """Write a dictionary as "saejax" (every process of a run must call it) or "saelens"; nothing is replaced.

    It appears whole or not at all.

    Raises:
      UserError: the folder holds a dictionary already, or the format has nothing like this one.
    """
    if format == "circuit_tracer":
        raise UserError("circuit_tracer is a format of sets with one transcoder for every layer: use save_transcoders")
    WRITERS[one_of(format, WRITERS, "format")](_named_folder(folder), dictionary)


@check_classes
def save_transcoders(folder: str | os.PathLike, transcoders: Sequence[Dictionary]) -> None:
    """Write a circuit-tracer set of one transcoder for every layer from 0; it appears whole or not at all.

    Raises:
      UserError: the folder holds a set already, or these do not make one.
    """
    circuit_tracer.save(_named_folder(folder), transcoders)


def _named_folder(folder: str | os.PathLike) -> Path:
    """Return the folder to write to; a ``UserError`` for "", which would be the current one."""
    if not os.fspath(folder):
        raise UserError("the folder to write to is empty: name one, or '.' for the current folder")
    return Path(folder)


def describe(config: DictionaryConfig, format: str) -> str:
    """Return one line about a dictionary: what it is, where it reads, and how it was trained."""
    predicts = f" predicting {config.target}" if config.target else ""
    notes = [f"each token normalised ({config.input_norm})"] if config.input_norm else []
    notes += ["skip path"] if config.skip else []
    notes += ["keeps negative activations"] if config.signed else []
    notes += [f"texts {config.bos} began with BOS"] if config.bos != "auto" else []
    tail = f"; {', '.join(notes)}" if notes else ""
    widths = f"widths {config.d_in:,} to {config.d_out:,}" if config.d_out != config.d_in else f"width {config.d_in:,}"
    size = f"{widths}, {config.n_features:,} features"
    return f"{format}: {config.kind} of {config.site}{predicts}, {size}{tail}"


def _locate(path: str | os.PathLike, site: str = "", target: str = "") -> Located:
    """Find the dictionary at a path or address; a ``UserError`` if there is none, or its description is damaged."""
    folder, (site, target) = _resolve(path), map(_named_site, (site, target))
    if ours := _own_folder(folder):
        with description_errors(ours / own.DESCRIPTION):
            config = _with_sites(own.read_config(ours), site, target)
        return Located(config, "saejax", lambda *how: own.load(ours, *how).with_config(config))
    format = next((format for format in FORMATS if format.matches(folder)), None)
    # The folder of a set may hold a file that is a dictionary by itself: the set is asked for by other functions.
    if format is None or (folder.is_dir() and circuit_tracer.is_set(folder)):
        raise UserError(f"{folder} holds no dictionary {_hint(folder)}")
    # Of SAELens' settings some depend on the site, and some are in its registry.
    is_saelens = format.parse is saelens.parse
    with description_errors(folder):
        parsed = saelens.parse(folder, site, registry_overrides(path)) if is_saelens else format.parse(folder)
    config = _with_sites(parsed.config, site, target)
    hooks.require_sites(config.site, config.target)
    return Located(config, format.name, dataclasses.replace(parsed, config=config).load)


def _resolve(path: str | os.PathLike) -> Path:
    """Return the folder or file that a path or address means; the folder of a file that may stand for it."""
    place = resolve_path(path)
    return place.parent if place.name in _IN_FOLDERS and place.is_file() else place


def _named_site(text: str) -> str:
    """Return the site that a caller names, also by its hook; a ``UserError`` if there is none of this name."""
    site = hooks.to_site(text) if "hook_" in text else text
    hooks.require_sites(site)
    for part in site_parts(site) if site else ():
        if part.partition(".")[0] != hooks.NORMED:
            parse_site(part)
    return site


def _with_sites(config: DictionaryConfig, site: str, target: str) -> DictionaryConfig:
    """Return the config with other sites, where they are given."""
    return dataclasses.replace(config, site=site or config.site, target=target or config.target)


def _own_folder(folder: Path) -> Path | None:
    """Return the path of our own format in a folder; None if it has none."""
    return next((path for path in (folder, folder / "dictionary") if (path / own.DESCRIPTION).is_file()), None)


def _holds_dictionary(path: Path) -> bool:
    """Return whether a folder or file holds a dictionary of any format."""
    return bool(_own_folder(path)) or any(format.matches(path) for format in FORMATS)


def _find_all(folder: Path) -> list[Path]:
    """Return the folder if it holds a dictionary, else the folders in it, and files of one layer each, that do."""
    if not folder.is_dir():
        return [folder] if _holds_dictionary(folder) else []
    # A folder of files of one layer each would otherwise be taken for a folder with a single pickled dictionary.
    layer_files = published.find_layer_files(folder)
    if not layer_files and _holds_dictionary(folder):
        return [folder]
    inside = sorted(child for child in folder.iterdir() if child.is_dir())
    return [child for child in inside if _holds_dictionary(child)] + layer_files


def _hint(folder: Path) -> str:
    """Return what a folder without a dictionary holds, and what to name instead."""
    if not folder.exists():
        return (
            "because it does not exist: name a folder that the train stage finished, or a published dictionary, on the "
            "hub as hf://ORG/NAME/FOLDER"
        )
    cross_layer = "a cross-layer transcoder: trace it with --graph.transcoders or saejax.open_transcoders"
    if folder.is_dir() and circuit_tracer.is_cross_layer(folder):
        return f"but {cross_layer}"
    if circuit_tracer.is_cross_layer_file(folder):
        return f"but a layer of {cross_layer}, given its folder"
    if folder.is_dir() and circuit_tracer.is_set(folder):
        return "but a set of transcoders: name the file of a layer in it, or use load_transcoders"
    if (folder / saelens.DESCRIPTION).is_file():
        return f"but its description alone: {saelens.WEIGHTS} or sae.safetensors is missing"
    inside = [child.name for child in _find_all(folder) if child != folder]
    if inside:
        return f"but folders of such: name one, such as {folder / inside[0]}, of {', '.join(inside)}"
    names = ", ".join(format.name for format in FORMATS)
    return f"({own.DESCRIPTION} is missing): name a folder that the train stage finished, or one of {names}"
