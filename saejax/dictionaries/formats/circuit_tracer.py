"""Transcoders of all layers of a model: circuit-tracer's sets, Gemma Scope's files, and cross-layer transcoders.

A set is a folder with one or two files for each layer from 0, in one of four layouts:

layer_{i}.safetensors     W_enc [F, d], W_dec [F, d], b_enc [F], b_dec [d]; with a JumpReLU
                          activation_function.threshold [F], with a TopK maybe k; with a skip path W_skip [d, d],
                          applied as x @ W_skip.T
params.npz, w_enc ...     Gemma Scope's, see ``gemma_scope``, where the description lists such files
W_enc_{i}.safetensors     a cross-layer transcoder (Ameisen et al., 2025): W_enc_{i} [F, d], b_enc_{i}, b_dec_{i} and,
W_dec_{i}.safetensors     with a JumpReLU, threshold_{i}, with a skip path W_skip_{i} [d, d], applied as x @ W_skip_{i};
                          W_dec_{i} [F, L - i, d], where j writes to layer i + j
params_layer_{i}.safetensors   Gemma Scope 2's cross-layer transcoders: w_enc [d, F], w_dec [F, L, d], where j writes to
                          layer j and nothing is written below i, and maybe affine_skip_connection [d, d]

``config.yaml`` describes it: model_name, model_kind, feature_input_hook, feature_output_hook; for TopK activation and
k; ``transcoders`` lists files that are elsewhere, also on the hub. Some sets have none: then transcoders go from
the MLP's input to its output. A layer with thresholds is a JumpReLU, one without a ReLU, unless the description
says TopK, which keeps the k largest whatever their sign. Other things that it says do not change what a set computes.

Opening a set reads no values (but a few rows of the last layer of Gemma Scope 2's); a layer is read when asked for.
"""

import contextlib
import dataclasses
import hashlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from jax.sharding import Mesh

from saejax.dictionaries import rescale
from saejax.dictionaries.description import BOS
from saejax.dictionaries.formats import gemma_scope, hooks, place, tensors
from saejax.dictionaries.kinds import by_name
from saejax.dictionaries.modules import Dictionary, DictionaryConfig, parameter_table
from saejax.errors import UserError
from saejax.files import write_text
from saejax.models.sites import Site
from saejax.parallel.collectives import is_first_process, to_host

DESCRIPTION = "config.yaml"
LAYERS, ENCODERS, DECODERS = "layer_{}.safetensors", "W_enc_{}.safetensors", "W_dec_{}.safetensors"
_CROSS_FILES = (DESCRIPTION, ENCODERS.format("*"), DECODERS.format("*"))
PER_LAYER, CROSS_LAYER = "transcoder_set", "cross_layer_transcoder"  # values of model_kind
FACTS = "saejax"  # key of the description under which our own folders say more
_LAYER_FILE = re.compile(r"layer_\d+\.safetensors")
_THRESHOLD = "activation_function.threshold"
_HOOKS = ("feature_input_hook", "feature_output_hook")
_ACTIVATIONS = {"relu": "standard", "jumprelu": "jumprelu", "jump_relu": "jumprelu", "topk": "topk"}
# circuit-tracer's code states k of this set, whose description does not.
_KNOWN_K = {"crv-8b-instruct-transcoders": 128}
_SAMPLE = 64  # rows that are looked at
_LAYOUT = dict(W_enc_DxF="W_enc.T", b_enc_F="b_enc", W_dec_FxD="W_dec", b_dec_D="b_dec")
_CROSS_LAYOUT = dict(W_enc_DxF="W_enc", b_enc_F="b_enc", W_dec_FxD="W_dec", b_dec_D="b_dec", threshold_F="threshold")
_CROSS_LAYOUT |= dict(W_skip_DxD="W_skip")


