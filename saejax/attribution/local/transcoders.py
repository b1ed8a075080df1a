"""The transcoders of all layers of a model, read layer by layer and row by row.

A set may be circuit-tracer's, Gemma Scope's files, our own checkpoints, or dictionaries in memory.
"""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saejax.attribution.local.dictionaries import LayerDictionaries, check_dictionary, check_width
from saejax.dictionaries import Dictionary, formats
from saejax.dictionaries.formats import circuit_tracer, gemma_scope, hooks, place
from saejax.errors import UserError
from saejax.models import hub
from saejax.models.config import DecoderConfig
from saejax.models.language_model import LanguageModel

_READS = ("mlp_in", "resid_mid", hooks.NORMED)  # kinds of site that transcoders of a graph may read
# A reference of circuit-tracer: repository, folder in it, revision.
_REFERENCE = re.compile(r"(?![./~])[^/@:]+/[^/@:]+(/[^@:]+)?(@.+)?")
_FILES = ("layer_*.safetensors", "W_enc_*.safetensors", "W_dec_*.safetensors", "params_layer_*.safetensors")


class LayerTranscoders(LayerDictionaries):
    """A transcoder for every layer, from layer 0; in a cross-layer set, features write to later layers, too.

    There the decoder of a layer holds the writes of its features to their own layer. See ``LayerDictionaries``.
    """

    @classmethod
    def of(cls, dictionaries: Sequence[Dictionary], name: str = "dictionaries in memory") -> "LayerTranscoders":
        """Return the set of some transcoders in memory, in the order of layers; refuse what holds something else."""
        if not isinstance(dictionaries, Sequence) or not all(isinstance(each, Dictionary) for each in dictionaries):
            raise UserError(
                f"transcoders is a {type(dictionaries).__name__}: expected a list with a dictionary for each layer, or "
                "the name of a set for saejax.open_transcoders; SAEs go through saejax.open_saes"
            )
        configs = [dictionary.config for dictionary in dictionaries]
        if saes := [config.site for config in configs if not config.target]:
            raise UserError(f"the dictionary of {saes[0]} is an SAE, not a transcoder: give saejax.open_saes(...)")
        reads = configs[0].site.partition(".")[0] if configs else "mlp_in"
        return cls(name, configs, dictionaries.__getitem__, reads=reads)

    def check(self, model: LanguageModel) -> "LayerTranscoders":
        """Return the set if it belongs to a model.

        Raises:
          UserError: it lacks a layer, has another width, or was trained on another model or at other sites.
        """
        self.check_shape(model.config, model.source.name)
        for layer, config in enumerate(self.configs):
            check_dictionary(config, model, f"{self.name}, layer {layer}: the transcoder")
        self.resolve_sinks(model)
        return self

    def check_shape(self, model: DecoderConfig, name: str) -> "LayerTranscoders":
        """Return the set if it has a transcoder for each layer of a model of this name and shape.

        Raises:
          UserError: it lacks a layer, has another width, or reads and predicts other sites.
        """
        layers = [hooks.layer_of(config.target) if config.target else -1 for config in self.configs]
        missing = sorted(set(range(model.n_layers)) - set(layers))
        if missing or layers != list(range(model.n_layers)):
            problem = f"no transcoder of layer {missing[0]}" if missing else f"transcoders of the layers {layers}"
            raise UserError(
                f"{self.name} has {problem}: expected one for each layer of {name}, 0 to {model.n_layers - 1}"
            )
        for layer, config in enumerate(self.configs):
            check_width(config, model, name, f"{self.name}, layer {layer}: the transcoder")
            sites = [f"{self.reads}.{layer}"] if self.reads in _READS else []
            if self.reads == hooks.NORMED:  # those in memory may be called after the site behind the gain
                sites.append(f"mlp_in.{layer}")
            if config.site not in sites or config.target != f"mlp_out.{layer}":
                raise UserError(
                    f"{self.name}, layer {layer}: the transcoder reads {config.site} and predicts {config.target}: "
                    f"expected mlp_in.{layer} and mlp_out.{layer}"
                )
        return self

    def describe(self) -> dict[str, Any]:
        """Return what a graph says of the set."""
        return super().describe() | dict(reads=self.reads) | (dict(cross_layer=True) if self.cross_layer else {})


