"""What a part of a graph does alone: the model run with some of the features and errors, the others gone.

At every layer and every position but the first the MLP's output becomes

    sum over kept features of f_t W_dec + b_dec + skip(read_t) + error_t if it is kept

with f_t and error_t of that run: all comes from the embedding of the tokens anew, nothing is frozen. A feature that is
active in the prompt and not kept may have a mean activation instead of none; one that is not active there has none, so
that with all features and errors kept this is the model. With m a readout, C the circuit, M the model and 0 the run in
which no feature and no error is kept (Marks et al., 2024, arXiv 2403.19647),

    faithfulness = (m(C) - m(0)) / (m(M) - m(0)),        incompleteness = the same of all that is not in C

A circuit that does the work has the first near 1 and the second near 0.

Letters: C circuits, K readouts; A, L, P, T, D, F as in ``replacement``.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from saejax.attribution.frozen import FrozenModel
from saejax.attribution.graph import ERROR, FEATURE, Graph
from saejax.attribution.interventions import read_last
from saejax.attribution.replacement import Active, Replacement
from saejax.attribution.targets import Readouts
from saejax.errors import UserError
from saejax.models import decoder
from saejax.models.attention import full_reaches
from saejax.parallel import to_host

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_AT_ONCE = 2**26  # activations of a layer that are in memory at once


class Circuit(NamedTuple):
    """Which features are kept [A], of ``Replacement.active``, and which errors [L, P]."""

    features_A: np.ndarray
    errors_LxP: np.ndarray

    def complement(self) -> "Circuit":
        """All that is not in it."""
        return Circuit(~self.features_A, ~self.errors_LxP)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Circuits of growing size.

    Attributes:
      share_C: the share of influence for which each was pruned.
      features_C, errors_C: how many each keeps.
      readout_C, complement_C: the first readout of each, and of all that is not in it; fp32.
      model, empty: of the whole model, and with no feature and no error kept.
    """

    share_C: np.ndarray
    features_C: np.ndarray
    errors_C: np.ndarray
    readout_C: np.ndarray
    complement_C: np.ndarray
    model: float
    empty: float

    @property
    def faithfulness_C(self) -> np.ndarray:
        """1: as the model; 0: as if nothing were kept. NaN where these two do not differ."""
        return self._normalised(self.readout_C)

    @property
    def incompleteness_C(self) -> np.ndarray:
        """How much is left without the circuit: 0 if it was all."""
        return self._normalised(self.complement_C)

    def _normalised(self, readout_C: np.ndarray) -> np.ndarray:
        whole = self.model - self.empty
        return (readout_C - self.empty) / whole if whole else np.full(len(readout_C), np.nan)


def curve(
    replacement: Replacement,
    graph: Graph,
    readouts: Readouts,
    shares: Sequence[float] = SHARES,
    means: Mapping[int, np.ndarray] | None = None,
) -> Curve:
    """Prunes a whole graph to growing shares of its influence, and runs each part alone and all the rest alone.

    Args:
      graph: of the replacement model, not pruned; features that it has no node for are never kept.
      readouts: the first of them is judged.
      means: see ``run_circuits``.
    """
    circuits = [circuit_of(replacement, graph.prune(share)) for share in shares]
    none = Circuit(np.zeros(len(replacement.active), bool), np.zeros_like(circuits[0].errors_LxP))
    rows = [*circuits, *(circuit.complement() for circuit in circuits), none.complement(), none]
    readout_C = run_circuits(replacement, rows, readouts, means)[:, 0]
    count = len(circuits)
    return Curve(
        share_C=np.asarray(shares, np.float64),
        features_C=np.array([circuit.features_A.sum() for circuit in circuits]),
        errors_C=np.array([circuit.errors_LxP.sum() for circuit in circuits]),
        readout_C=readout_C[:count],
        complement_C=readout_C[count : 2 * count],
        model=float(readout_C[-2]),
        empty=float(readout_C[-1]),
    )


