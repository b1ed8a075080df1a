"""Validate a graph by running the prompt again.

1. Is the arithmetic right? A feature's activation is raised with everything frozen: every target must move by the
   weight of its edge, times how often the activation was added. With SAEs the same to first order, by forward
   differentiation.
2. Does the local linear model predict the real one? A feature is doubled with nothing frozen: how well do the edges
   predict the effects?

``circuits.faithfulness_curve`` asks whether the shown part does the work.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

from saejax.attribution.checks.changes import scale
from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import FEATURE
from saejax.attribution.local.model import LocalModel
from saejax.attribution.local.readouts import Readouts
from saejax.attribution.results import DoublingResults, EdgeCorrelation
from saejax.attribution.trace import perturbed
from saejax.attribution.trace.perturbed import Places
from saejax.attribution.trace.sae_run import SaeRun
from saejax.attribution.trace.targets import logit_directions
from saejax.models import decoder
from saejax.models.config import DecoderConfig, RunRules
from saejax.parallel.collectives import to_host

_RUNS = 8  # changes that are made in one call
# How often an activation is added with all frozen. The model is then affine, and the rounding of a difference of two
# fp32 streams matters less the larger the difference is.
_FROZEN_TIMES = 64


@dataclasses.dataclass(frozen=True)
class Doubling:
    """Changes of the targets when features were doubled, one by one.

    Attributes:
      node_E: nodes of the graph that were doubled.
      edge_ExR: the weights of their edges.
      frozen_ExR: changes with all frozen, per activation added; with SAEs to first order.
      free_ExR: changes with nothing frozen; with SAEs and direct edges, the sites of other SAEs frozen.
    """

    node_E: np.ndarray
    edge_ExR: np.ndarray
    frozen_ExR: np.ndarray
    free_ExR: np.ndarray

    @property
    def held_error(self) -> float:
        """The largest difference of edges and changes with all frozen, over the largest edge (1 if all are 0)."""
        largest = np.abs(self.edge_ExR).max()
        return float(np.abs(self.frozen_ExR - self.edge_ExR).max() / (largest or 1.0))

    def correlations(self) -> EdgeCorrelation:
        """Return correlations of edges and changes with nothing frozen, over all targets that an edge reaches."""
        reached_ExR = self.edge_ExR != 0
        edges, free = self.edge_ExR[reached_ExR], self.free_ExR[reached_ExR]
        # Two points always lie on a line.
        if len(edges) < 3 or not edges.std() or not free.std():
            return EdgeCorrelation(None, None, None)
        return EdgeCorrelation(
            pearson=float(np.corrcoef(edges, free)[0, 1]),
            spearman=float(spearmanr(edges, free).statistic),
            sign=float((np.sign(edges) == np.sign(free)).mean()),
        )

    @property
    def results(self) -> DoublingResults:
        """The figures that the stage reports."""
        return DoublingResults(len(self.node_E), self.held_error, self.correlations())


def double(local: LocalModel, graph: Graph, readouts: Readouts, count: int = 32, seed: int = 456) -> Doubling:
    """Double features of a whole graph one by one.

    Args:
      local: of the prompt.
      graph: of the local model and the readouts, not pruned.
      readouts: what the graph explains.
      count: number of features, sampled by the seed; all if there are fewer.
      seed: seed of the sample.
    """
    features = graph.nodes[graph.slice_of(FEATURE)]
    index_F = local.active.find(features.layer_N, features.position_N, features.index_N)
    # Ascending: rows of the graph are in this order.
    node_E = np.sort(np.random.default_rng(seed).permutation(len(features))[:count])
    # In float64, as changes are small differences from these values.
    clean_R = np.concatenate([local.active.value_A[index_F], readouts.value_K]).astype(np.float64)

    def effects(times: int, freeze: str) -> np.ndarray:
        """Return by how much targets [E, R] move when a feature's activation is added ``times`` times, over that."""
        rows = [scale(features[np.array([node])], 1 + times) for node in node_E]
        changed = local.run(rows, freeze, readouts=readouts, features=index_F, logits=False)
        return (np.concatenate([changed.feature_RxJ, changed.readout_RxK], axis=1) - clean_R) / times

    edge_ExR = graph.adjacency_RxS[:, node_E].T.astype(np.float64)
    return Doubling(node_E, edge_ExR, effects(_FROZEN_TIMES, "all"), effects(1, "none"))


