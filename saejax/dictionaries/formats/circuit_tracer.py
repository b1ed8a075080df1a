"""Transcoder sets of circuit-tracer: a transcoder for every layer of a model, from layer 0.

config.yaml               model_name, model_kind (transcoder_set), feature_input_hook, feature_output_hook; for TopK
                          activation (topk) and k. Written last.
layer_{i}.safetensors     W_enc [F, d], W_dec [F, d], b_enc [F], b_dec [d]; with a JumpReLU
                          activation_function.threshold [F]; with a skip path W_skip [d, d], applied as x @ W_skip.T

A layer with thresholds is a JumpReLU, one without a ReLU, unless the description says TopK. Other things that it says
do not change what a set computes and are ignored, as circuit-tracer does; they come back when the set is written.
Opening a set reads no values; each layer is read when it is asked for.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import yaml

from saejax.dictionaries import rescale
from saejax.dictionaries.formats import circuit_tracer_settings as description
from saejax.dictionaries.formats import origin, tensors
from saejax.dictionaries.kinds import by_name
from saejax.dictionaries.modules import Dictionary, DictionaryConfig, parameter_table
from saejax.errors import UserError
from saejax.files import write_text
from saejax.models.sites import Site
from saejax.models.weights import Tensor

_TRANSPOSED = ("W_enc_DxF", "W_skip_DxD")


@dataclasses.dataclass(frozen=True)
class TranscoderSet:
    """An open set, of which nothing but the files' headers is read.

    Attributes:
      configs: what each layer's transcoder is.
      tensors: each layer's tensors by their names in the file; ``tensors[3]["W_dec"].map()[rows]`` reads these rows.
    """

    configs: tuple[DictionaryConfig, ...]
    tensors: tuple[dict[str, Tensor], ...]

    def __len__(self) -> int:
        return len(self.configs)

    def load(self, layer: int, matmul_dtype: str = "float32") -> Dictionary:
        """Reads the transcoder of a layer; ``matmul_dtype`` as for ``Dictionary``."""
        config, found = self.configs[layer], self.tensors[layer]
        arrays = {own: tensors.widened(found[name]) for name, own in _names(config).items()}
        turned = {own: jnp.asarray(array.T if own in _TRANSPOSED else array) for own, array in arrays.items()}
        return Dictionary(config, matmul_dtype, **turned)


def open_set(
    folder: Path, site: str = "", target: str = "", *, fetch: Callable[[str], Path] | None = None
) -> TranscoderSet:
    """Opens a folder.

    Args:
      folder: holds ``config.yaml`` and the layers.
      site, target: kinds of site, such as "mlp_in", in place of the hooks that the folder names.
      fetch: gives the files of addresses on the hub that the folder names.

    Raises:
      UserError: it is damaged, lacks a layer, or is of a kind that is not known here.
    """
    folder = Path(folder)
    file = folder / description.DESCRIPTION
    settings = description.read(file, description.KINDS[:1])
    files = description.layer_files(folder, settings, fetch)
    opened = tuple(tensors.find(file) for file in files)
    configs = []
    for layer, found in enumerate(opened):
        kind = description.kind_of(file, settings, layer, description.THRESHOLD in found)
        read, predicted = description.sites_of(settings, layer, site, target)
        features, width = _sizes(files[layer], found)
        config = DictionaryConfig(
            kind=kind,
            site=read,
            target=predicted,
            d_in=width,
            n_features=features,
            k=settings["k"] if "k" in by_name(kind).numbers else 0,
            skip="W_skip" in found,
            centred=False,
            model=str(settings.get("model_name") or ""),
            origin=origin.describe(description.FORMAT, found["W_enc"].dtype, settings),
        )
        tensors.check(files[layer], found, _shapes(config))
        if config.k > features:
            raise UserError(f"{file}: k is {config.k}, more than the {features} features")
        configs.append(config)
    if len({(config.d_in, config.n_features) for config in configs}) > 1:
        sizes = ", ".join(f"{config.d_in} to {config.n_features}" for config in configs)
        raise UserError(f"{folder} has layers of different sizes ({sizes}): a set has one")
    return TranscoderSet(tuple(configs), opened)


def load(folder: Path, matmul_dtype: str = "float32", site: str = "", target: str = "") -> list[Dictionary]:
    """Reads all layers of a set, in order; the arguments are those of ``open_set``."""
    opened = open_set(folder, site, target)
    return [opened.load(layer, matmul_dtype) for layer in range(len(opened))]


def save(folder: Path, transcoders: Sequence[Dictionary]) -> None:
    """Writes a set.

    Args:
      folder: made if missing; ``config.yaml`` is written last.
      transcoders: one for every layer from 0, in any order.

    Raises:
      UserError: circuit-tracer has no such transcoders, a layer is missing or there twice, or they do not make one set.
    """
    save_each(folder, [transcoder.config for transcoder in transcoders], transcoders.__getitem__)


def save_each(folder: Path, configs: Sequence[DictionaryConfig], load: Callable[[int], Dictionary]) -> None:
    """Writes a set like ``save``, with one transcoder in memory at a time: ``load(i)`` gives that of ``configs[i]``."""
    description.check(configs)
    by_layer = sorted(range(len(configs)), key=lambda index: Site.parse(configs[index].target).layer)
    with tensors.whole_folder(folder, description.DESCRIPTION, description.LAYERS) as beside:
        for layer, index in enumerate(by_layer):
            transcoder = load(index)
            if transcoder.kind.jumprelu:
                transcoder = rescale.as_jumprelu(transcoder)
            transcoder = rescale.uncentred(transcoder)
            arrays, _ = tensors.host_arrays(transcoder)
            turned = {own: array.T if own in _TRANSPOSED else array for own, array in arrays.items()}
            named = {name: turned[own] for name, own in _names(transcoder.config).items()}
            tensors.write(beside / f"layer_{layer}.safetensors", named)
        settings = description.describe(configs[by_layer[0]])
        write_text(beside / description.DESCRIPTION, yaml.safe_dump(settings, allow_unicode=True))


def _names(config: DictionaryConfig) -> dict[str, str]:
    """Our names of arrays by those of the file."""
    names = tensors.plain_names(config)
    return {description.THRESHOLD if name == "threshold" else name: own for name, own in names.items()}


def _shapes(config: DictionaryConfig) -> dict[str, tuple[int, ...]]:
    d, f = config.d_in, config.n_features
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (f, d), "W_dec": (f, d), "b_enc": (f,), "b_dec": (d,)}
    if "threshold_F" in parameter_table(config):
        shapes[description.THRESHOLD] = (f,)
    return shapes | ({"W_skip": (d, d)} if config.skip else {})


def _sizes(file: Path, found: dict[str, Tensor]) -> tuple[int, int]:
    """Features and width."""
    shapes = {name: found[name].shape for name in ("W_enc", "W_dec") if name in found}
    if len(shapes) < 2 or any(len(shape) != 2 for shape in shapes.values()):
        raise UserError(f"{file} lacks matrices W_enc and W_dec: it has {', '.join(sorted(found)) or 'nothing'}")
    (features, width), (_, out) = shapes["W_enc"], shapes["W_dec"]
    if out != width:
        raise UserError(
            f"{file} reads width {width} and predicts {out}: here a transcoder's output is as wide as its input"
        )
    return features, width