def open_transcoders(
    path: str | Path, revision: str = "main", subfolder: str = "", choice: Sequence[str] = ()
) -> LayerTranscoders:
    """Open a set of transcoders, of which no array is read yet.

    Args:
      path: a circuit-tracer set or Gemma Scope's files, of each layer or cross-layer; a folder of folders with our own
        dictionaries or SAELens ones; the hub id of a repository with such; or a short name, see
        ``place.SHORT_NAMES``.
      revision: branch, tag or commit of a hub repository.
      subfolder: where in it the set is.
      choice: which of several transcoders of a layer are meant, by words of their names such as "16k" and "small"; see
        ``gemma_scope.choose_layers``.

    Raises:
      UserError: there is none, it lacks a layer, or it is damaged.
    """
    name, folder, commit = find_folder(str(path), revision, subfolder, choice)
    is_set = circuit_tracer.is_set(folder)
    layers = [] if is_set else gemma_scope.find_layers(folder, choice)
    if choice and not layers:
        raise UserError(f"{name} has one transcoder of each layer: leave --graph.l0={','.join(choice)} out")
    if is_set:
        files = circuit_tracer.open_set(folder)
    elif layers:
        files = circuit_tracer.of_files(layers)
    else:
        located = formats.locate_transcoders(folder)
        configs = [each.config for each in located]
        return LayerTranscoders(name, configs, lambda layer: located[layer].load("float32", "auto", None))
    # In the files' dtype, in which they stay on the devices.
    load = functools.partial(files.load, dtype="auto")
    writes = files.writes if files.decoders else None
    return LayerTranscoders(name, files.configs, load, files.reads, commit, files, writes)


def find_folder(
    path: str, revision: str = "main", subfolder: str = "", choice: Sequence[str] = ()
) -> tuple[str, Path, str]:
    """Return the name of a set, its folder, which is fetched from the hub if need be, and the commit there.

    Of a repository with several transcoders of each layer only the named ones are fetched. The path may be
    ORG/NAME/SUBFOLDER@REVISION, with hf:// before it or without; for all parameters see ``open_transcoders``.
    """
    path = place.full_name(path)
    # A folder here goes before a repository of the same name.
    if _REFERENCE.fullmatch(path) and not Path(path).exists():
        path = f"hf://{path}"
    path, revision, subfolder = place.split_address(path, revision, subfolder)
    name = f"{path}/{subfolder}" if subfolder else path
    local = Path(path).expanduser()
    if local.is_dir():
        return name, local / subfolder, ""
    if local.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"there is no folder {path} of transcoders: expected one, or a hub id such as org/name, or a short name "
            f"({', '.join(place.SHORT_NAMES)})"
        )
    prefix = f"{subfolder}/" if subfolder else ""
    listed = [f"{prefix}{circuit_tracer.DESCRIPTION}", *(f"{prefix}{pattern}" for pattern in _FILES)]
    # Not what lies in folders: a repository may hold many sets, each of gigabytes.
    root = hub.hub_folder(path, revision, listed, [f"{prefix}*/*"], what="set of transcoders")
    if not circuit_tracer.is_set(root / subfolder):
        inside = [file.removeprefix(prefix) for file in _files_of(path, root.name) if file.startswith(prefix)]
        chosen = gemma_scope.choose_layers(inside, choice, name)
        files = [f"{prefix}{file}" for file in chosen] or [f"{prefix}*"]
        root = hub.hub_folder(path, root.name, files, what="set of transcoders")
    return name, root / subfolder, root.name


def _files_of(repository: str, revision: str) -> list[str]:
    """Return the paths of all files of a hub repository."""
    import huggingface_hub

    with hub.hub_errors(repository, revision, "set of transcoders", circuit_tracer.DESCRIPTION, "a set of transcoders"):
        return huggingface_hub.list_repo_files(repository, revision=revision)
