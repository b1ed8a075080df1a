"""The transcoders of all layers of a model, read layer by layer and row by row.

Where they come from makes no difference here: a circuit-tracer set, Gemma Scope's files, our own checkpoints, or
dictionaries that are in memory already. Of a set on disk nothing but descriptions is kept, and the layer read last.
"""

import abc
import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saejax.dictionaries import Dictionary, DictionaryConfig, folding, formats
from saejax.dictionaries.formats import circuit_tracer, gemma_scope, own
from saejax.dictionaries.formats import circuit_tracer_settings as description
from saejax.errors import UserError
from saejax.models import source
from saejax.models.config import DecoderConfig
from saejax.models.language_model import LanguageModel
from saejax.models.sites import Site

Rows = Callable[[int, str, np.ndarray], np.ndarray]
_ADDRESS = re.compile(r"hf://(?P<repository>[^/]+/[^/]+)/(?P<file>[^?]+)(\?revision=(?P<revision>.+))?")


class DictionarySet(abc.ABC):
    """Dictionaries of several layers, one of each.

    Args:
      name: where the set comes from, for messages and results.
      configs: what each is, in the order of layers.
      load: reads one layer's.
      rows: given a layer, "W_enc" or "W_dec" and features [U], reads the directions that these read from or write to,
        [U, D]; None: by loading the layer.
      reads: see ``FrozenModel``.
      revision: of a hub repository.
    """

    def __init__(
        self,
        name: str,
        configs: Sequence[DictionaryConfig],
        load: Callable[[int], Dictionary],
        rows: Rows | None = None,
        reads: str = "mlp_in",
        revision: str = "",
    ):
        self.name, self.configs, self.reads, self.revision = name, tuple(configs), reads, revision
        self.load = functools.lru_cache(maxsize=1)(lambda layer: _plain(load(layer)))
        stored = not any(config.centred or config.kind == "gated" for config in configs)
        self._rows = rows if rows and stored else self._rows_of_layer

    def rows(self, layer: int, name: str, features_U: np.ndarray) -> np.ndarray:
        """Rows of a layer's "W_dec", or columns of its "W_enc", fp32 [U, D]."""
        return np.asarray(self._rows(layer, name, features_U), np.float32)

    def rows_of(self, name: str, layer_F: np.ndarray, feature_F: np.ndarray) -> np.ndarray:
        """The same of features of several layers, fp32 [F, D]; each layer is read once."""
        vector_FxD = np.empty((len(layer_F), self.configs[0].d_in), np.float32)
        for layer in np.unique(layer_F):
            own = np.flatnonzero(layer_F == layer)
            vector_FxD[own] = self.rows(int(layer), name, feature_F[own])
        return vector_FxD

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a graph says of the set."""

    def _rows_of_layer(self, layer: int, name: str, features_U: np.ndarray) -> np.ndarray:
        arrays = self.load(layer).arrays
        if name == "W_dec":
            return np.asarray(arrays["W_dec_FxD"])[features_U]
        return np.asarray(arrays["W_enc_DxF"])[:, features_U].T


class TranscoderSet(DictionarySet):
    """A transcoder for every layer, from layer 0."""

    @classmethod
    def of(cls, dictionaries: Sequence[Dictionary], name: str = "dictionaries in memory") -> "TranscoderSet":
        """The set of some transcoders that are in memory, in the order of layers."""
        return cls(name, [dictionary.config for dictionary in dictionaries], dictionaries.__getitem__)

    def check(self, model: LanguageModel) -> "TranscoderSet":
        """The set, if it belongs to a model.

        Raises:
          UserError: it lacks a layer, has another width, or was trained on another model or at other sites.
        """
        self.check_shape(model.config, model.source.name)
        for layer, config in enumerate(self.configs):
            check_dictionary(config, model, f"{self.name}, layer {layer}: the transcoder")
        return self

    def check_shape(self, model: DecoderConfig, name: str) -> "TranscoderSet":
        """The set, if it has a transcoder for each layer of a model of this name and shape.

        Raises:
          UserError: it lacks a layer, has another width, or reads and predicts other sites.
        """
        layers = [Site.parse(config.target).layer if config.target else -1 for config in self.configs]
        missing = sorted(set(range(model.n_layers)) - set(layers))
        if missing or layers != list(range(model.n_layers)):
            told = f"no transcoder of layer {missing[0]}" if missing else f"transcoders of the layers {layers}"
            raise UserError(f"{self.name} has {told}: expected one for each layer of {name}, 0 to {model.n_layers - 1}")
        for layer, config in enumerate(self.configs):
            _check_width(config, model, name, f"{self.name}, layer {layer}: the transcoder")
            if (config.site, config.target) != (f"mlp_in.{layer}", f"mlp_out.{layer}"):
                raise UserError(
                    f"{self.name}, layer {layer}: the transcoder reads {config.site} and predicts {config.target}: "
                    f"expected mlp_in.{layer} and mlp_out.{layer}"
                )
        return self

    def describe(self) -> dict[str, Any]:
        """What a graph says of the set."""
        first = self.configs[0]
        own = dict(name=self.name, revision=self.revision, reads=self.reads, layers=len(self.configs))
        return own | dict(kind=first.kind, n_features=first.n_features, skip=first.skip, model=first.model)


def check_dictionary(config: DictionaryConfig, model: LanguageModel, what: str) -> None:
    """A ``UserError`` that begins with ``what`` unless features of such a dictionary can be traced in a model."""
    _check_width(config, model.config, model.source.name, what)
    if config.fingerprint and config.fingerprint != model.source.fingerprint:
        raise UserError(
            f"{what} was trained on {config.model} (fingerprint {config.fingerprint}), but the model is "
            f"{model.source.name} ({model.source.fingerprint})"
        )
    if config.kind == "linear":
        raise UserError(f"{what} is a linear dictionary, which has no active features to trace")


def _check_width(config: DictionaryConfig, model: DecoderConfig, name: str, what: str) -> None:
    if config.d_in != model.d_model:
        raise UserError(
            f"{what} reads {config.d_in} dimensions, but {name} has {model.d_model}: use the model it was trained on"
        )


def open_transcoders(path: str | Path, revision: str = "main", subfolder: str = "") -> TranscoderSet:
    """Opens a set of transcoders, of which no array is read yet.

    Args:
      path: a circuit-tracer set, Gemma Scope's files, a folder of folders with our own dictionaries or SAELens ones; or
        the hub id of a repository with such.
      revision: branch, tag or commit of a hub repository.
      subfolder: where in it the set is.

    Raises:
      UserError: there is none, it lacks a layer, or it is damaged.
    """
    name, folder, commit = find_folder(str(path), revision, subfolder)
    if (folder / formats.SET).exists():
        return _listed(name, folder, commit)
    if files := gemma_scope.find_layers(folder):
        return _gemma_scope(name, files, gemma_scope.before_gain(files), commit, "")
    inside = sorted(child for child in folder.iterdir() if child.is_dir())
    places = [place for child in inside for place in (child, child / "dictionary")]
    places = [place for place in places if (place / own.DESCRIPTION).exists()]
    if not places:
        return TranscoderSet.of(formats.load_transcoders(folder), name)
    configs = [own.read_config(place) for place in places]
    layers = [Site.parse(config.target or config.site).layer for config in configs]
    order = sorted(range(len(layers)), key=layers.__getitem__)
    return TranscoderSet(name, [configs[i] for i in order], lambda layer: own.load(places[order[layer]]))


def find_folder(path: str, revision: str, subfolder: str) -> tuple[str, Path, str]:
    """The name of a set, its folder, which is fetched from the hub if need be, and the commit there."""
    name = f"{path}/{subfolder}" if subfolder else path
    local = Path(path).expanduser()
    if local.is_dir():
        return name, local / subfolder, ""
    if local.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(f"there is no folder {path} of transcoders: expected one, or a hub id such as org/name")
    prefix = f"{subfolder}/" if subfolder else ""
    files = [f"{prefix}{pattern}" for pattern in (formats.SET, "layer_*.safetensors", *(["*"] if subfolder else []))]
    root = source.hub_folder(path, revision, files, what="set of transcoders")
    return name, root / subfolder, root.name


def _listed(name: str, folder: Path, commit: str) -> TranscoderSet:
    """A set with a description of circuit-tracer's; its files may be elsewhere on the hub."""
    settings = description.read(folder / formats.SET)
    before_gain = description.reads_before_gain(settings)
    files = description.layer_files(folder, settings, _fetched)
    if files and files[0].suffix == ".npz":
        return _gemma_scope(name, files, before_gain, commit, str(settings.get("model_name") or ""))
    opened = circuit_tracer.open_set(folder, "mlp_in" if before_gain else "", fetch=_fetched)

    def rows(layer: int, name: str, features_U: np.ndarray) -> np.ndarray:
        return opened.tensors[layer][name].map()[features_U]

    reads = "mlp_normed" if before_gain else "mlp_in"
    return TranscoderSet(name, opened.configs, opened.load, rows, reads, commit)


