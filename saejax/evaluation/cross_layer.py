"""Held-out scores of cross-layer transcoders: each layer's, and the model's with all MLPs replaced at once."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.activations.store import Store
from saejax.dictionaries.cross_layer import sum_writes
from saejax.dictionaries.formats import circuit_tracer
from saejax.dictionaries.matmul import matmul
from saejax.evaluation import programs
from saejax.evaluation.loss_recovered import VARIANTS, Losses, LossSums, document_batches, scored_documents
from saejax.evaluation.member_data import MemberData
from saejax.evaluation.reconstruction import Reconstruction, Spread, Sums, batches, measures, read_blocks
from saejax.evaluation.results import CrossLayerScores, LayerScores
from saejax.evaluation.settings import EvaluateConfig
from saejax.models import decoder
from saejax.models.attention import whole_prompt_tables
from saejax.models.config import GRADIENT, DecoderConfig
from saejax.models.language_model import LanguageModel
from saejax.models.layers import SiteHook
from saejax.models.sinks import position_norms
from saejax.parallel.mesh import BY_DOCUMENT, document_devices, fitting_sharding, read_parts


class LoadedLayers(NamedTuple):
    """A cross-layer transcoder on the devices."""

    sites: tuple[tuple[str, str], ...]  #: the sites that each layer reads and predicts
    layers: Sequence[MemberData]  #: each layer's encoder, with the decoder to its own layer
    #: each layer's decoder to its own and all later layers, [F, (L - l) D], features split over ``model``.
    decoders: Sequence[jax.Array]

    @classmethod
    def of(cls, folder: Path, mesh: Mesh) -> "LoadedLayers":
        """Load the cross-layer transcoder of a folder that ``circuit_tracer.open_set`` opens."""
        opened = circuit_tracer.open_set(folder)
        features, width = opened.configs[0].n_features, opened.configs[0].d_in

        def read_decoder(layer: int) -> jax.Array:
            """Read what a layer's features write, each device for its own features."""
            shape = features, (len(opened.configs) - layer) * width
            every, where = np.arange(features), fitting_sharding(mesh, shape, "model", None)
            return read_parts(
                shape,
                where,
                lambda index: np.asarray(opened.writes(layer, every[index[0]]), np.float32).reshape(-1, shape[1]),
            )

        decoders = [read_decoder(layer) for layer in range(len(opened.configs))]
        layers = MemberData.of([opened.load(layer, mesh=mesh) for layer in range(len(decoders))], mesh)
        return cls(tuple((config.site, config.target) for config in opened.configs), layers, decoders)


def describe_layers(scores: Sequence[Reconstruction], losses: Losses) -> CrossLayerScores:
    """Return the figures of a cross-layer transcoder from the scores of its layers and the losses with all replaced."""
    layers = [LayerScores(layer, **score.figures()) for layer, score in enumerate(scores)]
    return CrossLayerScores(
        tokens=scores[0].tokens,
        explained_variance=float(np.mean([score.explained_variance for score in scores])),
        l0=float(np.sum([score.l0 for score in scores])),
        dead_fraction=float(np.mean([score.dead_fraction for score in scores])),
        layers=tuple(layers),
        **losses.figures(),
    )


