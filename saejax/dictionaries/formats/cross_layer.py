"""Cross-layer transcoders (Ameisen et al., 2025, Circuit Tracing, transformer-circuits.pub), read layer by layer.

The features of a layer read before its MLP and write to the output of this MLP and of all later ones. Two formats, told
apart by the names of the files, of which there is a number for each layer:

circuit-tracer    W_enc_{i}.safetensors: W_enc_{i} [F, d], b_enc_{i} [F], b_dec_{i} [d] and, with a JumpReLU,
                  threshold_{i} [F]; W_dec_{i}.safetensors: W_dec_{i} [F, L - i, d], where j writes to layer i + j;
                  config.yaml with the hooks
Gemma Scope 2     params_layer_{i}.safetensors: w_enc [d, F], w_dec [F, L, d], where j writes to layer j and nothing is
                  written below i, b_enc, b_dec, threshold and maybe affine_skip_connection [d, d], applied as x @ skip

Opening a set reads no values but a few rows of the last layer.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from saejax.dictionaries.formats import circuit_tracer_settings as description
from saejax.dictionaries.formats import origin, tensors
from saejax.dictionaries.modules import Dictionary, DictionaryConfig
from saejax.errors import UserError
from saejax.models.weights import Tensor

KIND = description.KINDS[1]
ENCODERS, PARAMS = "W_enc_*.safetensors", "params_layer_*.safetensors"
FACTS = "saejax"  # key of the description under which our own folders say more
_SKIP = "affine_skip_connection"
_NAMED = {"W_enc": "w_enc", "W_dec": "w_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
_SAMPLE = 64  # rows that are looked at


@dataclasses.dataclass(frozen=True)
class CrossLayerSet:
    """An open set, of which nothing but the files' headers is read.

    Attributes:
      configs: what each layer's encoder and its write to its own layer are.
      tensors: each layer's tensors, by circuit-tracer's names without the number of the layer.
      turned: whether encoders are [d, F].
    """

    configs: tuple[DictionaryConfig, ...]
    tensors: tuple[dict[str, Tensor], ...]
    turned: bool

    def load(self, layer: int) -> Dictionary:
        """The encoder of a layer, with what its features write to the layer itself as the decoder."""
        found = self.tensors[layer]
        arrays = {name: tensors.widened(found[name]) for name in found if name != "W_dec"}
        W_enc_DxF = arrays["W_enc"] if self.turned else arrays["W_enc"].T
        named = dict(W_enc_DxF=W_enc_DxF, W_dec_FxD=np.asarray(self._writes(layer)[:, 0], np.float32))
        named |= dict(b_enc_F=arrays["b_enc"], b_dec_D=arrays["b_dec"])
        named |= {
            own: arrays[name] for name, own in (("threshold", "threshold_F"), (_SKIP, "W_skip_DxD")) if name in found
        }
        return Dictionary(self.configs[layer], **{name: jnp.asarray(array) for name, array in named.items()})

    def rows(self, layer: int, name: str, features_U: np.ndarray) -> np.ndarray:
        """What features of a layer read or write.

        Args:
          layer: theirs.
          name: "W_enc", the columns of the encoder, or "W_dec", what they write to their own layer.
          features_U: which.

        Returns:
          [U, D].
        """
        if name == "W_dec":
            return self._writes(layer)[features_U, 0]
        encoder = self.tensors[layer]["W_enc"].map()
        return encoder[:, features_U].T if self.turned else encoder[features_U]

    def writes(self, layer: int, features_U: np.ndarray) -> np.ndarray:
        """What features write to their own layer and to each later one, [U, L - layer, D]."""
        return self._writes(layer)[features_U]

    def _writes(self, layer: int) -> np.ndarray:
        every = self.tensors[layer]["W_dec"].map()
        return every[:, every.shape[1] - (len(self.configs) - layer) :]


def is_one(folder: Path) -> bool:
    """Whether a folder holds such files, or a description that says so."""
    if (folder / description.DESCRIPTION).exists():
        return description.read(folder / description.DESCRIPTION).get("model_kind") == KIND
    return any(True for pattern in (ENCODERS, PARAMS) for _ in folder.glob(pattern))


def open_set(folder: Path, fetch: Callable[[str], Path] | None = None) -> tuple[CrossLayerSet, str]:
    """Opens a folder.

    Args:
      folder: see the top of this module.
      fetch: gives the files of addresses on the hub that the folder's description names.

    Returns:
      The set, and what its features read: a kind of site, or "mlp_normed", "mlp_in" before the gain of its norm.

    Raises:
      UserError: a file is missing or damaged, or the layers do not make one set.
    """
    file = folder / description.DESCRIPTION
    settings = description.read(file) if file.exists() else None
    if settings and settings.get("transcoders"):
        listed = dict.fromkeys(description.layer_files(folder, settings, fetch))  # some name the last one twice
        opened = [(path, tensors.find(path)) for path in listed]
    elif any(folder.glob(PARAMS)):
        opened = [(path, tensors.find(path)) for path in _numbered(folder, PARAMS)]
    else:
        opened = [_both(path) for path in _numbered(folder, ENCODERS)]
        _check_together(file, settings or {}, opened)
    if not opened:
        raise UserError(f"{folder} holds no layer of a cross-layer transcoder: expected {ENCODERS} or {PARAMS}")
    turned = "w_enc" in opened[0][1]
    named = tuple({_own(name): tensor for name, tensor in found.items()} for _, found in opened)
    site, reads, model = "mlp_in", "mlp_in", ""
    facts = _facts(file, settings or {}, len(opened))
    if settings:
        model, before_gain = str(settings.get("model_name") or ""), description.reads_before_gain(settings)
        site = description.sites_of(settings, 0, "mlp_in" if before_gain else "", "")[0].partition(".")[0]
        reads = "mlp_normed" if before_gain else site
    configs = tuple(
        dataclasses.replace(_config(path, f"{site}.{layer}", (layer, len(opened)), found, turned, model), **own)
        for layer, ((path, _), found, own) in enumerate(zip(opened, named, facts, strict=True))
    )
    if len({(config.kind, config.d_in, config.n_features, config.skip) for config in configs}) > 1:
        raise UserError(f"{folder} has layers of different sizes or kinds: a set has one")
    if turned and len(opened) > 1:
        _check_order(opened[-1][0], named[-1]["W_dec"])
    return CrossLayerSet(configs, named, turned), reads


def _check_together(file: Path, settings: Mapping[str, Any], opened: Sequence[tuple[Path, dict[str, Tensor]]]) -> None:
    """Refuses files of ours that were not written together: layers of other models or trainings fit by their shapes."""
    own = settings.get(FACTS)
    stamp = own.get("stamp") if isinstance(own, dict) else None
    for path in (tensor.file for _, found in opened for tensor in found.values()) if stamp else ():
        if tensors.stamp_of(path) != stamp:
            raise UserError(f"{path} is not of the set that {file} describes: copy all files of one set")


def _facts(file: Path, settings: Mapping[str, Any], layers: int) -> list[dict[str, Any]]:
    """Fields of each layer's ``DictionaryConfig`` that the description of a folder of ours says."""
    if FACTS not in settings:
        return [{}] * layers
    found = settings[FACTS]
    limits = found.get("max_norms") if isinstance(found, dict) else None
    if not isinstance(limits, list) or len(limits) != layers or not all(isinstance(one, float) for one in limits):
        raise UserError(f"{file}: {FACTS} has no norm for each of the {layers} layers (max_norms): it is damaged")
    shared = {name: str(found.get(name) or "") for name in ("revision", "fingerprint")}
    return [shared | dict(max_norm=limit) for limit in limits]


