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
from saejax.dictionaries.cross_layer import written
from saejax.dictionaries.formats import circuit_tracer
from saejax.errors import UserError
from saejax.evaluation.loss_recovered import Losses, recovered
from saejax.evaluation.member_data import MemberData
from saejax.evaluation.reconstruction import Reconstruction, Spread, Sums, batches, measures
from saejax.evaluation.replaced import replaced_losses
from saejax.evaluation.results import CrossLayerScores, EvaluateResults, LayerScores, StandInMeans
from saejax.evaluation.rows import blocks
from saejax.files import write_array, write_json
from saejax.models.loading import load_configured_model
from saejax.parallel.mesh import fitting_sharding, make_mesh
from saejax.results import to_json
from saejax.runner.workspace import Run
from saejax.settings import EvaluateConfig, MeshConfig, ModelConfig


class LoadedLayers(NamedTuple):
    """A cross-layer transcoder on the devices.

    Attributes:
      sites: the sites that each layer reads and predicts.
      layers: each layer's encoder, with the decoder to its own layer.
      decoders: each layer's decoder to its own and all later layers, [F, (L - l) D], features split over ``model``.
    """

    sites: tuple[tuple[str, str], ...]
    layers: Sequence[MemberData]
    decoders: Sequence[jax.Array]

    @classmethod
    def of(cls, folder: Path, mesh: Mesh) -> "LoadedLayers":
        """Load the cross-layer transcoder of a folder that ``circuit_tracer.open_set`` opens."""
        opened = circuit_tracer.open_set(folder)
        every = np.arange(opened.configs[0].n_features)
        decoders = []
        for layer in range(len(opened.configs)):
            W_dec_FxX = np.asarray(opened.writes(layer, every), np.float32).reshape(len(every), -1)
            decoders.append(jax.device_put(W_dec_FxX, fitting_sharding(mesh, W_dec_FxX.shape, "model", None)))
        layers = MemberData.of([opened.load(layer) for layer in range(len(decoders))], mesh)
        return cls(tuple((config.site, config.target) for config in opened.configs), layers, decoders)


def evaluate_layers(run: Run, store: Store, folder: Path) -> EvaluateResults:
    """Score the cross-layer transcoder of a train unit on the store's held-out split.

    This writes ``firing_rate.npy`` and ``mean_activation.npy`` [L, F], fp32, and ``scores.json``.

    Raises:
      UserError: the store lacks a layer, or is of another model.
    """
    config, mesh, model = run.configs[EvaluateConfig], make_mesh(run.configs[MeshConfig]), run.configs[ModelConfig]
    loaded = LoadedLayers.of(folder, mesh)
    missing = [site for pair in loaded.sites for site in pair if site not in store.sites]
    if missing:
        last = len(loaded.sites) - 1
        raise UserError(
            f"{store.folder} has no {missing[0]}: --capture.sites=mlp_in.0-{last},mlp_out.0-{last} has all that a "
            "cross-layer transcoder is scored on"
        )
    lm = load_configured_model(model, mesh)
    store.check_model(lm.source)
    scores = reconstruct_layers(loaded, store, mesh, config.batch_tokens)
    losses = replaced_losses(lm, loaded.layers, loaded.decoders, loaded.sites, store, config)
    write_array(run.folder / "firing_rate.npy", np.stack([one.firing_rate_F for one in scores]).astype(np.float32))
    active_LxF = np.stack([one.mean_activation_F for one in scores])
    write_array(run.folder / "mean_activation.npy", active_LxF.astype(np.float32))
    found = _describe(config, scores, losses)
    write_json(run.folder / "scores.json", to_json(found))
    run.say(
        f"explained variance {found.explained_variance:.3f}, L0 {found.l0:.1f}, dead {found.dead_fraction:.1%} on "
        f"{found.tokens:,} held-out tokens; all MLPs replaced: cross-entropy {found.ce.reconstructed:.3f}, clean "
        f"{found.ce.clean:.3f}, means {found.ce.mean_ablated:.3f}"
    )
    return EvaluateResults(run.name, (), found)


def _describe(config: EvaluateConfig, scores: Sequence[Reconstruction], losses: Losses) -> CrossLayerScores:
    dense = config.dense_above
    layers = [
        LayerScores(layer, one.explained_variance, one.cosine, one.l0, one.dead_fraction, one.dense_fraction(dense))
        for layer, one in enumerate(scores)
    ]
    return CrossLayerScores(
        tokens=scores[0].tokens,
        explained_variance=float(np.mean([one.explained_variance for one in scores])),
        l0=float(np.sum([one.l0 for one in scores])),
        dead_fraction=float(np.mean([one.dead_fraction for one in scores])),
        layers=tuple(layers),
        ce=StandInMeans(**losses.ce, tokens=losses.tokens),
        kl=StandInMeans(**losses.kl, tokens=None),
        ce_recovered_mean=recovered(losses.ce, "mean_ablated"),
        kl_recovered_mean=recovered(losses.kl, "mean_ablated"),
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
    for parts, rows in batches(blocks(store, "held_out", names, batch), batch):
        stacked = [np.stack(parts[:count]), np.stack(parts[count:])]
        placed = [jax.device_put(part, fitting_sharding(mesh, part.shape, None, "data", None)) for part in stacked]
        found = jax.device_get(_score_layers(mesh, loaded.layers, loaded.decoders, *placed, rows))
        for layer, own in enumerate(zip(*found, strict=True)):
            sums[layer].add(*own)
            spreads[layer].add(parts[count + layer][:rows])
    if not spreads[0].tokens:
        raise UserError("there are no held-out activations to score: raise --corpus.held_out or give more text")
    return [own.scores(spread) for own, spread in zip(sums, spreads, strict=True)]


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
    bias_LxD = jnp.stack([member.dictionary.b_dec_D[...] for member in layers])
    y_hat_LxBxD = written(f_LxBxF, decoders, mesh) + bias_LxD[:, None]
    return jax.vmap(functools.partial(measures, count=count))(f_LxBxF, f_LxBxF > 0, y_hat_LxBxD, y_LxBxD)