def reconstruct_layers(loaded: LoadedLayers, store: Store, mesh: Mesh, batch: int) -> list[Reconstruction]:
    """Return the scores of each layer's prediction on the store's held-out rows, without rows that are sinks anywhere.

    Raises:
      UserError: there are none, or a prediction is not finite.
    """
    count, width = len(loaded.sites), store.d(loaded.sites[0][0])
    features = loaded.decoders[0].shape[0]
    spreads, sums = [Spread(width) for _ in range(count)], [Sums(features) for _ in range(count)]
    names = [site for pair in zip(*loaded.sites, strict=True) for site in pair]  # all inputs, then all targets
    # One pass over the store for all layers: a layer's prediction takes the features of all layers below it.
    batch += -batch % document_devices(mesh)  # which ``sum_writes`` has to split evenly
    for parts, rows in batches(read_blocks(store, "held_out", names, batch), batch):
        stacked = [np.stack(parts[:count]), np.stack(parts[count:])]
        placed = [jax.device_put(part, fitting_sharding(mesh, part.shape, None, BY_DOCUMENT, None)) for part in stacked]
        measured = jax.device_get(_score_layers(mesh, loaded.layers, loaded.decoders, *placed, rows))
        for layer, of_layer in enumerate(zip(*measured, strict=True)):
            sums[layer].add(*of_layer)
            spreads[layer].add(parts[count + layer][:rows])
    return [of_layer.scores(spread) for of_layer, spread in zip(sums, spreads, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def _score_layers(
    mesh: Mesh,
    layers: Sequence[MemberData],
    decoders: Sequence[jax.Array],
    x_LxBxD: jax.Array,
    y_LxBxD: jax.Array,
    count: int,
) -> tuple[jax.Array, ...]:
    f_LxBxF = jnp.stack([member.encode(x_LxBxD[layer]) for layer, member in enumerate(layers)])
    written_LxBxD = sum_writes(f_LxBxF, decoders, mesh)
    # What is not of the features: the bias, and a skip path.
    rests = [-member.dictionary.without_bias(jnp.zeros_like(x), x) for member, x in zip(layers, x_LxBxD, strict=True)]
    y_hat_LxBxD = written_LxBxD + jnp.stack(rests)
    return jax.vmap(functools.partial(measures, count=count))(f_LxBxF, f_LxBxF > 0, y_hat_LxBxD, y_LxBxD)


# The loss with all MLPs replaced.


def replaced_losses(lm: LanguageModel, loaded: LoadedLayers, store: Store, config: EvaluateConfig) -> Losses:
    """Return the losses on held-out documents with all MLPs replaced: by the transcoder, by means, by zeros.

    Features are read in the stream as it then is. Where what an MLP reads or adds in the clean model is an attention
    sink it stays as it is.

    Args:
      lm: the language model.
      loaded: the cross-layer transcoder.
      store: source of the documents, means and sink rules.
      config: the number of documents, and tokens per program.
    """
    limits = [
        {kind: np.float32(store.max_norm(site)) for kind, site in zip(("mlp_in", "mlp_out"), pair, strict=True)}
        for pair in loaded.sites
    ]
    means = [store.mean(target, site).astype(np.float32) for site, target in loaded.sites]
    sums, documents = LossSums(1), scored_documents(store, config)
    for ids_BxT, lengths_B, predicted in document_batches(lm, documents, config.batch_tokens):
        start_BxTxD = decoder.embed(lm.config, lm.params, ids_BxT)
        streams = [start_BxTxD] * len(VARIANTS)
        below = [jnp.zeros(start_BxTxD.shape, jnp.float32) for _ in loaded.layers]
        for layer, member in enumerate(loaded.layers):
            # The layer's number is data of the program, so that all layers share it.
            arguments = np.int32(layer), streams, limits[layer], means[layer], member, below[layer]
            streams, f_BxTxF = _run_layer(lm.config, lm.params, *arguments)
            below[layer + 1 :] = _add_writes(f_BxTxF, loaded.decoders[layer], below[layer + 1 :])
        sums.add(lm, streams, ids_BxT, lengths_B, predicted)
    (losses,) = sums.losses()
    return losses


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(
    config: DecoderConfig,
    params: decoder.Params,
    layer: jax.Array,
    streams: Sequence[jax.Array],
    limits: dict[str, jax.Array],
    mean_D: jax.Array,
    member: MemberData,
    below_BxTxD: jax.Array,
) -> tuple[list[jax.Array], jax.Array]:
    """Return the streams leaving a layer, [B, T, D] in the order of ``VARIANTS``, and the features' activations."""
    tables = whole_prompt_tables(config, streams[0].shape[1])
    is_inside: dict[str, jax.Array] = {}  # where the clean model's MLP reads or adds no attention sink
    read: dict[str, jax.Array] = {}  # what the replaced MLP reads, and its features' activations

    def run(variant: int, hook: SiteHook) -> jax.Array:
        return decoder.run_layer(config, GRADIENT, params, layer, streams[variant], tables, hook)

    def look(kind: str, value_BxTxD: jax.Array) -> jax.Array:
        if kind in limits:
            is_inside[kind] = position_norms(value_BxTxD) <= limits[kind]
        return value_BxTxD

    def put_constant(value_D: jax.Array, kind: str, value_BxTxD: jax.Array) -> jax.Array:
        return programs.constant(value_BxTxD, inside_BxT, value_D) if kind == "mlp_out" else value_BxTxD

    def put_reconstruction(kind: str, value_BxTxD: jax.Array) -> jax.Array:
        if kind == "mlp_in":
            f_BxTxF = member.encode(value_BxTxD.astype(jnp.float32))
            # No feature is active where the MLP keeps its own output: it writes nothing to later layers from there
            # either.
            read.update(x=value_BxTxD, f=jnp.where(inside_BxT[..., None], f_BxTxF, 0.0))
        if kind != "mlp_out":
            return value_BxTxD
        y_hat_BxTxD = member.decode(read["f"], read["x"]) + below_BxTxD
        return jnp.where(inside_BxT[..., None], y_hat_BxTxD.astype(value_BxTxD.dtype), value_BxTxD)

    clean_BxTxD = run(0, look)
    inside_BxT = is_inside["mlp_in"] & is_inside["mlp_out"]
    constants = [run(i, functools.partial(put_constant, value_D)) for i, value_D in ((1, mean_D), (2, 0 * mean_D))]
    return [clean_BxTxD, *constants, run(3, put_reconstruction)], read["f"]


@jax.jit
def _add_writes(f_BxTxF: jax.Array, W_dec_FxX: jax.Array, above: list[jax.Array]) -> list[jax.Array]:
    """Return the sums written to each later layer, with one more layer's features added."""
    if not above:
        return []
    width = above[0].shape[-1]
    # The first columns write to the feature's own layer: its dictionary decodes those.
    parts = jnp.split(matmul(f_BxTxF, W_dec_FxX[:, width:]), len(above), axis=-1)
    return [sum_BxTxD + part_BxTxD for sum_BxTxD, part_BxTxD in zip(above, parts, strict=True)]