def circuit_of(replacement: Replacement, graph: Graph) -> Circuit:
    """The features and errors of a pruned graph."""
    active, nodes = replacement.active, graph.nodes
    layers, positions = replacement.model.config.n_layers, len(replacement.ids_P)
    features, errors = nodes[graph.slice_of(FEATURE)], nodes[graph.slice_of(ERROR)]
    errors_LxP = np.zeros((layers, positions), bool)
    errors_LxP[errors.layer_N, errors.position_N] = True
    return Circuit(places_of(active, features.layer_N, features.position_N, features.index_N)[0], errors_LxP)


def places_of(
    active: Active, layer_J: np.ndarray, position_J: np.ndarray, feature_J: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which active features these are: a mask [A], and the place of each [J].

    Raises:
      UserError: one of them is not active.
    """
    keys = {key: place for place, key in enumerate(zip(*(a.tolist() for a in _key(active)), strict=True))}
    wanted = zip(layer_J.tolist(), position_J.tolist(), feature_J.tolist(), strict=True)
    place_J = np.array([keys.get(key, -1) for key in wanted], np.int64)
    for missing in np.flatnonzero(place_J < 0)[:1]:
        raise UserError(
            f"feature {feature_J[missing]} of layer {layer_J[missing]} is not active at position "
            f"{position_J[missing]}: is the graph one of this prompt and set?"
        )
    mask_A = np.zeros(len(active), bool)
    mask_A[place_J] = True
    return mask_A, place_J


def _key(active: Active) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return active.layer_A, active.position_A, active.feature_A


def run_circuits(
    replacement: Replacement,
    circuits: Sequence[Circuit],
    readouts: Readouts,
    means: Mapping[int, np.ndarray] | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """The readouts [C, K] of each circuit alone, fp32.

    Args:
      circuits: what is kept; a feature that is not active in the prompt is not in any.
      readouts: of the last layer's output.
      means: by layer, activations [F] that stand in place of those of features that are active in the prompt and not
        kept, such as ``mean_activations``; None: zeros.
      tick: called with the layers done and of all; may raise to stop.

    Raises:
      UserError: a readout is not of the last layer's output, or not finite.
    """
    config, streams, active = replacement.model.config, replacement.streams, replacement.active
    if (readouts.layer_K != config.n_layers).any():
        raise UserError("a circuit is judged by logits, or by a direction of the stream that leaves the last layer")
    length, tokens = streams.stream_LxTxD.shape[1], len(replacement.ids_P)
    most = int(np.bincount(active.layer_A).max())
    size = max(_AT_ONCE // (length * replacement.transcoders.configs[0].n_features), 1)
    chunks = [slice(start, min(start + size, len(circuits))) for start in range(0, len(circuits), size)]
    states = [jnp.tile(streams.stream_LxTxD[0][None], (min(size, len(circuits)), 1, 1)) for _ in chunks]
    for layer in range(config.n_layers):
        transcoder = nnx.split(replacement.transcoders.load(layer))
        own_A = slice(*np.searchsorted(active.layer_A, [layer, layer + 1]))
        places = active.position_A[own_A], active.feature_A[own_A]
        mean_F = None if means is None else means[layer]
        for number, chunk in enumerate(chunks):
            kept_CxA = np.zeros((len(states[number]), len(places[0])), bool)
            error_CxT = np.zeros((len(states[number]), length), bool)
            for row, circuit in enumerate(circuits[chunk]):
                kept_CxA[row], error_CxT[row, :tokens] = circuit.features_A[own_A], circuit.errors_LxP[layer]
            features = _padded(places, kept_CxA, most, replacement.transcoders.configs[0].n_features)
            states[number] = run_layer(
                replacement.frozen,
                replacement.model.params,
                np.int32(layer),
                states[number],
                transcoder,
                *features,
                error_CxT,
                mean_F,
                np.int32(tokens),
            )
        tick(layer + 1, config.n_layers)
    last = np.int32(tokens - 1)
    parts = readouts.vector_KxD, readouts.normed_K
    found = [
        to_host(read_last(replacement.frozen, "nothing", streams.last_D, x, last, *parts))[: c.stop - c.start]
        for x, c in zip(states, chunks, strict=True)
    ]
    readout_CxK = readouts.value_K[None] + np.concatenate(found)
    if not np.isfinite(readout_CxK).all():
        raise UserError("the model is not finite with a part of its features: try --model.dtype=float32")
    return readout_CxK


def mean_activations(replacements: Iterable[Replacement]) -> dict[int, np.ndarray]:
    """Mean activations of all features over the positions of some prompts where features are used, by layer; fp32 [F].

    Args:
      replacements: of the prompts, one model and one set; used one at a time.
    """
    total: dict[int, np.ndarray] = {}
    count = 0
    for replacement in replacements:
        active, count = replacement.active, count + len(replacement.ids_P) - 1
        for layer, config in enumerate(replacement.transcoders.configs):
            own = slice(*np.searchsorted(active.layer_A, [layer, layer + 1]))
            sum_F = np.bincount(active.feature_A[own], weights=active.value_A[own], minlength=config.n_features)
            total[layer] = total.get(layer, 0) + sum_F
    return {layer: (sum_F / count).astype(np.float32) for layer, sum_F in total.items()}


def _padded(
    places: tuple[np.ndarray, np.ndarray], kept_CxA: np.ndarray, most: int, features: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, features and whether they are kept, filled up (out of range) to a number for all layers."""
    room = most - len(places[0])
    position_A, feature_A = (np.pad(place, (0, room), constant_values=features) for place in places)
    return position_A, feature_A, np.pad(kept_CxA, ((0, 0), (0, room)))


@functools.partial(jax.jit, static_argnums=0)
def run_layer(
    frozen: FrozenModel,
    params: decoder.Params,
    layer: jax.Array,
    x_CxTxD: jax.Array,
    transcoder: tuple[nnx.GraphDef, nnx.State],
    position_A: jax.Array,
    feature_A: jax.Array,
    kept_CxA: jax.Array,
    error_CxT: jax.Array,
    mean_F: jax.Array | None,
    tokens: jax.Array,
) -> jax.Array:
    """One layer of all circuits: the stream leaving it [C, T, D].

    Args:
      position_A, feature_A: the layer's active features; those out of range fill up.
      kept_CxA: which of them each circuit keeps; a feature that is not active in the prompt is not kept.
      error_CxT: at which positions the error is kept.
      mean_F: activations of the active features that are not kept; None: 0.
      tokens: of the prompt.
    """
    dictionary, seen = nnx.merge(*transcoder), {}
    row_Cx1 = jnp.arange(len(x_CxTxD))[:, None]

    def hook(kind: str, value_CxTxD: jax.Array) -> jax.Array:
        seen[kind] = value_CxTxD
        if kind != "mlp_out":
            return value_CxTxD
        read_CxTxD = frozen.read(params, layer, seen)
        acts_CxTxF = dictionary.encode(read_CxTxD)
        error_CxTxD = value_CxTxD - dictionary.decode(acts_CxTxF, read_CxTxD)
        mask_CxTxF = jnp.zeros(acts_CxTxF.shape, bool)
        mask_CxTxF = mask_CxTxF.at[row_Cx1, position_A[None], feature_A[None]].set(kept_CxA, mode="drop")
        rest_CxTxF = jnp.zeros_like(acts_CxTxF)
        if mean_F is not None:
            mean_CxA = jnp.broadcast_to(mean_F[feature_A].astype(rest_CxTxF.dtype)[None], kept_CxA.shape)
            rest_CxTxF = rest_CxTxF.at[row_Cx1, position_A[None], feature_A[None]].set(mean_CxA, mode="drop")
        rebuilt_CxTxD = dictionary.decode(jnp.where(mask_CxTxF, acts_CxTxF, rest_CxTxF), read_CxTxD)
        kept_CxTxD = rebuilt_CxTxD + jnp.where(error_CxT[..., None], error_CxTxD, jnp.zeros_like(error_CxTxD))
        position_T = jnp.arange(x_CxTxD.shape[1])
        used_T = (position_T > 0) & (position_T < tokens)
        return jnp.where(used_T[None, :, None], kept_CxTxD.astype(value_CxTxD.dtype), value_CxTxD)

    reaches = full_reaches(frozen.config, x_CxTxD.shape[1])
    return decoder.block(frozen.config, params, layer, x_CxTxD, reaches, hook)
