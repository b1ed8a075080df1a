"""Sets of dictionaries: transcoders of all layers of a model, or SAEs of some of its sites.

They are read layer by layer and row by row. A set of transcoders may be circuit-tracer's, Gemma Scope's files, our own
checkpoints, or dictionaries in memory. ``FeatureOutputs`` sums what features write, of which only the decoder rows in
use are read.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy.sparse import csr_array

from saejax.attribution.settings import GRAPH_ESTIMATES
from saejax.dictionaries import Dictionary, DictionaryConfig, formats, rescale
from saejax.dictionaries.formats import circuit_tracer, gemma_scope, hooks, load_all, place
from saejax.dictionaries.formats.circuit_tracer import TranscoderSet
from saejax.dictionaries.kinds import by_name
from saejax.errors import UserError, file_errors, one_of
from saejax.models import hub
from saejax.models.language_model import LanguageModel
from saejax.models.sinks import NO_SINKS
from saejax.models.sites import Site
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import free_bytes, free_host_bytes, make_mesh, on_host
from saejax.wording import counted

READ_AT_ONCE = 1 << 26  # numbers that are read of decoders at once
KEPT_SHARE = 4  # encoders stay on the devices up to one part in so many of what is free
# SAEs, or folders of such or of trained stacks; at most one of each layer, at any of its sites.
Saes = Dictionary | str | Path | Sequence[Dictionary | str | Path]
_READS = ("mlp_in", "resid_mid", hooks.NORMED)  # kinds of site that transcoders of a graph may read
# A reference of circuit-tracer: repository, folder in it, revision.
_REFERENCE = re.compile(r"(?![./~])[^/@:]+/[^/@:]+(/[^@:]+)?(@.+)?")
_FILES = ("layer_*.safetensors", "W_enc_*.safetensors", "W_dec_*.safetensors", "params_layer_*.safetensors")


class LayerDictionaries:
    """Dictionaries of several layers, one of each, whose encoders stay on the devices as far as there is room.

    Args:
      name: where the set comes from, for messages and results.
      configs: what each is, in the order of layers.
      load: reads one layer's.
      reads: see ``FrozenModel``.
      revision: of a hub repository.
      files: from which rows, and encoders alone, are read; None: by loading the layer.
      writes: of a cross-layer set: given a layer and features [U], reads what these write to their own layer and to
        each later one, [U, L - layer, D]; None: features write to their own layer alone.

    Attributes:
      sizes: to which arrays of earlier prompts were padded; see ``LocalState.padded_size``.
    """

    def __init__(
        self,
        name: str,
        configs: Sequence[DictionaryConfig],
        load: Callable[[int], Dictionary],
        reads: str = "mlp_in",
        revision: str = "",
        files: TranscoderSet | None = None,
        writes: Callable[[int, np.ndarray], np.ndarray] | None = None,
    ):
        self.name, self.configs, self.reads, self.revision = name, tuple(configs), reads, revision
        self._load, self._writes, self._kept = load, writes, dict[tuple[int, Mesh], Dictionary]()
        self._hosts: dict[int, Dictionary] = {}  # of sets whose files have no rows to read
        self._sink_norm: Callable[[str], float] | None = None
        self._sinks_of: LanguageModel | None = None  # whose rule that is
        self.sizes: dict[tuple[str, int], int] = {}
        # Folding changes encoders, so rows in files are not the folded dictionary's.
        self._files = None if any(config.centred or config.kind == "gated" for config in configs) else files

    def __repr__(self) -> str:
        layers = counted(len(self.configs), "layer")
        features = " or ".join(f"{count:,}" for count in sorted({config.n_features for config in self.configs}))
        return f"<{type(self).__name__} of {self.name}: {layers} of {features or 'no'} features>"

    def load(self, layer: int, mesh: Mesh | None = None) -> Dictionary:
        """Return the dictionary of a layer, decoder included, in fp32, or in fp64 if it is that in its file.

        Its features are relu, threshold or topk of x W_enc + b_enc.

        Args:
          layer: its number.
          mesh: the devices, over whose axis ``model`` features are split; None: the first of this process.
        """
        return _widen(self._on_host(layer)).on_mesh(mesh or _first_device())

    def encoder(self, layer: int, mesh: Mesh | None = None) -> Dictionary:
        """Return a layer's dictionary without decoder rows, which stays on the devices in its file's dtype.

        Everything here goes through the layers in order, again and again, so where not all fit, the one that was read
        last makes room: all others are found again.
        """
        mesh = mesh or _first_device()
        if (layer, mesh) not in self._kept:
            encoder = self._encoder_on_host(layer).on_mesh(mesh)
            parts = ((array, array.sharding.shard_shape(array.shape)) for array in encoder.arrays.values())
            size = sum(math.prod(shape) * array.dtype.itemsize for array, shape in parts)
            room = free_bytes(mesh) // KEPT_SHARE // max(size, 1)
            while len(self._kept) >= max(room, 1):
                self._kept.popitem()
            self._kept[layer, mesh] = encoder
        return _widen(self._kept[layer, mesh])

    def _on_host(self, layer: int) -> Dictionary:
        """Return the dictionary of a layer in the dtype of its file, unless it had to be folded; some are kept."""
        if layer not in self._hosts:
            # On the host: a device need not have room for the whole dictionary before it is split.
            with on_host():
                dictionary = self._load(layer)
                if self._sink_norm:
                    dictionary = dictionary.with_sink_norms(self._sink_norm)
                dictionary = _without_layer(_fold(dictionary))
            size = sum(array.nbytes for array in dictionary.arrays.values())
            while len(self._hosts) >= max(free_host_bytes() // KEPT_SHARE // size, 1):
                self._hosts.popitem()  # as in ``encoder``
            self._hosts[layer] = dictionary
        return self._hosts[layer]

    def _encoder_on_host(self, layer: int) -> Dictionary:
        arrays = None
        if self._files:
            with on_host():
                arrays = self._files.load_encoder(layer)
        if arrays is None:
            dictionary = self._on_host(layer)
            arrays = {name: array for name, array in dictionary.arrays.items() if name != "W_dec_FxD"}
            return Dictionary(dictionary.config, dictionary.matmul_dtype, **arrays)
        config = self.configs[layer]
        if self._sink_norm:
            config = config.with_sink_norms(self._sink_norm)
        return _without_layer(Dictionary(config, **arrays))

    def resolve_sinks(self, model: LanguageModel) -> None:
        """Give dictionaries that do not know it the attention-sink rule of a model, whenever they are loaded.

        A set may serve several models in turn, such as one before and after tuning: each has its rule.
        """
        if self._sinks_of is model:
            return
        self.forget()
        normed = (hooks.NORMED, "mlp_in") if self.reads == hooks.NORMED else ()

        def sink_norm(site: str) -> float:
            # A norm without its gain leaves all positions equally long: none is a sink, nothing has to be measured.
            return NO_SINKS if site.partition(".")[0] in normed else model.sink_norm(site)

        self._sink_norm, self._sinks_of = sink_norm, model
        for config in self.configs:
            config.with_sink_norms(sink_norm)  # runs the model now, not while a dictionary is read on the host

    def forget(self) -> None:
        """Free what is kept in memory."""
        self._kept.clear()
        self._hosts.clear()

    def rows(self, layer: int, name: str, feature_U: np.ndarray) -> np.ndarray:
        """Return rows of a layer's "W_dec", or columns of its "W_enc", fp32 [U, D]."""
        if self._files:
            vector_UxD = self._files.rows(layer, name, feature_U)
        elif name == "W_dec":
            vector_UxD = to_host(self._on_host(layer).arrays["W_dec_FxD"])[feature_U]
        else:
            # An encoder that is on the devices already is not read from its file again.
            kept = next((encoder for (number, _), encoder in self._kept.items() if number == layer), None)
            vector_UxD = to_host((kept or self._on_host(layer)).arrays["W_enc_DxF"])[:, feature_U].T
        return np.asarray(vector_UxD, np.float32)

    def rows_of(self, name: str, layer_F: np.ndarray, feature_F: np.ndarray) -> np.ndarray:
        """Return rows of "W_dec" or columns of "W_enc" of features of several layers; each layer is read once.

        Args:
          name: "W_enc" or "W_dec".
          layer_F: int32 layer of each feature.
          feature_F: int32 index of each feature.

        Returns:
          fp32 [F, D].
        """
        vector_FxD = np.empty((len(layer_F), self.configs[0].d_in), np.float32)
        for layer in np.unique(layer_F):
            here = np.flatnonzero(layer_F == layer)
            feature_U, index = np.unique(feature_F[here], return_inverse=True)
            vector_FxD[here] = self.rows(int(layer), name, feature_U)[index]
        return vector_FxD

    @property
    def cross_layer(self) -> bool:
        """True if features also write to later layers than their own."""
        return self._writes is not None

    def written_layers(self, layer: int) -> int:
        """Return the number of layers that the features of a layer write to, from their own on."""
        return len(self.configs) - layer if self.cross_layer else 1

    def writes(self, layer: int, features_U: np.ndarray) -> np.ndarray:
        """Return what features of a layer write to each layer that they write to, fp32 [U, X, D]."""
        if self._writes is None:
            return self.rows(layer, "W_dec", features_U)[:, None]
        return np.asarray(self._writes(layer, features_U), np.float32)

    def check_features(self, named: Iterable[tuple[int, int]], origin: str) -> None:
        """Refuse labels or groups of features that the set does not have: they belong to another set.

        Args:
          named: layers and indices of the features.
          origin: what names them, for the message.

        Raises:
          UserError: the set lacks one.
        """
        features = {hooks.layer_of(config.target or config.site): config.n_features for config in self.configs}
        for layer, feature in named:
            if feature >= features.get(layer, 0):
                raise UserError(
                    f"{origin} names feature {feature} of layer {layer}, where {self.name} has "
                    f"{features.get(layer, 0):,} features: expected features of this set"
                )

    def describe(self) -> dict[str, Any]:
        """Return what a graph says of the set."""
        first = self.configs[0]
        return dict(
            name=self.name, revision=self.revision, layers=len(self.configs), kind=first.kind,
            n_features=first.n_features, skip=first.skip, model=first.model,
        )  # fmt: skip