def double_saes(graph: Graph, run: SaeRun, readouts: Readouts, count: int = 32, seed: int = 456) -> Doubling:
    """Double features of a whole graph of SAEs one by one.

    The targets are the graph's features and its readouts of the stream leaving the last layer.

    Args:
      graph: the graph of the run and the readouts, not pruned.
      run: the run of the prompt.
      readouts: the targets of the graph.
      count: number of features, sampled by the seed; all if there are fewer.
      seed: seed of the sample.
    """
    features, top_K = graph.nodes[graph.slice_of(FEATURE)], readouts.layer_K == graph.n_layers
    slot_F, position_F = np.searchsorted(run.places.layer_S, features.layer_N), features.position_N
    encoder_FxD = run.dictionaries.rows_of("W_enc", features.layer_N, features.index_N)
    node_E = np.sort(np.random.default_rng(seed).permutation(len(features))[:count])
    change_ExD = run.dictionaries.rows_of("W_dec", features.layer_N[node_E], features.index_N[node_E])
    change_ExD *= features.value_N[node_E, None]
    last = np.int32(len(run.ids_P) - 1)
    fixed = run.model.params, run.places, run.stream_LxTxD[0], last, run.frozen_SxTxD
    probes = readouts.pair_Kx2[top_K], readouts.normed_K[top_K], readouts.vector_KxD[top_K]
    moves: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    for start in range(0, len(node_E), _RUNS):
        # The last batch is filled up with copies, so that one program serves all.
        batch = np.resize(np.arange(start, min(start + _RUNS, len(node_E))), _RUNS)
        delta_RxSxTxD = np.zeros((_RUNS, *run.read_SxTxD.shape), np.float32)
        delta_RxSxTxD[np.arange(_RUNS), slot_F[node_E[batch]], position_F[node_E[batch]]] = change_ExD[batch]
        batch_moves = _moved(run.model.config, run.rules, *fixed, *probes, delta_RxSxTxD)
        for rows, (read_RxSxTxD, readout_RxK) in zip(moves, batch_moves, strict=True):
            # Pre-activations without their biases, which cancel in a change.
            feature_RxF = np.einsum("rfd,fd->rf", to_host(read_RxSxTxD)[:, slot_F, position_F], encoder_FxD)
            rows.append(np.concatenate([feature_RxF, readout_RxK], axis=1))
    # Targets in the middle of the model are not read here.
    edge_ExR = graph.adjacency_RxS[np.concatenate([np.ones(len(features), bool), top_K])][:, node_E].T
    return Doubling(node_E, edge_ExR.astype(np.float64), *(np.concatenate(rows)[: len(node_E)] for rows in moves))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _moved(
    config: DecoderConfig,
    rules: RunRules,
    params: decoder.Params,
    places: Places,
    x_TxD: jax.Array,
    last: jax.Array,
    frozen_SxTxD: jax.Array | None,
    pair_Kx2: jax.Array,
    normed_K: jax.Array,
    vector_KxD: jax.Array,
    delta_RxSxTxD: jax.Array,
) -> list[tuple[jax.Array, jax.Array]]:
    """Return the changes of reads [R, S, T, D] and readouts [R, K] with each row: to first order, and exactly.

    Args:
      config: configuration of the decoder (static).
      rules: rules of the run (static).
      params: parameters of the model.
      places: the sites that are read and changed.
      x_TxD: the stream entering layer 0.
      last: position at which readouts are.
      frozen_SxTxD: values at which sites are frozen; None: they are not.
      pair_Kx2: tokens of the readouts, as in ``Readouts``.
      normed_K: which of them pass the final norm.
      vector_KxD: their directions.
      delta_RxSxTxD: what each row adds at the sites.
    """

    def seen(delta_SxTxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        ran = perturbed.run(config, rules, params, places, x_TxD, last, delta_SxTxD, frozen_SxTxD)
        logit_K = logit_directions(config, rules, params, ran.last_D, *pair_Kx2.T)[1]
        return ran.read_SxTxD, jnp.where(normed_K, logit_K, vector_KxD @ ran.last_D)

    def changes_of_row(delta_SxTxD: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        clean, slope = jax.jvp(seen, (jnp.zeros_like(delta_SxTxD),), (delta_SxTxD,))
        changed = seen(delta_SxTxD)
        return [slope, jax.tree.map(jnp.subtract, changed, clean)]

    # Row by row: the streams of all of them at once would take R times the memory.
    return jax.lax.map(changes_of_row, delta_RxSxTxD)
