"""How much of the answer circuits of more and more edges carry: CPR and CMD of MIB, for edges between places.

Nodes are words, MLPs at a position, and the logit; heads are inside the edges. An edge of the circuit carries what its
source has in the circuit's own run, any other what it has in the counterpart's run, so each target is run with sources
of its own. With m the mean difference between the logits of the right answer and of the counterpart's,

    f(C) = (m(C) - m(0)) / (m(all) - m(0))

and CPR and CMD are areas under f and |f - 1| over the share of edges that is kept (Mueller et al., 2025, arXiv
2504.13151; ``causal.faithfulness``). What differs from MIB: edges are of places and not of heads, their order is one
of influence, which has no sign, and there are few of them, so that the smallest sizes are one edge or none.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saejax.causal.clustered import Resampling
from saejax.causal.faithfulness import SHARES, area, faithfulness
from saejax.dictionaries import Dictionary
from saejax.ground_truth.algorithms.results import EdgeCurve, EdgeCurves
from saejax.ground_truth.circuits.edges import Edges, possible
from saejax.models import decoder
from saejax.models.attention import Layer
from saejax.models.config import DecoderConfig
from saejax.models.decoder import Params, run_layers
from saejax.models.language_model import LanguageModel
from saejax.results import Interval
from saejax.tasks.behaviours import Prompt

_ROWS, _DRAWS, _BOOTSTRAP = 512, 20, 1000  # runs at a time, at most; random orders; resamples of prompts


@jax.jit(static_argnums=0)
def _run(
    config: DecoderConfig, params: Params, ids_ExT: jax.Array, put_ExLxT: jax.Array, lent_ExLxTxD: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits at the end, [E, V], and of all MLPs what they read and give where nothing is put in, [L, E, T, D]."""

    def hook(kind: str, layer: Layer, value_ExTxD: jax.Array) -> jax.Array:
        if kind != "mlp_out":
            return value_ExTxD
        return jnp.where(put_ExLxT[:, layer, :, None], lent_ExLxTxD[:, layer], value_ExTxD)

    start, kinds = decoder.embed(config, params, ids_ExT), ("mlp_in", "mlp_out")
    found = run_layers(config, params, start, 0, config.n_layers, hook, None, collect=kinds, before_hook=True)
    return decoder.unembed(config, params, found.x[:, -1:])[:, 0], found.collected


@jax.jit
def _predicted(transcoder: Dictionary, read_ExD: jax.Array) -> jax.Array:
    return transcoder(read_ExD)


