"""Temporal SAEs (Lubana et al., 2025, arXiv 2511.01836), in the layout and by the code of SAELens 6.37.

Attention over earlier tokens predicts a part of a token's features, and an SAE encodes what the prediction leaves. With
x the value less the decoder's bias, r = x at first and lambda = 1 / (4 D), each attention layer does

    z = max(lambda r W_enc, 0)
    p = max(attention, 0)                   queries from z, keys and values from z of the tokens before
    s = <p W_dec, r> / |p W_dec|^2,     r <- r - s p W_dec,     predicted <- predicted + s p

and at the end novel = max(lambda r W_enc, 0), the k largest of them. Features are the novel ones; the reconstruction is
(novel + predicted) W_dec + b_dec. So a token's features depend on all tokens before it: whole texts are read, and what
takes tokens one by one, as stages do, takes no temporal SAE.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from saejax.arguments import suggests_names
from saejax.dictionaries import sparsity
from saejax.dictionaries.description import DictionaryConfig
from saejax.dictionaries.formats import hooks, saelens, tensors
from saejax.dictionaries.formats.place import REGISTRY, find_release, resolve_path
from saejax.dictionaries.matmul import matmul
from saejax.dictionaries.sparsity import row
from saejax.errors import UserError, file_errors

_EPSILON = 1e-6  # added to the norm of a prediction, as in SAELens
_PROJECTIONS = ("k_ctx", "q_target", "v_ctx", "c_proj")  # SAELens' names
_DESCRIPTION, _WEIGHTS = "conf.yaml", "latest_ckpt.safetensors"  # as the authors publish them
_LAYER = re.compile(r"layer_(\d+)")
_NAMES = dict(D="W_dec", E="W_enc", b="b_dec")  # the authors' -> SAELens'


@suggests_names
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TemporalSAE:
    """A temporal SAE; a pytree of arrays. Read by ``load_temporal``."""

    W_enc_DxF: jax.Array
    W_dec_FxD: jax.Array
    b_dec_D: jax.Array
    layers: tuple[dict[str, jax.Array], ...]  #: weights and biases of each attention layer, under SAELens' names
    #: site, sizes and conventions; ``kind`` is "topk" with its k, or "standard"; ``centred`` as in other dictionaries.
    config: DictionaryConfig = dataclasses.field(metadata=dict(static=True))
    n_heads: int = dataclasses.field(metadata=dict(static=True))
    factor: float = dataclasses.field(metadata=dict(static=True))  #: of the values that are read

    @property
    def site(self) -> str:
        """The site that is read."""
        return self.config.site

    def __repr__(self) -> str:
        return (
            f"<temporal SAE of {self.site}: {self.config.n_features:,} features, {len(self.layers)} attention layers>"
        )

    def encode(self, x_xD: jax.Array) -> jax.Array:
        """Return the novel features [B, T, F] of whole texts; see ``encode_with_predictions``."""
        return self.encode_with_predictions(x_xD)[0]

    def encode_with_predictions(self, x_xD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the novel and the predicted features of whole texts, [B, T, F] each.

        Args:
          x_xD: the site's values [B, T, D], from the first token of each text on.

        Raises:
          UserError: the values are not of whole texts.
        """
        if np.ndim(x_xD) != 3 or x_xD.shape[-1] != self.config.d_in:
            raise UserError(
                f"values of the shape {list(np.shape(x_xD))}: a temporal SAE reads values of whole texts, "
                f"[texts, tokens, {self.config.d_in}]"
            )
        left_BxTxD = jnp.asarray(x_xD, self.b_dec_D.dtype) * self.factor
        if self.config.centred:
            left_BxTxD = left_BxTxD - row(self.b_dec_D, 3)
        predicted_BxTxF = jnp.zeros((*left_BxTxD.shape[:2], self.config.n_features), left_BxTxD.dtype)
        for layer in self.layers:
            f_BxTxF = jax.nn.relu(self._project(left_BxTxD))
            guess_BxTxF = jax.nn.relu(_attend(layer, f_BxTxF, self.n_heads))
            direction_BxTxD = matmul(guess_BxTxF, self.W_dec_FxD)
            norm_BxTx1 = jnp.linalg.norm(direction_BxTxD, axis=-1, keepdims=True) + _EPSILON
            along_BxTx1 = jnp.sum(direction_BxTxD * left_BxTxD, axis=-1, keepdims=True) / jnp.square(norm_BxTx1)
            predicted_BxTxF = predicted_BxTxF + along_BxTx1 * guess_BxTxF
            left_BxTxD = left_BxTxD - along_BxTx1 * direction_BxTxD
        novel_BxTxF = self._project(left_BxTxD)
        if self.config.k:
            return sparsity.topk(novel_BxTxF, self.config.k), predicted_BxTxF
        return jax.nn.relu(novel_BxTxF), predicted_BxTxF

    def decode(self, f_BxTxF: jax.Array) -> jax.Array:
        """Return what features, novel and predicted ones added up, reconstruct, [B, T, D]."""
        return (matmul(f_BxTxF, self.W_dec_FxD) + row(self.b_dec_D, 3)) / self.factor

    def __call__(self, x_xD: jax.Array) -> jax.Array:
        """Return the reconstruction from novel and predicted features, [B, T, D]."""
        novel_BxTxF, predicted_BxTxF = self.encode_with_predictions(x_xD)
        return self.decode(novel_BxTxF + predicted_BxTxF)

    def _project(self, x_BxTxD: jax.Array) -> jax.Array:
        return matmul(x_BxTxD / (4 * self.config.d_in), self.W_enc_DxF)