@dataclasses.dataclass(frozen=True)
class TranscoderSet:
    """An open transcoder set."""

    #: each layer's transcoder, described; of a cross-layer one its encoder and its write to its own layer.
    layers: tuple[tensors.Published, ...]
    #: for a cross-layer transcoder, what each layer's features write, [F, X, D], of which the last L - layer rows of
    #: the middle axis are to this and later layers; (): it is none.
    decoders: tuple[tensors.Tensor, ...] = ()

    @property
    def configs(self) -> tuple[DictionaryConfig, ...]:
        """The configuration of each layer's transcoder."""
        return tuple(layer.config for layer in self.layers)

    @property
    def reads(self) -> str:
        """The kind of site that features read, such as "mlp_in"; "mlp_normed" is that before the gain of its norm."""
        return self.configs[0].site.partition(".")[0]

    def load(
        self, layer: int, matmul_dtype: str = "float32", dtype: str = "float32", mesh: Mesh | None = None
    ) -> Dictionary:
        """Read the transcoder of a layer; see ``Published.load``."""
        return self.layers[layer].load(matmul_dtype, dtype, mesh)

    def load_encoder(self, layer: int) -> dict[str, Any] | None:
        """Read the arrays of a layer but its decoder rows, in their file's dtype; see ``Published.load_encoder``."""
        return self.layers[layer].load_encoder()

    def rows(self, layer: int, name: str, feature_U: np.ndarray) -> np.ndarray:
        """Return the directions, [U, D], of features of a layer, by their indices ``feature``.

        The ``name`` is "W_enc", what they read, or "W_dec", what they write to their own layer.
        """
        if name == "W_dec" and self.decoders:
            return self.writes(layer, feature_U)[:, 0]
        return self.layers[layer].directions(name, feature_U)

    def writes(self, layer: int, feature_U: np.ndarray) -> np.ndarray:
        """Return what features of a layer of a cross-layer transcoder, by their indices ``feature``, write.

        [U, L - layer, D], to their own and each later layer.
        """
        rows = self.decoders[layer].rows(feature_U)
        return rows[:, rows.shape[1] - (len(self.layers) - layer) :]


def is_set(folder: Path) -> bool:
    """Return whether a folder holds a set, or a description of one."""
    return (folder / DESCRIPTION).is_file() or bool(_numbered_files(folder, LAYERS)) or is_cross_layer(folder)


def is_layer(file: Path) -> bool:
    """Return whether a path is the file of one layer of a set that is not cross-layer."""
    return file.is_file() and bool(_LAYER_FILE.fullmatch(file.name))


def parse_layer(file: Path) -> tensors.Published:
    """Describe the transcoder in the file of one layer, whose set's description may lie beside it."""
    return _parse_layer(file.parent, read_settings(file.parent), int(file.stem.rpartition("_")[2]), file)


def is_cross_layer(folder: Path) -> bool:
    """Return whether a folder holds a cross-layer transcoder, by its description or the names of its files."""
    if (folder / DESCRIPTION).is_file():
        return read_settings(folder).get("model_kind") == CROSS_LAYER
    # Gemma Scope 2's crosscoders have files of the same names.
    if gemma_scope.is_crosscoder(folder):
        return False
    return any((folder / pattern.format(0)).is_file() for pattern in (ENCODERS, gemma_scope.PARAMS))