class EdgeCircuits:
    """Runs circuits of a transformer on prompts that have counterparts of as many words.

    Args:
      model: the transformer.
      prompts: of one length.
      nodes: words and MLPs, and the logit, between which edges are kept or not; others are as on the prompt.
      transcoders: of all layers; then MLPs in the circuit give what features predict, and the errors of the
        counterpart's run. None: all that the MLPs give.
    """

    def __init__(
        self, model: LanguageModel, prompts: Sequence[Prompt], nodes: Edges, transcoders: Sequence[Dictionary] = ()
    ):
        self._model, self._transcoders = model, transcoders
        self._ids_2xPxT = np.stack(
            [model.tokenize([getattr(one, side) for one in prompts]).ids_BxT for side in ("text", "counterpart")]
        )
        self._answers_2xP = np.array(
            [[model.token_id(getattr(one, side)) for one in prompts] for side in ("correct", "wrong")]
        )
        self._sources, self._targets = (
            np.array(side, int)[:, :2] for side in (nodes.sources, nodes.targets)
        )  # layer, position
        layers, (_, count, length) = model.config.n_layers, self._ids_2xPxT.shape
        nothing = np.zeros((count, layers, length), bool)
        lent = np.zeros((*nothing.shape, model.config.d_model), np.float32)
        self._read, self._other = (  # of the counterpart's run, [P, L, T, D]
            value.transpose(1, 0, 2, 3) for value in self._runs(self._ids_2xPxT[1], nothing, lent)[1:]
        )

    def differences(self, kept_CxSxR: np.ndarray) -> np.ndarray:
        """Right less counterpart's logit on each prompt with the edges of each circuit, [C, P]."""
        circuits, prompts = len(kept_CxSxR), self._other.shape[0]
        value_CxPxLxTxD = np.tile(self._other[None], (circuits, 1, 1, 1, 1))
        needed_CxR = kept_CxSxR.any(axis=1) & self._alive(kept_CxSxR)
        logits = len(self._targets) - 1
        for layer in range(self._model.config.n_layers):
            for target in np.flatnonzero(self._targets[:-1, 0] == layer):
                chosen = np.flatnonzero(needed_CxR[:, target])
                if len(chosen):
                    found = self._target(kept_CxSxR[chosen], value_CxPxLxTxD[chosen], int(target))
                    value_CxPxLxTxD[chosen, :, layer, self._targets[target, 1]] = found
        return self._target(kept_CxSxR, value_CxPxLxTxD, logits).reshape(circuits, prompts)

    def _alive(self, kept_CxSxR: np.ndarray) -> np.ndarray:
        """Which targets the logit can hear, [C, R]."""
        alive_CxR = np.zeros((len(kept_CxSxR), len(self._targets)), bool)
        alive_CxR[:, -1] = True
        place = {tuple(node): number for number, node in enumerate(self._sources.tolist())}
        for target in np.argsort(-self._targets[:, 0], kind="stable"):  # from the last layer down
            source = place.get(tuple(self._targets[target].tolist()))
            if source is not None:
                alive_CxR[:, target] |= (kept_CxSxR[:, source] & alive_CxR).any(axis=1)
        return alive_CxR

    def _target(self, kept_CxSxR: np.ndarray, value_CxPxLxTxD: np.ndarray, target: int) -> np.ndarray:
        """What a target has, given its sources: an MLP's output [C, P, D], or the logit's difference [C, P]."""
        (circuits, prompts, layers, length, _), (layer, position) = value_CxPxLxTxD.shape, self._targets[target]
        keep_CxT, keep_CxLxT = np.ones((circuits, length), bool), np.zeros((circuits, layers, length), bool)
        put_LxT = np.zeros((layers, length), bool)
        for place, (own, at) in enumerate(self._sources):
            if own < 0:
                keep_CxT[:, at] = kept_CxSxR[:, place, target]
            elif own < layer:
                put_LxT[own, at], keep_CxLxT[:, own, at] = True, kept_CxSxR[:, place, target]
        ids_CxPxT = np.where(keep_CxT[:, None], *(self._ids_2xPxT[side][None] for side in (0, 1)))
        lent = np.where(keep_CxLxT[:, None, ..., None], value_CxPxLxTxD, self._other[None])
        put_ExLxT = np.broadcast_to(put_LxT, (circuits * prompts, layers, length))
        rows = ids_CxPxT.reshape(-1, length), put_ExLxT, lent.reshape(-1, *lent.shape[2:])
        logits_ExV, read_LxExTxD, given_LxExTxD = self._runs(*rows)
        if layer == layers:
            right, wrong = (np.tile(own_P, circuits) for own_P in self._answers_2xP)
            every = np.arange(len(logits_ExV))
            return logits_ExV[every, right] - logits_ExV[every, wrong]
        if not self._transcoders:
            return given_LxExTxD[layer, :, position].reshape(circuits, prompts, -1)
        reads = read_LxExTxD[layer, :, position], self._read[:, layer, position]
        predicted_ExD, before_PxD = (np.asarray(_predicted(self._transcoders[layer], read)) for read in reads)
        error_PxD = self._other[:, layer, position] - before_PxD
        return predicted_ExD.reshape(circuits, prompts, -1) + error_PxD[None]

    def _runs(self, *arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``_run`` by parts of one size or another, so that there are two programs."""
        ids_ExT = arrays[0]
        rows, parts = _ROWS if len(ids_ExT) > _ROWS // 2 else _ROWS // 8, []
        for start in range(0, len(ids_ExT), rows):
            part = slice(start, start + rows)
            count = len(ids_ExT[part])
            own = (np.pad(array[part], [(0, rows - count)] + [(0, 0)] * (array.ndim - 1)) for array in arrays)
            logits_RxV, found = _run(self._model.config, self._model.params, *own)
            sites = (np.asarray(found[kind])[:, :count] for kind in ("mlp_in", "mlp_out"))
            parts.append((np.asarray(logits_RxV)[:count], *sites))
        logits, read, given = zip(*parts, strict=True)
        return np.concatenate(logits), np.concatenate(read, axis=1), np.concatenate(given, axis=1)


def edge_curves(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    orders: Mapping[str, Edges],
    transcoders: Mapping[str, Sequence[Dictionary]],
    seed: int,
) -> EdgeCurves:
    """CPR and CMD of circuits by several orders of the same edges, beside random ones.

    Args:
      model: the transformer.
      prompts: on which circuits are judged, with counterparts; of one length, none of them traced for the orders.
      orders: by name the weights of all edges; the largest are kept first.
      transcoders: sets of which it is also asked how much their features carry alone, by name.
      seed: of random orders and resamples.
    """
    nodes = next(iter(orders.values()))
    edges_Nx2 = np.argwhere(possible(nodes))
    count, rng = len(edges_Nx2), np.random.default_rng(seed)
    sizes = np.unique([0, *np.round(np.array(SHARES) * count).astype(int)])
    ranked = [np.argsort(-own.weight_SxR[tuple(edges_Nx2.T)], kind="stable") for own in orders.values()]
    ranked += [rng.permutation(count) for _ in range(_DRAWS)]
    kept = np.zeros((len(ranked), len(sizes), *nodes.weight_SxR.shape), bool)
    for number, order in enumerate(ranked):
        for place, size in enumerate(sizes):
            kept[number, place][tuple(edges_Nx2[order[:size]].T)] = True
    found_ExXxP = _differences(EdgeCircuits(model, prompts, nodes), kept)
    share_RxP = Resampling.of(np.arange(len(prompts)), _BOOTSTRAP, seed).share_RxP
    share_S = sizes[1:] / count
    own = found_ExXxP[: len(orders)]
    f_MxS, f_RxMxS = faithfulness(own.mean(axis=2)), faithfulness(np.einsum("rp,mxp->rmx", share_RxP, own))
    curves = {name: _curve(f_MxS[m], f_MxS[m], f_RxMxS[:, m], share_S) for m, name in enumerate(orders)}
    random_UxS = faithfulness(found_ExXxP[len(orders) :].mean(axis=2))
    curves["random edges"] = _curve(random_UxS.mean(axis=0), random_UxS, random_UxS, share_S)
    alone = {}
    for name, dictionaries in transcoders.items():
        carried_P = EdgeCircuits(model, prompts, nodes, dictionaries).differences(kept[0, -1:])[0]
        both_3xP = np.stack([found_ExXxP[0, 0], carried_P, found_ExXxP[0, -1]])
        alone[name] = _spread(faithfulness(both_3xP.mean(axis=1))[0], faithfulness(share_RxP @ both_3xP.T)[:, 0])
    return EdgeCurves(count, len(prompts), tuple(sizes[1:].tolist()), curves, alone)


def _differences(circuits: EdgeCircuits, kept_ExXxSxR: np.ndarray) -> np.ndarray:
    """Of each order's circuits [E, X, P]; those of no edge and of all are the same in every order and are run once."""
    orders, inner, nodes = len(kept_ExXxSxR), kept_ExXxSxR[:, 1:-1], kept_ExXxSxR.shape[2:]
    own_ExNxP = circuits.differences(inner.reshape(-1, *nodes)).reshape(*inner.shape[:2], -1)
    none_P, all_P = circuits.differences(kept_ExXxSxR[0, [0, -1]])
    ends = (np.broadcast_to(end_P, (orders, 1, len(end_P))) for end_P in (none_P, all_P))
    return np.concatenate([next(ends), own_ExNxP, next(ends)], axis=1)


def _curve(shown_S: np.ndarray, f_xS: np.ndarray, others_NxS: np.ndarray, share_S: np.ndarray) -> EdgeCurve:
    """What is shown of a curve, and the areas under some, with intervals from others."""
    areas = {
        score: _spread(area(f_xS, share_S, score).mean(), area(others_NxS, share_S, score)) for score in ("cpr", "cmd")
    }
    return EdgeCurve(tuple(shown_S.tolist()), **areas)


def _spread(value: float, values_N: np.ndarray) -> Interval:
    """A figure, and the middle 95 % of what it is elsewhere."""
    low, high = np.quantile(values_N, (0.025, 0.975))
    return Interval(float(value), float(low), float(high))