def _attend(layer: Mapping[str, jax.Array], f_BxTxF: jax.Array, n_heads: int) -> jax.Array:
    """Return an attention layer's prediction of each token's features from features of the tokens before it."""
    # At a token's own position are the features of the token before it; 0 before the first.
    before_BxTxF = jnp.pad(f_BxTxF, ((0, 0), (1, 0), (0, 0)))[:, :-1]

    def project(name: str, values_BxTxF: jax.Array) -> jax.Array:
        projected = matmul(values_BxTxF, layer[f"{name}.weight"].T) + row(layer[f"{name}.bias"], 3)
        return projected.reshape(*values_BxTxF.shape[:2], n_heads, -1)

    query_BxTxHxK, key_BxTxHxK = project("q_target", f_BxTxF), project("k_ctx", before_BxTxF)
    value_BxTxHxX = project("v_ctx", before_BxTxF)
    scores = jnp.einsum("bthk,bshk->bhts", query_BxTxHxK, key_BxTxHxK, precision="highest")
    scores = scores / math.sqrt(query_BxTxHxK.shape[-1])
    is_before_TxT = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(is_before_TxT[None, None], scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("bhts,bshx->bthx", weights, value_BxTxHxX, precision="highest")
    return project("c_proj", mixed.reshape(f_BxTxF.shape)).reshape(f_BxTxF.shape)


@file_errors()
def load_temporal(path: str | os.PathLike, site: str = "") -> TemporalSAE:
    """Load a temporal SAE of SAELens.

    Args:
      path: a folder with ``cfg.json`` and ``sae_weights.safetensors``, or with the files that its authors publish,
        ``conf.yaml`` and ``latest_ckpt.safetensors``; here, on the hub (hf://ORG/NAME/FOLDER) or in SAELens' registry
        (saelens:RELEASE/SAE_ID).
      site: the site that it reads, in place of the one that the folder names.

    Raises:
      UserError: it is no temporal SAE, it is damaged, or a setting is unknown.
    """
    address = os.fspath(path)
    address, overrides = find_release(address, temporal=True) if address.startswith(REGISTRY) else (address, {})
    folder = resolve_path(address)
    published = (folder / _DESCRIPTION).is_file()
    if published:
        file, weights = folder / _DESCRIPTION, folder / _WEIGHTS
        settings = _read_published(file) | overrides
    else:
        file, weights = folder / saelens.DESCRIPTION, folder / saelens.WEIGHTS
        settings = saelens.read_settings(file, overrides)
    if settings.get("architecture") != saelens.TEMPORAL:
        raise UserError(f"{file}: architecture is {settings.get('architecture')!r}: use saejax.load_dictionary")
    norm = settings.get("normalize_activations", "none")
    if norm not in ("none", None, "expected_average_only_in", "constant_scalar_rescale"):
        raise UserError(f"{file}: normalize_activations is {norm!r}: expected none or constant_scalar_rescale")
    saelens.check_settings(file, settings, transcoder=False)
    site, model = site or saelens.named_site(settings), str(settings.get("model_name") or "")
    hooks.require_sites(site)
    if saelens.find_input_norm(file, settings, model, site, transcoder=False):
        raise UserError(
            f"{file}: its model's weights were centred (center_writing_weights), which a temporal SAE here cannot "
            "follow: use one of the model as published"
        )
    if (kind := settings.get("sae_diff_type", "topk")) not in ("topk", "relu"):
        raise UserError(f"{file}: sae_diff_type is {kind!r}: expected topk or relu")
    state = tensors.open_tensors(weights)
    state = {_NAMES.get(name, name) if published else name: tensor for name, tensor in state.items()}
    arrays = {name: jnp.asarray(np.asarray(tensor.read(), np.float32)) for name, tensor in state.items()}
    tensors.check_finite(weights, arrays)
    heads = tensors.positive_int(file, "n_heads", settings.get("n_heads", 8))
    count = tensors.positive_int(file, "n_attn_layers", settings.get("n_attn_layers", 1))
    names = [
        f"attn_layers.{i}.{name}.{part}" for i in range(count) for name in _PROJECTIONS for part in ("weight", "bias")
    ]
    names += ["W_dec", "b_dec"] + ([] if settings.get("tied_weights", True) else ["W_enc"])
    if missing := [name for name in names if name not in arrays]:
        raise UserError(f"{weights} lacks {', '.join(missing)}: fetch it again")
    k = settings.get("kval_topk") if kind == "topk" else None
    features, width = arrays["W_dec"].shape
    config = DictionaryConfig(
        kind="topk" if k else "standard",
        site=site,
        d_in=width,
        n_features=features,
        k=tensors.positive_int(file, "kval_topk", k) if k else 0,
        centred=tensors.flag(file, settings, "apply_b_dec_to_input", True),
        bos={True: "always", False: "never"}.get(settings.get("prepend_bos"), "auto"),  # type: ignore[arg-type]
        model=model,
    )
    prefixes = [f"attn_layers.{i}." for i in range(count)]
    layers = [
        {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        for prefix in prefixes
    ]
    scaled: Any = settings.get("activation_normalization_factor", 1.0) if norm == "constant_scalar_rescale" else 1.0
    if not isinstance(scaled, int | float) or not 0 < scaled < math.inf:
        raise UserError(f"{file}: activation_normalization_factor is {scaled!r}: expected a number above 0")
    sae = TemporalSAE(
        arrays["W_dec"].T if settings.get("tied_weights", True) else arrays["W_enc"],
        arrays["W_dec"],
        arrays["b_dec"],
        tuple(layers),
        config,
        heads,
        float(scaled),
    )
    try:
        jax.eval_shape(sae, jax.ShapeDtypeStruct((1, 2, width), np.float32))
    except (TypeError, ValueError):
        raise UserError(f"{weights}: its tensors do not fit each other, or not {file}: fetch both again") from None
    return sae


def _read_published(file: Path) -> dict[str, Any]:
    """Return the settings of the authors' description under SAELens' names; the layer is in the folder's name."""
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
        settings: dict[str, Any] = {**read["sae"]}
        factor = float(settings["scaling_factor"])
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, ValueError):
        raise UserError(f"{file} does not describe a temporal SAE, or is damaged: fetch it again") from None
    layers = _LAYER.findall(file.absolute().as_posix())
    return settings | dict(
        architecture=saelens.TEMPORAL,
        normalize_activations="constant_scalar_rescale",
        activation_normalization_factor=factor,
        hook_name=f"blocks.{layers[-1]}.hook_resid_post" if layers else None,
        prepend_bos=None,
    )
