"""Dictionaries of several layers of a model, one of each: what transcoders and SAEs have in common."""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.attribution.graph.data import GraphSet
from saejax.dictionaries import Dictionary, DictionaryConfig, rescale
from saejax.dictionaries.formats import hooks
from saejax.dictionaries.modules import parameter_table
from saejax.errors import UserError
from saejax.models.config import DecoderConfig
from saejax.models.language_model import LanguageModel
from saejax.models.sinks import NO_SINKS
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import fitting_sharding, free_bytes, make_mesh, on_host, part_size

ReadRows = Callable[[int, str, np.ndarray], np.ndarray]
KEPT_SHARE = 4  # of what is free, dictionaries that were read may take one part in so many


class LayerDictionaries(abc.ABC):
    """Dictionaries of several layers, one of each, which stay on the devices as far as a quarter of what is free goes.

    Args:
      name: where the set comes from, for messages and results.
      configs: what each is, in the order of layers.
      load: reads one layer's.
      rows: given a layer, "W_enc" or "W_dec" and features [U], reads the directions that these read from or write to,
        [U, D]; None: by loading the layer.
      reads: see ``FrozenModel``.
      revision: of a hub repository.

    Attributes:
      sizes: to which arrays of earlier prompts were filled up; see ``Replacement.filled``.
    """

    def __init__(
        self,
        name: str,
        configs: Sequence[DictionaryConfig],
        load: Callable[[int], Dictionary],
        rows: ReadRows | None = None,
        reads: str = "mlp_in",
        revision: str = "",
    ):
        self.name, self.configs, self.reads, self.revision = name, tuple(configs), reads, revision
        self._load, self._kept = load, dict[tuple[int, Mesh], Dictionary]()
        self._sink_norm: Callable[[str], float] | None = None
        self.sizes: dict[tuple[str, int], int] = {}
        stored = not any(config.centred or config.kind == "gated" for config in configs)
        self._rows = rows if rows and stored else self._rows_of_layer

    def load(self, layer: int, mesh: Mesh | None = None) -> Dictionary:
        """The dictionary of a layer, with features that are relu, threshold or topk of x W_enc + b_enc.

        It comes by way of the host, so no device ever holds more of it than its part, and stays on the devices in its
        file's dtype for the next time. Everything here goes through the layers in order, again and again, so where not
        all fit, the one that was read last makes room: all others are found again.

        Args:
          layer: its number.
          mesh: the devices, over whose axis ``model`` features are split; None: the first of this process.

        Returns:
          The dictionary in fp32, or in fp64 if it is that in its file.
        """
        mesh = mesh or make_mesh(devices=jax.local_devices()[:1])
        if (layer, mesh) not in self._kept:
            dictionary = _placed(self._on_host(layer), mesh)
            room = free_bytes(mesh) // KEPT_SHARE // _part_bytes(dictionary, mesh)
            while len(self._kept) >= max(room, 1):
                self._kept.popitem()
            self._kept[layer, mesh] = dictionary
        return _widened(self._kept[layer, mesh])

    def _on_host(self, layer: int) -> Dictionary:
        """The dictionary of a layer, read anew, in the dtype of its file unless it had to be folded."""
        with on_host():
            dictionary = self._load(layer)
            if self._sink_norm:
                dictionary = dictionary.with_sink_norms(self._sink_norm)
            return _of_any_layer(_plain(dictionary))

    def resolve_sinks(self, model: LanguageModel) -> None:
        """Give dictionaries that do not know it the attention-sink rule of a model, whenever they are loaded."""
        if self._sink_norm is None:
            self._kept.clear()
        normed = (hooks.NORMED, "mlp_in") if self.reads == hooks.NORMED else ()

        def sink_norm(site: str) -> float:
            # A norm without its gain leaves all positions equally long: none is a sink, nothing has to be measured.
            return NO_SINKS if site.partition(".")[0] in normed else model.sink_norm(site)

        self._sink_norm = sink_norm
        for config in self.configs:
            config.with_sink_norms(sink_norm)  # runs the model now, not while a dictionary is read on the host

    def forget(self) -> None:
        """Gives up what is kept in memory."""
        self._kept.clear()

    def rows(self, layer: int, name: str, features_U: np.ndarray) -> np.ndarray:
        """Rows of a layer's "W_dec", or columns of its "W_enc", fp32 [U, D]."""
        return np.asarray(self._rows(layer, name, features_U), np.float32)

    def rows_of(self, name: str, layer_F: np.ndarray, feature_F: np.ndarray) -> np.ndarray:
        """Rows of "W_dec" or columns of "W_enc" of features of several layers; each layer is read once.

        Args:
          name: "W_enc" or "W_dec".
          layer_F, feature_F: int32, the features.

        Returns:
          fp32 [F, D].
        """
        vector_FxD = np.empty((len(layer_F), self.configs[0].d_in), np.float32)
        for layer in np.unique(layer_F):
            own = np.flatnonzero(layer_F == layer)
            vector_FxD[own] = self.rows(int(layer), name, feature_F[own])
        return vector_FxD

    def check_labels(self, labels: Iterable[tuple[int, int]], origin: str) -> None:
        """Refuses labels of features that the set does not have, by layer and number; they are those of another one.

        Args:
          labels: what is labelled.
          origin: of the labels, for the message.
        """
        features = {hooks.layer_of(one.target or one.site): one.n_features for one in self.configs}
        for layer, feature in labels:
            if feature >= features.get(layer, 0):
                raise UserError(
                    f"{origin} names feature {feature} of layer {layer}, where {self.name} has "
                    f"{features.get(layer, 0):,} features: expected labels of this set"
                )

    @abc.abstractmethod
    def describe(self) -> GraphSet:
        """What a graph says of the set."""

    def _rows_of_layer(self, layer: int, name: str, features_U: np.ndarray) -> np.ndarray:
        kept = next((own for (number, _), own in self._kept.items() if number == layer), None)
        arrays = (kept or self._on_host(layer)).arrays
        if name == "W_dec":
            return to_host(arrays["W_dec_FxD"])[features_U]
        return to_host(arrays["W_enc_DxF"])[:, features_U].T