def is_cross_layer_file(file: Path) -> bool:
    """Return whether a path is the file of one layer of a cross-layer transcoder, by its name."""
    patterns = (ENCODERS, DECODERS, gemma_scope.PARAMS)
    return file.is_file() and any(file.match(pattern.format("*")) for pattern in patterns)


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the description of a set; the hooks that sets without one have.

    Raises:
      UserError: it is damaged, or describes something else.
    """
    file = folder / DESCRIPTION
    if not file.is_file():
        return dict(
            model_kind=PER_LAYER, model_name="", feature_input_hook="mlp.hook_in", feature_output_hook="hook_mlp_out"
        )
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{file} is not the description of a transcoder set: it is damaged; fetch it again") from None
    if not isinstance(settings, dict) or not all(isinstance(settings.get(key), str) for key in _HOOKS):
        raise UserError(f"{file} lacks {' or '.join(_HOOKS)}: name the folder of a transcoder set")
    if settings.get("model_kind") not in (PER_LAYER, CROSS_LAYER):
        kind = settings.get("model_kind")
        raise UserError(f"{file}: model_kind is {kind!r}, expected {PER_LAYER!r} or {CROSS_LAYER!r}")
    return settings


def open_set(folder: Path, site: str = "", target: str = "") -> TranscoderSet:
    """Open a folder of any of the layouts; see the top of this module.

    ``site`` and ``target`` are kinds of sites, such as "mlp_in", in place of the hooks that the folder names.

    Raises:
      UserError: it is damaged, lacks a layer, or is of a kind that is not known here.
    """
    folder = Path(folder)
    with tensors.description_errors(folder / DESCRIPTION):
        open_kind = _open_cross_layer if is_cross_layer(folder) else _open_layers
        return open_kind(folder, site, target)


def open_transcoders(folder: Path, site: str = "", target: str = "") -> TranscoderSet:
    """Open a set of transcoders that each predict their layer; ``site`` and ``target`` are as for ``open_set``.

    Raises:
      UserError: it is cross-layer: what a layer's features write to their own layer predicts nothing alone.
    """
    opened = open_set(folder, site, target)
    if opened.decoders:
        raise UserError(
            f"{folder} is a cross-layer transcoder, whose layers are no transcoders by themselves: trace it with "
            f"--graph.transcoders={folder}"
        )
    return opened


def _open_layers(folder: Path, site: str, target: str) -> TranscoderSet:
    """Open a set that is not cross-layer; see ``open_set``."""
    settings = read_settings(folder)
    files = _listed_files(folder, settings) or _numbered_files(folder, LAYERS)
    if not files:
        raise UserError(f"{folder} holds no layers of a transcoder set: expected {LAYERS.format(0)} and so on")
    layers = [_parse_layer(folder, settings, layer, file, site, target) for layer, file in enumerate(files)]
    hooks.require_sites(layers[0].config.site, layers[0].config.target)
    if len({(layer.config.d_in, layer.config.n_features) for layer in layers}) > 1:
        listed = ", ".join(f"{layer.config.d_in} to {layer.config.n_features}" for layer in layers)
        raise UserError(f"{folder} has layers of different sizes ({listed}): a set has one")
    return TranscoderSet(tuple(layers))


def of_files(files: Sequence[Path]) -> TranscoderSet:
    """Return the set of Gemma Scope's files, one of each layer."""
    # Gemma Scope's first transcoders read the value before the gain of the norm.
    read = hooks.NORMED if files[0].suffix == ".npz" else "mlp_in"
    parsed = [gemma_scope.parse_file(file, f"{read}.{i}", f"mlp_out.{i}") for i, file in enumerate(files)]
    return TranscoderSet(tuple(parsed))


def _parse_layer(
    folder: Path, settings: Mapping[str, Any], layer: int, file: Path, site: str = "", target: str = ""
) -> tensors.Published:
    """Describe the transcoder of a layer of a set that is not cross-layer; see ``_sites``."""
    model = str(settings.get("model_name") or "")
    site, target = _sites(settings, layer, site, target)
    state = tensors.open_tensors(file)
    if file.suffix == ".npz" or "w_enc" in state:
        return gemma_scope.parse_file(file, site, target, model)
    layout = _LAYOUT | ({"threshold_F": _THRESHOLD} if _THRESHOLD in state else {})
    layout |= {"W_skip_DxD": "W_skip.T"} if "W_skip" in state else {}
    if "k" in state:  # circuit-tracer saves it of a TopK, also where no description is
        settings = dict(activation="topk", k=int(state["k"].numbers()[0])) | dict(settings)
    kind = _kind(folder, settings, layer, _THRESHOLD in state)
    facts = settings.get(FACTS) if isinstance(settings.get(FACTS), dict) else {}
    return tensors.describe(
        file,
        state,
        layout,
        kind=kind,
        site=site,
        target=target,
        k=_k(folder, settings) if kind == "topk" else 0,
        signed=kind == "topk" and bool((facts or {}).get("signed", True)),
        centred=False,
        model=model,
        bos=_bos(settings),
    )


def _bos(settings: Mapping[str, Any]) -> str:
    """Return how texts begin that a set is for: with BOS, as circuit-tracer's do, unless a folder of ours says more."""
    facts = settings.get(FACTS)
    bos = facts.get("bos") if isinstance(facts, dict) else None
    return bos if bos in BOS else "always"