def _numbered(folder: Path, pattern: str) -> list[Path]:
    """The files of all layers, in order."""
    by_layer = {int(path.stem.rpartition("_")[2]): path for path in folder.glob(pattern) if path.stem[-1].isdigit()}
    missing = sorted(set(range(max(by_layer, default=0) + 1)) - set(by_layer))
    if missing:
        raise UserError(f"{folder} lacks {pattern.replace('*', str(missing[0]))}: a set has every layer from 0")
    return [by_layer[layer] for layer in sorted(by_layer)]


def _both(path: Path) -> tuple[Path, dict[str, Tensor]]:
    """The tensors of a layer's two files."""
    return path, tensors.find(path) | tensors.find(path.with_name(path.name.replace("W_enc", "W_dec")))


def _own(name: str) -> str:
    """circuit-tracer's name of a tensor without the number of the layer."""
    plain = re.sub(r"_\d+$", "", name)
    return {other: own for own, other in _NAMED.items()}.get(plain, plain)


def _config(
    path: Path, site: str, place: tuple[int, int], found: dict[str, Tensor], turned: bool, model: str
) -> DictionaryConfig:
    """What a layer is; ``place`` is its number and how many there are."""
    if any(name not in found or len(found[name].shape) != axes for name, axes in (("W_enc", 2), ("W_dec", 3))):
        has = ", ".join(sorted(found)) or "nothing"
        raise UserError(f"{path} is no layer of a cross-layer transcoder: it has {has}")
    (layer, layers), (features, _, width) = place, found["W_dec"].shape
    shapes: dict[str, tuple[int, ...]] = dict(
        W_enc=(width, features) if turned else (features, width),
        W_dec=(features, layers if turned else layers - layer, width),
        b_enc=(features,),
        b_dec=(width,),
    )
    shapes |= {name: shape for name, shape in (("threshold", (features,)), (_SKIP, (width, width))) if name in found}
    tensors.check(path, found, shapes)
    return DictionaryConfig(
        kind="jumprelu" if "threshold" in found else "standard",
        site=site,
        target=f"mlp_out.{layer}",
        d_in=width,
        n_features=features,
        skip=_SKIP in found,
        centred=False,
        model=model,
        origin=origin.describe(KIND, found["W_enc"].dtype, {}),
    )


def _check_order(path: Path, decoder: Tensor) -> None:
    """Refuses decoders of all layers in which features of the last layer do not write to the last layer alone."""
    size_X = np.linalg.norm(np.asarray(decoder.map()[:_SAMPLE], np.float32), axis=(0, 2))
    if size_X[:-1].max() > 0.01 * size_X[-1]:
        raise UserError(
            f"{path}: features of the last layer write to layer {int(size_X.argmax())}: expected the last alone"
        )
