"""The loss of a model with all of its MLPs replaced at once: by a cross-layer transcoder, by means, by zeros."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saejax.activations.store import Store
from saejax.evaluation import programs
from saejax.evaluation.loss_recovered import Losses, document_batches
from saejax.evaluation.member_data import MemberData
from saejax.models import decoder
from saejax.models.attention import whole_prompts
from saejax.models.config import GRADIENT, DecoderConfig
from saejax.models.language_model import LanguageModel
from saejax.models.layers import SiteHook
from saejax.settings import EvaluateConfig


def replaced_losses(
    lm: LanguageModel,
    layers: Sequence[MemberData],
    decoders: Sequence[jax.Array],
    sites: Sequence[tuple[str, str]],
    store: Store,
    config: EvaluateConfig,
) -> Losses:
    """Return the losses on held-out documents with all MLPs replaced: by the transcoder, by means, by zeros.

    Features are read in the stream as it then is. Where what an MLP reads or adds in the clean model is an attention
    sink it stays as it is.

    Args:
      lm: the language model.
      layers: encoders of a cross-layer transcoder, as in ``cross_layer.LoadedLayers``.
      decoders: its decoders, likewise.
      sites: its sites and targets, likewise.
      store: source of the documents, means and sink rules.
      config: the number of documents, and tokens per program.
    """
    limits = [tuple(np.float32(store.max_norm(site)) for site in pair) for pair in sites]
    means = [store.mean(target, site).astype(np.float32) for site, target in sites]
    documents = store.documents.of("held_out")
    documents = documents[: config.ce_documents] if config.ce_documents else documents
    ce_E, kl_E, tokens = np.zeros(4), np.zeros(4), 0
    for ids_BxT, lengths_B, predicted in document_batches(lm, documents, config.batch_tokens):
        start = decoder.embed(lm.config, lm.params, ids_BxT)
        streams = [start] * 4  # in the order of ``VARIANTS``
        below = [jnp.zeros(start.shape, jnp.float32) for _ in layers]
        for layer, member in enumerate(layers):
            own = lm.config, lm.params, np.int32(layer)
            streams[0], inside_BxT = _clean_layer(*own, streams[0], limits[layer])
            for variant, value_D in ((1, means[layer]), (2, np.zeros_like(means[layer]))):
                streams[variant] = _constant_layer(*own, streams[variant], inside_BxT, value_D)
            streams[3], f_BxTxF = _replaced_layer(*own, streams[3], inside_BxT, member, below[layer])
            below[layer + 1 :] = _written(f_BxTxF, decoders[layer], below[layer + 1 :])
        ce_CxExB, kl_CxExB = programs.compare(lm.config, lm.params, jnp.stack(streams), ids_BxT, lengths_B)
        ce_E += np.asarray(ce_CxExB, np.float64).sum((0, 2))
        kl_E += np.asarray(kl_CxExB, np.float64).sum((0, 2))
        tokens += predicted
    return Losses.of(tokens, ce_E / max(tokens, 1), kl_E / max(tokens, 1))


def _layer(
    config: DecoderConfig, params: decoder.Params, layer: jax.Array, x_BxTxD: jax.Array, hook: SiteHook
) -> jax.Array:
    tables = whole_prompts(config, x_BxTxD.shape[1])
    return decoder.run_layer(config, GRADIENT, params, layer, x_BxTxD, tables, hook)


@functools.partial(jax.jit, static_argnums=0)
def _clean_layer(
    config: DecoderConfig, params: decoder.Params, layer: jax.Array, x_BxTxD: jax.Array, limits: tuple
) -> tuple[jax.Array, jax.Array]:
    """Return the stream leaving a layer, and where its MLP meets no attention sink, bool [B, T]."""
    inside = []

    def look(kind: str, value_BxTxD: jax.Array) -> jax.Array:
        if kind in ("mlp_in", "mlp_out"):
            limit = limits[kind == "mlp_out"]
            inside.append(jnp.linalg.norm(value_BxTxD.astype(jnp.float32), axis=-1) <= limit)
        return value_BxTxD

    leaving_BxTxD = _layer(config, params, layer, x_BxTxD, look)
    return leaving_BxTxD, inside[0] & inside[1]


@functools.partial(jax.jit, static_argnums=0)
def _constant_layer(
    config: DecoderConfig,
    params: decoder.Params,
    layer: jax.Array,
    x_BxTxD: jax.Array,
    inside_BxT: jax.Array,
    value_D: jax.Array,
) -> jax.Array:
    def put(kind: str, value_BxTxD: jax.Array) -> jax.Array:
        return programs.constant(value_BxTxD, inside_BxT, value_D) if kind == "mlp_out" else value_BxTxD

    return _layer(config, params, layer, x_BxTxD, put)


@functools.partial(jax.jit, static_argnums=0)
def _replaced_layer(
    config: DecoderConfig,
    params: decoder.Params,
    layer: jax.Array,
    x_BxTxD: jax.Array,
    inside_BxT: jax.Array,
    member: MemberData,
    below_BxTxD: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return the stream leaving a layer whose MLP is replaced, and the activations of its features."""
    seen: list[jax.Array] = []

    def put(kind: str, value_BxTxD: jax.Array) -> jax.Array:
        if kind == "mlp_in":
            f_BxTxF = member.encode(value_BxTxD.astype(jnp.float32))
            seen.extend((value_BxTxD, jnp.where(inside_BxT[..., None], f_BxTxF, 0.0)))
        if kind != "mlp_out":
            return value_BxTxD
        y_hat_BxTxD = member.decode(seen[1], seen[0]) + below_BxTxD
        return jnp.where(inside_BxT[..., None], y_hat_BxTxD.astype(value_BxTxD.dtype), value_BxTxD)

    return _layer(config, params, layer, x_BxTxD, put), seen[1]


@jax.jit
def _written(f_BxTxF: jax.Array, W_dec_FxX: jax.Array, above: list[jax.Array]) -> list[jax.Array]:
    """Return the sums written to each later layer, with one more layer's features added."""
    if not above:
        return []
    width = above[0].shape[-1]
    parts = jnp.split(f_BxTxF @ W_dec_FxX[:, width:], len(above), axis=-1)
    return [sum_BxTxD + part_BxTxD for sum_BxTxD, part_BxTxD in zip(above, parts, strict=True)]