def _listed_files(folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """Return the files that a description lists, fetched if they are on the hub; some list the last one twice."""
    listed = settings.get("transcoders")
    if not listed:
        return []
    if not isinstance(listed, list):
        raise UserError(f"{folder / DESCRIPTION}: transcoders is {listed!r}: expected a list of files")
    return [place.fetch_file(str(file)) if "://" in str(file) else folder / str(file) for file in dict.fromkeys(listed)]


def _numbered_files(folder: Path, pattern: str) -> list[Path]:
    """Return the files of all layers, in order."""
    by_layer = {
        int(file.stem.rpartition("_")[2]): file for file in folder.glob(pattern.format("*")) if file.stem[-1].isdigit()
    }
    missing = sorted(set(range(max(by_layer, default=-1) + 1)) - set(by_layer))
    if missing:
        raise UserError(f"{folder} lacks {pattern.format(missing[0])}: a set has every layer from 0")
    return [by_layer[layer] for layer in sorted(by_layer)]


def _kind(folder: Path, settings: Mapping[str, Any], layer: int, has_threshold: bool) -> str:
    """Return the kind of a layer's transcoder; refuse an activation that does not go with its tensors."""
    stored = "jumprelu" if has_threshold else "standard"
    named = settings.get("activation")
    if named is None:
        return stored
    kind = _ACTIVATIONS.get(str(named).lower())
    if kind is None:
        raise UserError(f"{folder / DESCRIPTION}: activation is {named!r}: expected one of {', '.join(_ACTIVATIONS)}")
    if ("threshold_F" in by_name(kind).vectors) != has_threshold:
        has = "has" if has_threshold else "has no"
        raise UserError(f"{folder / DESCRIPTION}: activation is {named!r}, but layer {layer} {has} {_THRESHOLD}")
    return kind


def _k(folder: Path, settings: Mapping[str, Any]) -> int:
    """Return k of a set's TopK transcoders, from its description or, for one set, from circuit-tracer's code."""
    k = settings.get("k")
    if k is None:
        k = next((value for name, value in _KNOWN_K.items() if name in folder.absolute().as_posix()), None)
    return tensors.positive_int(folder / DESCRIPTION, "k", k)


def _sites(settings: Mapping[str, Any], layer: int, site: str, target: str) -> tuple[str, str]:
    """Return what a layer's transcoder reads and predicts; ``site`` and ``target`` are kinds in place of the hooks."""
    model = str(settings.get("model_name") or "")

    def site_of(hook: str, kind: str) -> str:
        """Return the site that a hook means, or the one of the given kind."""
        return str(Site.parse(f"{kind}.{layer}")) if kind else hooks.to_site(f"blocks.{layer}.{hook}", model)

    return site_of(settings[_HOOKS[0]], site), site_of(settings[_HOOKS[1]], target)


# --- Cross-layer transcoders


def _open_cross_layer(folder: Path, site: str, target: str) -> TranscoderSet:
    """Open a cross-layer transcoder of either layout."""
    settings = read_settings(folder)
    files = _listed_files(folder, settings) or _numbered_files(folder, gemma_scope.PARAMS)
    if files:
        states = [tensors.open_tensors(file) for file in files]
    else:
        files = _numbered_files(folder, ENCODERS)
        decoders = [file.with_name(DECODERS.format(layer)) for layer, file in enumerate(files)]
        states = [tensors.open_tensors(e) | tensors.open_tensors(d) for e, d in zip(files, decoders, strict=True)]
        _check_stamps(folder, settings, [*files, *decoders])
    if not states:
        expected = f"{ENCODERS.format('*')} or {gemma_scope.PARAMS.format('*')}"
        raise UserError(f"{folder} holds no layer of a cross-layer transcoder: expected {expected}")
    facts, layers, writes = _facts(folder, settings, len(states)), [], []
    for layer, (file, state) in enumerate(zip(files, states, strict=True)):
        read, written = _sites(settings, layer, site, target)
        hooks.require_sites(read, written)
        if written != f"mlp_out.{layer}":
            raise UserError(
                f"{folder / DESCRIPTION}: {_HOOKS[1]} is {settings[_HOOKS[1]]!r}, but a cross-layer transcoder writes "
                "to what MLPs add to the stream here: expected hook_mlp_out"
            )
        facts[layer] |= dict(site=read, target=written, model=str(settings.get("model_name") or ""), bos=_bos(settings))
        parsed, decoder = _parse_cross_layer(file, state, layer, len(states), facts[layer])
        layers.append(parsed)
        writes.append(decoder)
    if len({(c.kind, c.d_in, c.n_features, c.skip) for c in (layer.config for layer in layers)}) > 1:
        raise UserError(f"{folder} has layers of different sizes or kinds: a set has one")
    if len(layers) > 1 and writes[-1].shape[1] == len(layers):  # with a row for every layer, also those below
        _check_order(files[-1], writes[-1])
    return TranscoderSet(tuple(layers), tuple(writes))


def _parse_cross_layer(
    file: Path, state: Mapping[str, tensors.Tensor], layer: int, count: int, facts: Mapping[str, Any]
) -> tuple[tensors.Published, tensors.Tensor]:
    """Describe a layer, of ``count``, whose decoder is its write to itself; return all of its writes, too."""
    if "w_enc" in state:
        layout, rows = gemma_scope.layout_of(state), count  # its decoder has a row for layers below its own, too
    else:
        names = {re.sub(r"_\d+$", "", name): name for name in state}
        layout = {ours: names.get(name, name) for ours, name in _CROSS_LAYOUT.items()}
        layout["W_enc_DxF"] += ".T"
        rows = count - layer
    optional = ("threshold_F", "W_skip_DxD")
    layout = {ours: name for ours, name in layout.items() if ours not in optional or name in state}
    matrices = {name: layout[name] for name in ("W_enc_DxF", "W_dec_FxD")}
    arranged, transposed = tensors.arrange(file, state, matrices)
    encoder, decoder = arranged["W_enc_DxF"].shape, arranged["W_dec_FxD"]
    if len(encoder) != 2 or len(decoder.shape) != 3:
        raise UserError(f"{file} is no layer of a cross-layer transcoder: W_enc is {encoder}, W_dec {decoder.shape}")
    width, features = encoder[::-1] if transposed else encoder
    if decoder.shape != (features, rows, width):
        expected = (features, rows, width)
        raise UserError(
            f"{file} does not fit its description: W_dec has the shape {decoder.shape}, expected {expected}"
        )
    config = DictionaryConfig(
        kind="jumprelu" if "threshold_F" in layout else "standard",
        d_in=width,
        n_features=features,
        skip="W_skip_DxD" in layout,
        centred=False,
        **facts,
    )
    del layout["W_dec_FxD"]
    arranged, transposed = tensors.arrange(file, state, layout, config)
    own_FxD = decoder.column(rows - (count - layer))
    return tensors.Published(config, arranged | dict(W_dec_FxD=own_FxD), transposed), decoder


def _check_stamps(folder: Path, settings: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Refuse files of ours that were not written together: layers of other models or trainings fit by their shapes."""
    facts = settings.get(FACTS)
    stamp = facts.get("stamp") if isinstance(facts, dict) else None
    for file in files if stamp else ():
        if tensors.stamp_of(file) != stamp:
            raise UserError(
                f"{file} is not of the set that {folder / DESCRIPTION} describes: copy all files of one set"
            )


def _facts(folder: Path, settings: Mapping[str, Any], layers: int) -> list[dict[str, Any]]:
    """Return fields of each layer's ``DictionaryConfig`` from the description of a folder of ours."""
    if FACTS not in settings:
        return [{} for _ in range(layers)]
    facts = settings[FACTS]
    limits = facts.get("max_norms") if isinstance(facts, dict) else None
    if (
        not isinstance(limits, list)
        or len(limits) != layers
        or not all(isinstance(limit, float | None) for limit in limits)
    ):
        raise UserError(
            f"{folder / DESCRIPTION}: {FACTS} has no norm for each of the {layers} layers (max_norms): damaged"
        )
    shared = {name: str(facts.get(name) or "") for name in ("revision", "fingerprint")}
    return [shared | dict(max_norm=limit) for limit in limits]


def _check_order(file: Path, decoder: tensors.Tensor) -> None:
    """Refuse decoders of all layers in which features of the last layer do not write to the last layer alone."""
    rows = decoder.rows(np.arange(min(_SAMPLE, decoder.shape[0])))
    size_X = np.linalg.norm(np.asarray(rows, np.float32), axis=(0, 2))
    if size_X[:-1].max() > 0.01 * size_X[-1]:
        raise UserError(
            f"{file}: features of the last layer write to layer {int(size_X.argmax())}: expected the last alone"
        )


# --- Writing


def save(folder: Path, transcoders: Sequence[Dictionary]) -> None:
    """Write a set of transcoders, one for every layer from 0, in any order; ``config.yaml`` is written last.

    Raises:
      UserError: circuit-tracer has no such transcoders, a layer is missing or there twice, or they do not make one set.
    """
    save_each(folder, [transcoder.config for transcoder in transcoders], transcoders.__getitem__)


def save_each(folder: Path, configs: Sequence[DictionaryConfig], load: Callable[[int], Dictionary]) -> None:
    """Write a set like ``save``, with one transcoder in memory at a time: ``load(i)`` gives number i."""
    check(configs)
    by_layer = sorted(range(len(configs)), key=lambda index: hooks.layer_of(configs[index].target))
    with tensors.whole_folder(folder, DESCRIPTION, LAYERS.format("*")) as unfinished:
        for layer, index in enumerate(by_layer):
            transcoder = load(index)
            if transcoder.kind.jumprelu:
                transcoder = rescale.as_jumprelu(transcoder)
            # circuit-tracer subtracts no bias from its input: the encoder's bias takes it over.
            transcoder = rescale.centre(transcoder, False)
            named = _file_arrays(transcoder)
            if "threshold" in named:
                named[_THRESHOLD] = named.pop("threshold")
            tensors.write(unfinished / LAYERS.format(layer), named)
        write_text(unfinished / DESCRIPTION, yaml.safe_dump(_describe(configs[by_layer[0]]), allow_unicode=True))


def save_cross_layer(folder: Path, layers: int, load: Callable[[int], tuple[Dictionary, jax.Array]]) -> None:
    """Write a cross-layer transcoder, a layer at a time; all processes of a run must call it.

    ``config.yaml`` also has a key ``saejax``, which circuit-tracer does not read: the model's revision and fingerprint,
    how texts begin, of each layer the norm above which what it reads is an attention sink, and a stamp of all files.

    Args:
      folder: made if missing; ``config.yaml`` is written last.
      layers: number of layers, from 0.
      load: gives a layer, "standard" or "jumprelu"; and what its features write to each layer from their own on,
        [F, layers - layer, D].

    Raises:
      UserError: the folder holds a set already, or circuit-tracer has no such transcoders.
    """
    configs: list[DictionaryConfig] = []
    stamp = ""
    # Parts of the arrays are on the devices of all processes, and the first one writes them.
    with tensors.whole_folder(folder, *_CROSS_FILES) if is_first_process() else contextlib.nullcontext() as unfinished:
        for layer in range(layers):
            dictionary, writes_FxXxD = load(layer)
            config = dictionary.config
            if config.kind not in ("standard", "jumprelu"):
                raise UserError(f"circuit-tracer's cross-layer folders hold no {config.kind} layers")
            named = _file_arrays(rescale.centre(dictionary, False))
            if "W_skip" in named:  # of a set of transcoders the transpose is stored
                named["W_skip"] = named["W_skip"].T
            named.pop("W_dec", None)
            stamp = stamp or _stamp(config, named)
            writes_FxXxD = writes_FxXxD.astype(named["W_enc"].dtype)
            for pattern, of_file in ((ENCODERS, named), (DECODERS, dict(W_dec=writes_FxXxD))):
                of_layer = {f"{name}_{layer}": array for name, array in of_file.items()}
                tensors.write(unfinished and unfinished / pattern.format(layer), of_layer, stamp)
            configs.append(config)
        check(configs)
        if unfinished is None:
            return
        facts: dict[str, Any] = dict(
            revision=configs[0].revision, fingerprint=configs[0].fingerprint, bos=configs[0].bos
        )
        facts |= dict(stamp=stamp, max_norms=[config.max_norm for config in configs])
        settings = _describe(configs[0]) | {"model_kind": CROSS_LAYER, FACTS: facts}
        write_text(unfinished / DESCRIPTION, yaml.safe_dump(settings, allow_unicode=True))


def clear_cross_layer(folder: Path) -> None:
    """Remove a cross-layer transcoder, its description first."""
    # Without its description a folder is no set: what is left of a killed removal is never read.
    for path in (path for pattern in _CROSS_FILES for path in folder.glob(pattern)):
        path.unlink()


def copy_cross_layer(folder: Path, to: Path) -> None:
    """Copy a cross-layer transcoder; it appears whole or not at all.

    Raises:
      UserError: one is there already.
    """
    with tensors.whole_folder(to, *_CROSS_FILES) as unfinished:
        for path in (path for pattern in _CROSS_FILES for path in folder.glob(pattern)):
            shutil.copyfile(path, unfinished / path.name)


def holds_kind(kind: str) -> bool:
    """Return whether a set can hold transcoders of a kind."""
    return kind in _ACTIVATIONS.values() or by_name(kind).jumprelu


def check(configs: Sequence[DictionaryConfig]) -> None:
    """Refuse transcoders that do not make a set, with a ``UserError``."""
    if not configs:
        raise UserError("a transcoder set has one transcoder for every layer from 0, but none was given")
    for config in configs:
        if not config.target:
            raise UserError(f"a transcoder set holds no SAEs, but one of {config.site} was given: write saelens")
        if not holds_kind(config.kind) or config.input_norm:
            what = f"{config.kind} transcoders" + (f" with {config.input_norm}" if config.input_norm else "")
            raise UserError(f"circuit-tracer has no {what}: keep them in the format saejax")
        if config.d_out != config.d_in:
            raise UserError(
                f"a transcoder of a set writes to the stream, which is as wide as what it reads, but one reads "
                f"{config.d_in} dimensions and writes {config.d_out}: write saelens"
            )
        if hooks.layer_of(config.site) != hooks.layer_of(config.target):
            raise UserError(
                f"a transcoder of a set stays in its layer, but one predicts {config.target} of {config.site}"
            )
    layers = sorted(hooks.layer_of(config.target) for config in configs)
    if layers != list(range(len(layers))):
        missing = sorted(set(range(layers[-1] + 1)) - set(layers))
        problem = f"layers {missing} are missing" if missing else f"the layers are {layers}"
        raise UserError(f"a transcoder set has one transcoder for every layer from 0, but {problem}")
    same: dict[str, set] = {
        "model": {config.model for config in configs},
        "width": {config.d_in for config in configs},
        "number of features": {config.n_features for config in configs},
        "skip path": {config.skip for config in configs},
        "hooks": {tuple(_hooks(config).values()) for config in configs},
        "sparsity": {tuple(_sparsity(config).items()) for config in configs},
    }
    differ = [what for what, values in same.items() if len(values) > 1]
    if differ:
        raise UserError(f"the transcoders of a set must be of one {' and '.join(differ)}, and these are not")


def _file_arrays(transcoder: Dictionary) -> dict[str, jax.Array]:
    """Return a transcoder's arrays by the names and in the order of axes of a layer's file."""
    arrays = transcoder.arrays
    named = {ours.rpartition("_")[0]: arrays[ours] for ours in parameter_table(transcoder.config) if ours in arrays}
    return named | {name: named[name].T for name in ("W_enc", "W_skip") if name in named}


def _stamp(config: DictionaryConfig, first: Mapping[str, jax.Array]) -> str:
    """Return a stamp of a set, from its model and the biases of its first layer: no two trainings share them."""
    digest = hashlib.sha256(config.fingerprint.encode())
    for name in sorted(first):
        digest.update(to_host(first[name]).tobytes() if first[name].ndim == 1 else b"")
    return digest.hexdigest()[:16]


def _describe(config: DictionaryConfig) -> dict[str, Any]:
    """Return the content of ``config.yaml`` for a set of such transcoders."""
    settings = dict(model_name=config.model, model_kind=PER_LAYER) | _hooks(config) | _sparsity(config)
    # circuit-tracer's TopK keeps negative activations, too, and its texts begin with BOS; ours are read as they are.
    facts: dict[str, Any] = dict(signed=False) if config.kind == "topk" and not config.signed else {}
    facts |= dict(bos=config.bos) if config.bos != "always" else {}
    return settings | ({FACTS: facts} if facts else {})


def _sparsity(config: DictionaryConfig) -> dict[str, Any]:
    """Return a set's entries for kinds with a k at inference; arrays tell other kinds."""
    return dict(activation=config.kind, k=config.k) if "k" in by_name(config.kind).numbers else {}


def _hooks(config: DictionaryConfig) -> dict[str, str]:
    """Return the hooks without the layer; published sets have ``mlp.hook_out`` where the MLP adds what it gives."""
    named = {}
    for key, site in zip(_HOOKS, (config.site, config.target), strict=True):
        hook = str(hooks.to_hook(site)).removeprefix(f"blocks.{hooks.layer_of(site)}.")
        if hook == "hook_mlp_out" and "mlp" in hooks.modules_of(config.model):
            hook = "mlp.hook_out"
        named[key] = hook
    return named