def _gemma_scope(name: str, files: Sequence[Path], before_gain: bool, commit: str, model: str) -> TranscoderSet:
    configs = [gemma_scope.read_config(file, layer, model) for layer, file in enumerate(files)]
    reads = "mlp_normed" if before_gain else "mlp_in"
    return TranscoderSet(
        name, configs, lambda layer: gemma_scope.load(files[layer], configs[layer]), None, reads, commit
    )


def _fetched(address: str) -> Path:
    """The file of an address such as "hf://org/name/layer_0.safetensors?revision=main"."""
    found = _ADDRESS.fullmatch(address)
    if not found:
        raise UserError(f"{address} is no file on the hub: expected hf://org/name/file")
    from huggingface_hub import hf_hub_download

    repository, file, revision = found["repository"], found["file"], found["revision"] or "main"
    with source.hub_errors(repository, revision, "set of transcoders", file, "a transcoder"):
        return Path(hf_hub_download(repository, file, revision=revision))


def _plain(transcoder: Dictionary) -> Dictionary:
    """The same function with features that are relu, threshold or topk of x W_enc + b_enc; of no layer.

    Programs that run it are compiled once for all layers.
    """
    if transcoder.config.kind == "gated":
        transcoder = folding.as_jumprelu(transcoder)
    transcoder = folding.uncentred(transcoder)
    config = dataclasses.replace(transcoder.config, site="", target="", origin="")
    return Dictionary(config, transcoder.operands, **transcoder.arrays)