def check_dictionary(config: DictionaryConfig, model: LanguageModel, what: str) -> None:
    """A ``UserError`` that begins with ``what`` unless features of such a dictionary can be traced in a model."""
    check_width(config, model.config, model.source.name, what)
    config.check_model(model.source.name, model.source.fingerprint, what)
    if config.input_norm not in ("", "center"):
        raise UserError(
            f"{what} normalises each token ({config.input_norm}), so that what its features add is not linear in them: "
            "use one that does not"
        )
    if config.kind == "linear":
        raise UserError(f"{what} is a linear dictionary, which has no active features to trace")


def check_width(config: DictionaryConfig, model: DecoderConfig, name: str, what: str) -> None:
    """A ``UserError`` unless a dictionary reads a model's width.

    Args:
      config, model: of the dictionary and the decoder.
      name: of the model.
      what: how the message begins.
    """
    if config.d_in != model.d_model:
        raise UserError(
            f"{what} reads {config.d_in} dimensions, but {name} has {model.d_model}: use the model it was trained on"
        )


def _plain(dictionary: Dictionary) -> Dictionary:
    """The same function with features that are relu, threshold or topk of x W_enc + b_enc, and above 0.

    What negative activations of a signed topk dictionary add becomes part of its error.
    """
    if dictionary.config.signed:
        config = dataclasses.replace(dictionary.config, signed=False)
        dictionary = Dictionary(config, dictionary.matmul_dtype, **dictionary.arrays)
    if dictionary.config.kind == "gated":
        dictionary = rescale.as_jumprelu(dictionary)
    return rescale.without_mean(rescale.uncentred(dictionary))


def _of_any_layer(dictionary: Dictionary) -> Dictionary:
    """The same arrays, of no layer.

    Programs that run it are compiled once for all layers: its sink rule is an array.
    """
    config, arrays = dictionary.config, dictionary.arrays
    if config.max_norm is not None:
        arrays |= dict(max_norm=np.float32(config.max_norm))
    plain = dataclasses.replace(config, site="", target="", max_norm=None, target_max_norm=None)
    return Dictionary(plain, dictionary.matmul_dtype, **arrays)


def _widened(dictionary: Dictionary) -> Dictionary:
    """The same with arrays of 32 bits, or more."""
    arrays = dictionary.arrays
    wide = {name: array.astype(jnp.promote_types(array.dtype, jnp.float32)) for name, array in arrays.items()}
    return Dictionary(dictionary.config, dictionary.matmul_dtype, **wide)


def _placed(dictionary: Dictionary, mesh: Mesh) -> Dictionary:
    """The same on a mesh's devices, features split over ``model``."""
    table = parameter_table(dictionary.config)
    arrays = {
        name: jax.device_put(array, fitting_sharding(mesh, array.shape, *table[name][1] if name in table else ()))
        for name, array in dictionary.arrays.items()
    }
    return Dictionary(dictionary.config, dictionary.matmul_dtype, **arrays)


def _part_bytes(dictionary: Dictionary, mesh: Mesh) -> int:
    """What each device has of it."""
    table, arrays = parameter_table(dictionary.config), dictionary.arrays
    sizes = {name: part_size(mesh.shape, shape, *spec) for name, (shape, spec) in table.items() if name in arrays}
    return sum(size * arrays[name].dtype.itemsize for name, size in sizes.items())
