"""Exact effects of nodes of heads (``heads``): the vector at one position, put in from the counterpart's run."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from saejax.causal.patching.heads import NODES, NodePatch, patch_nodes, record_heads
from saejax.causal.patching.pairs import Pairs, few_pairs, filled_rows, measure_rows
from saejax.models.language_model import LanguageModel
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import by_row
from saejax.runner.parts import OnProgress, silent
from saejax.tasks.behaviours import Prompt

_WITHOUT = 2  # entries without a patch: prompts and counterparts as they are, by the same program


class NodePlaces(NamedTuple):
    """N nodes: which of ``heads.NODES``, layer, head, and position from the end, -1 the last token."""

    node: np.ndarray
    layer: np.ndarray
    head: np.ndarray
    position: np.ndarray


class NodeEffects(NamedTuple):
    """Logit differences of prompts and counterparts [P], and by how much the first falls [N, P]; float64.

    NaN where a prompt does not have a node's position.
    """

    clean_P: np.ndarray
    corrupted_P: np.ndarray
    effect_NxP: np.ndarray


def patch_exactly(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    nodes: NodePlaces,
    batch_rows: int = 64,
    on_progress: OnProgress = silent,
) -> NodeEffects:
    """Puts the counterpart's vector of each node into the prompt's run.

    Args:
      prompts: P of them, with counterparts of as many tokens, at least one.
      nodes: N of them.
      batch_rows: rows that run together; one row is a node of a prompt.
      on_progress: called at the start and after each batch with the rows done and of all; may raise to stop.

    Raises:
      UserError: a logit difference is not finite.
    """
    batches = [(pairs, *_rows(pairs, nodes.position)) for pairs in few_pairs(model, prompts)]
    total = sum(len(entry_R) for _, entry_R, _ in batches)
    size = filled_rows(batch_rows)

    def dispatched() -> Iterator[tuple[np.ndarray, np.ndarray, jax.Array]]:
        for pairs, entry_R, place_R in batches:
            others = record_heads(model.config, model.params, *by_row(model.mesh, pairs.ids_2xBxT[1]))
            lent = dict(zip(NODES, map(to_host, others), strict=True))
            for first in range(0, len(entry_R), size):
                entry_S, place_S = entry_R[first : first + size], place_R[first : first + size]
                filled = np.resize(entry_S, size), np.resize(place_S, size)
                yield entry_S, pairs.index_P[place_S], _dispatch(model, pairs, lent, nodes, *filled)

    diff_ExP = measure_rows(dispatched(), (_WITHOUT + len(nodes.node), len(prompts)), total, "a head", on_progress)
    return NodeEffects(diff_ExP[0], diff_ExP[1], diff_ExP[0] - diff_ExP[_WITHOUT:])


def _rows(pairs: Pairs, position_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entry (0 and 1: prompt and counterpart without a patch; then the nodes) and pair of each row, [R]."""
    has_NxP = pairs.ends_P[None, :] + position_N[:, None] >= 0
    without_2xP = np.ones((_WITHOUT, has_NxP.shape[1]), bool)
    entry_R, place_R = np.nonzero(np.concatenate([without_2xP, has_NxP]))
    return entry_R, place_R


def _dispatch(
    model: LanguageModel,
    pairs: Pairs,
    lent: dict[str, np.ndarray],
    nodes: NodePlaces,
    entry_R: np.ndarray,
    place_R: np.ndarray,
) -> jax.Array:
    """Starts some rows; ``lent`` has the counterparts' vectors of each kind, [L, B, T, H, K]."""
    patched_M = np.flatnonzero(entry_R >= _WITHOUT)
    n_M = entry_R[patched_M] - _WITHOUT
    kind_R, layer_R, head_R, position_R = np.zeros((4, len(entry_R)), np.int32)
    layer_R[:] = -1  # where nothing is
    layer_R[patched_M], head_R[patched_M] = nodes.layer[n_M], nodes.head[n_M]
    position_R[patched_M] = pairs.ends_P[place_R[patched_M]] + nodes.position[n_M]
    vector_RxK = np.zeros((len(entry_R), model.config.d_head), lent["query"].dtype)
    for number, kind in enumerate(NODES):
        own_N = patched_M[nodes.node[n_M] == kind]
        kind_R[own_N] = number
        vector_RxK[own_N] = lent[kind][layer_R[own_N], place_R[own_N], position_R[own_N], head_R[own_N]]
    patch = NodePatch(*by_row(model.mesh, kind_R, layer_R, head_R, position_R, vector_RxK))
    ids_RxT = pairs.ids_2xBxT[(entry_R == 1).astype(int), place_R]
    rows = by_row(model.mesh, ids_RxT, pairs.last_B[place_R], pairs.answers_Bx2[place_R])
    return patch_nodes(model.config, model.params, *rows, patch)