class FeatureOutputs:
    """The outputs of features to their own layer and, in cross-layer transcoders, to later ones.

    Sums are made as runs go up through the layers: ``add`` a layer's features, then ``pop`` its sum.

    Args:
      dictionaries: the set.
      shape: of the runs' positions, such as (R, T).
    """

    def __init__(self, dictionaries: LayerDictionaries, *shape: int):
        self._dictionaries, self._shape = dictionaries, shape
        # For each layer the positions that something was written at, ascending, and the sums there. What cross-layer
        # features write waits for the layers to come, and in runs with one feature each few positions have any.
        self._sums: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, layer: int, places: np.ndarray, features: np.ndarray, values: np.ndarray | jax.Array) -> None:
        """Add what features of a layer write.

        Args:
          layer: of the features.
          places: flat indices into ``shape``, where the features are active.
          features: indices of the features, in the same shape.
          values: their activations, in the same shape.
        """
        if not places.size:
            return
        written, width = self._dictionaries.written_layers(layer), self._dictionaries.configs[0].d_in
        # A decoder row is read once, however many positions its feature is active at.
        features_U, column_E = np.unique(features.reshape(-1), return_inverse=True)
        place_N, row_E = np.unique(places.reshape(-1), return_inverse=True)
        entries = to_host(values).reshape(-1).astype(np.float32), (row_E.reshape(-1), column_E.reshape(-1))
        # By columns, as features are cut into parts below.
        acts_NxU = csr_array(entries, (len(place_N), len(features_U))).tocsc()
        size = max(READ_AT_ONCE // (written * width), 1)
        sum_NxX = np.zeros((len(place_N), written * width), np.float32)
        for start in range(0, len(features_U), size):
            chunk = slice(start, start + size)
            writes_UxX = self._dictionaries.writes(layer, features_U[chunk]).reshape(-1, written * width)
            sum_NxX += acts_NxU[:, chunk] @ writes_UxX
        for above, sum_NxD in enumerate(np.split(sum_NxX, written, axis=1)):
            self._add_sums(layer + above, place_N, sum_NxD)

    def _add_sums(self, layer: int, place_N: np.ndarray, sum_NxD: np.ndarray) -> None:
        """Add sums at some positions, ascending, to a layer's sums."""
        place_M, sum_MxD = self._sums.get(layer, (place_N[:0], sum_NxD[:0]))
        place_U = np.union1d(place_M, place_N)
        if len(place_U) == len(place_M):
            sum_UxD = sum_MxD
        else:
            sum_UxD = np.zeros((len(place_U), sum_NxD.shape[1]), np.float32)
            sum_UxD[np.searchsorted(place_U, place_M)] = sum_MxD
        sum_UxD[np.searchsorted(place_U, place_N)] += sum_NxD
        self._sums[layer] = place_U, sum_UxD

    def __contains__(self, layer: int) -> bool:
        """Return whether something was written to a layer."""
        return layer in self._sums

    def pop(self, layer: int) -> np.ndarray:
        """Return what was written to a layer, fp32 [..., D], and forget it."""
        sum_xD = np.zeros((int(np.prod(self._shape)), self._dictionaries.configs[0].d_in), np.float32)
        if layer in self._sums:
            place_N, sum_NxD = self._sums.pop(layer)
            sum_xD[place_N] = sum_NxD
        return sum_xD.reshape(*self._shape, -1)


class LayerTranscoders(LayerDictionaries):
    """A transcoder for every layer, from layer 0; in a cross-layer set, features write to later layers, too.

    There the decoder of a layer holds the writes of its features to their own layer. See ``LayerDictionaries``.
    """

    @classmethod
    def of(cls, dictionaries: Sequence[Dictionary], name: str = "dictionaries in memory") -> "LayerTranscoders":
        """Return the set of some transcoders in memory, in the order of layers; refuse what holds something else."""
        if isinstance(dictionaries, LayerSaes):
            raise UserError(
                f"{dictionaries.name} are SAEs: expected transcoders of all layers; features of SAEs are changed by "
                "lm(tokens, edits=[sae.ablate(...)])"
            )
        if not isinstance(dictionaries, Sequence) or not all(
            isinstance(dictionary, Dictionary) for dictionary in dictionaries
        ):
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
        layers = [hooks.layer_of(config.target) if config.target else -1 for config in self.configs]
        missing = sorted(set(range(model.config.n_layers)) - set(layers))
        if missing or layers != list(range(model.config.n_layers)):
            some = f"layer{'s' * (len(layers) != 1)} {', '.join(map(str, layers))}" if layers else "no layer"
            if len(missing) < len(layers):
                some = f"all layers but {', '.join(map(str, missing))}" if missing else some
            last = model.config.n_layers - 1
            raise UserError(
                f"{self.name} has transcoders of {some}: a graph needs one for each layer of {model.source.name}, 0 to "
                f"{last}, such as of --train.sites=mlp_in.0-{last}"
            )
        for layer, config in enumerate(self.configs):
            check_width(config, model, f"{self.name}, layer {layer}: the transcoder")
            sites = [f"{self.reads}.{layer}"] if self.reads in _READS else []
            if self.reads == hooks.NORMED:  # those in memory may be called after the site behind the gain
                sites.append(f"mlp_in.{layer}")
            if config.site not in sites or config.target != f"mlp_out.{layer}":
                raise UserError(
                    f"{self.name}, layer {layer}: the transcoder reads {config.site} and predicts {config.target}: "
                    f"expected mlp_in.{layer} and mlp_out.{layer}"
                )
        for layer, config in enumerate(self.configs):
            check_dictionary(config, model, f"{self.name}, layer {layer}: the transcoder")
        self.resolve_sinks(model)
        return self

    def describe(self) -> dict[str, Any]:
        """Return what a graph says of the set."""
        return super().describe() | dict(reads=self.reads) | (dict(cross_layer=True) if self.cross_layer else {})


@file_errors()
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
        configs = [entry.config for entry in located]
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
    on_hub = is_on_hub(path)
    if on_hub and not place.is_address(path):
        path = f"hf://{path}"
    path, revision, subfolder = place.split_address(path, revision, subfolder)
    name = f"{path}/{subfolder}" if subfolder else path
    local = Path(path).expanduser()
    if local.is_dir():
        return name, local / subfolder, ""
    if local.exists() or not on_hub:
        raise UserError(
            f"there is no folder {path} of transcoders: expected one, a hub id such as hf://org/name, or a short name "
            f"({', '.join(place.SHORT_NAMES)})"
        )
    prefix = f"{subfolder}/" if subfolder else ""
    listed = [f"{prefix}{circuit_tracer.DESCRIPTION}", *(f"{prefix}{pattern}" for pattern in _FILES)]
    # Not what lies in folders: a repository may hold many sets, each of gigabytes.
    root = hub.hub_folder(path, revision, listed, [f"{prefix}*/*"], what="set of transcoders")
    if not circuit_tracer.is_set(root / subfolder):
        import huggingface_hub

        with hub.hub_errors(path, root.name, "set of transcoders", circuit_tracer.DESCRIPTION, "a set of transcoders"):
            paths = huggingface_hub.list_repo_files(path, revision=root.name)
        inside = [file.removeprefix(prefix) for file in paths if file.startswith(prefix)]
        chosen = gemma_scope.choose_layers(inside, choice, name)
        files = [f"{prefix}{file}" for file in chosen] or [f"{prefix}*"]
        root = hub.hub_folder(path, root.name, files, what="set of transcoders")
    return name, root / subfolder, root.name


def is_on_hub(path: str) -> bool:
    """Return whether the path of a set of transcoders is an address on the hub, and no folder here."""
    # A folder here, such as runs, goes before an organisation of this name: what is missing in it is none of the hub's.
    path = place.full_name(path)
    return place.is_address(path) or (_REFERENCE.fullmatch(path) is not None and not Path(Path(path).parts[0]).exists())


class LayerSaes(LayerDictionaries):
    """SAEs of a model's sites; ``load`` and ``rows`` take the number of the layer.

    Args:
      saes: where each comes from, and the SAE.
      estimate: how edges are estimated, one of ``GRAPH_ESTIMATES``: the rules for gradients through the model.
      direct: whether gradients stop at sites; see ``trace.gradient``.

    Attributes:
      sites: of the SAEs, in the order of layers.

    Raises:
      UserError: there are none, one is a transcoder, two are of one layer, or there is no such estimate.
    """

    def __init__(self, saes: Sequence[tuple[str, Dictionary]], estimate: str = "gradient", direct: bool = False):
        self.estimate, self.direct = one_of(estimate, GRAPH_ESTIMATES, "estimate"), direct
        if not saes:
            raise UserError("there is no SAE to trace a graph with: name one at least")
        by_layer: dict[int, tuple[str, Dictionary]] = {}
        for name, sae in saes:
            if sae.config.target:
                raise UserError(
                    f"{name} is a transcoder, from {sae.site} to {sae.config.target}: expected SAEs; transcoders "
                    "are named with --graph.transcoders, of all layers"
                )
            first_name, _ = by_layer.setdefault(Site.parse(sae.site).layer, (name, sae))
            if by_layer[Site.parse(sae.site).layer][1] is not sae:
                raise UserError(
                    f"{first_name} and {name} are SAEs of one layer ({sae.site}): expected one of each layer"
                )
        kept = [by_layer[layer] for layer in sorted(by_layer)]
        self.sites = tuple(Site.parse(sae.site) for _, sae in kept)
        name = ",".join(dict.fromkeys(name for name, _ in kept))
        super().__init__(name, [sae.config for _, sae in kept], lambda layer: by_layer[layer][1])

    def check(self, model: LanguageModel) -> "LayerSaes":
        """Return the set, if it belongs to a model.

        Raises:
          UserError: a site does not exist there, or an SAE has another width or was trained on another model.
        """
        for site, config in zip(self.sites, self.configs, strict=True):
            if (width := site.check(model.config).width(model.config)) != model.config.d_model:
                raise UserError(
                    f"{self.name}: {site} has {width} numbers, and graphs are of sites as wide as the stream "
                    f"({model.config.d_model}): expected an SAE of another site, such as attn_out.{site.layer}"
                )
            check_dictionary(config, model, f"{self.name}: the SAE of {site}")
            if by_name(config.kind).rebuilds_input:
                raise UserError(
                    f"{self.name}: the SAE of {site} is a {config.kind} dictionary, whose features read what others "
                    "leave of the input: edges need features that read the input by an encoder, as those of topk do"
                )
        self.resolve_sinks(model)
        return self

    def describe(self) -> dict[str, Any]:
        """Return what a graph says of the set."""
        return super().describe() | dict(sites=list(map(str, self.sites)))


@file_errors()
def open_saes(saes: Saes, estimate: str = "gradient", direct: bool = False) -> LayerSaes:
    """Return SAEs of some of a model's sites, for ``trace``.

    Args:
      saes: from memory or folders, at most one of each layer; a folder of several, such as a stack, stands for all.
      estimate: of edges: "gradient", or "relp", by the rules of relevance patching.
      direct: whether edges are direct: the sites between are frozen, so that what goes through their features counts in
        the edges from these alone.

    Raises:
      UserError: there are none, one is a transcoder, two are of one layer, or there is no such estimate.
    """
    if not isinstance(saes, Dictionary | str | Path | Iterable):
        raise UserError(f"saes is {saes!r:.60}: expected dictionaries, or their folders")
    named_saes: list[tuple[str, Dictionary]] = []
    for sae in [saes] if isinstance(saes, Dictionary | str | Path) else saes:
        if isinstance(sae, Dictionary):
            named_saes.append(("a dictionary in memory", sae))
            continue
        with on_host():  # devices get their parts when these are needed
            named_saes += load_all(sae).items()
    return LayerSaes(named_saes, estimate, direct)


def check_dictionary(config: DictionaryConfig, model: LanguageModel, what: str) -> None:
    """Refuse, in a message that begins with ``what``, a dictionary whose features cannot be traced in a model."""
    check_width(config, model, what)
    config.check_model(model.source.name, model.source.fingerprint, what)
    if config.input_norm not in ("", "center"):
        raise UserError(
            f"{what} normalises each token ({config.input_norm}), so that what its features add is not linear in them: "
            "use one that does not"
        )
    if config.kind == "linear":
        raise UserError(f"{what} is a linear dictionary, which has no active features to trace")


def check_width(config: DictionaryConfig, model: LanguageModel, what: str) -> None:
    """Refuse a dictionary that reads another width than the model's.

    Args:
      config: of the dictionary.
      model: the language model.
      what: how the message begins.
    """
    for verb, width in (("reads", config.d_in), ("writes", config.d_out)):
        if width != model.config.d_model:
            raise UserError(
                f"{what} {verb} {width} dimensions, but the stream of {model.source.name} has {model.config.d_model}: "
                "use the model it was trained on, and none for sites of other widths"
            )


def _fold(dictionary: Dictionary) -> Dictionary:
    """Return the same function with features that are relu, threshold or topk of x W_enc + b_enc."""
    if dictionary.config.kind == "gated":
        dictionary = rescale.as_jumprelu(dictionary)
    return rescale.drop_mean(rescale.centre(dictionary, False))


def _without_layer(dictionary: Dictionary) -> Dictionary:
    """Return the same arrays without their layer, so that programs are compiled once for all layers.

    The sink rule, which differs between layers, becomes an array.
    """
    config, arrays = dictionary.config, dictionary.arrays
    if config.max_norm is not None:
        arrays |= dict(max_norm=np.float32(config.max_norm))
    plain = dataclasses.replace(config, site="", target="", max_norm=None, target_max_norm=None)
    return Dictionary(plain, dictionary.matmul_dtype, **arrays)


def _widen(dictionary: Dictionary) -> Dictionary:
    """Return the same with arrays of 32 bits, or more."""
    arrays = dictionary.arrays
    wide = {name: array.astype(jnp.promote_types(array.dtype, jnp.float32)) for name, array in arrays.items()}
    return Dictionary(dictionary.config, dictionary.matmul_dtype, **wide)


def _first_device() -> Mesh:
    return make_mesh(devices=jax.local_devices()[:1])
