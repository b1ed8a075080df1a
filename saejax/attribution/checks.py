"""Rows of changes that run the prompt of a graph again.

They are made of features with the activation that they have in the prompt, such as ``graph.nodes[indices]``, for
``LocalModel.run``. A row is a list of changes that are made together; lists can be joined with +, and thousands of rows
run in one call. ``matched`` samples random features as controls.
"""

import numpy as np

from saejax.attribution.graph.data import Nodes
from saejax.attribution.local.edits import Change
from saejax.attribution.local.state import PromptRun
from saejax.errors import UserError

_SEED = 456  # of sampled sets
_TRIES = 20  # for each random set, at the same positions and then at any


def scale(features: Nodes, factor: float) -> list[Change]:
    """Return changes that set features to a multiple of the activation that they have in the prompt."""
    return set_to(features, factor * features.value_N.astype(np.float64))


def set_to(features: Nodes, value: float | np.ndarray) -> list[Change]:
    """Return changes that set features to an activation, all to one or each to its own."""
    values = np.broadcast_to(np.asarray(value, np.float64), len(features)).tolist()
    return [Change(*key, value) for key, value in zip(_keys(features), values, strict=True)]


def matched(run: PromptRun, features: Nodes, draws: int) -> list[Nodes]:
    """Sample sets of other active features, as many in each layer, at the same positions as far as possible.

    Where these make too few different sets, more are sampled at any positions.

    Args:
      run: of the prompt.
      features: for which the sets are controls.
      draws: number of sets, all different; fewer where there are no more.

    Raises:
      UserError: a layer has too few active features beside these.
    """
    rng = np.random.default_rng(_SEED)
    taken = set(_keys(features))
    active = run.active.nodes
    candidates = active[np.array([key not in taken for key in _keys(active)], bool)]
    chosen_sets: dict[tuple[int, ...], Nodes] = {}
    # At the positions first; only where these give too few sets, anywhere.
    for number in range(2 * _TRIES * draws):
        if len(chosen_sets) == draws:
            break
        order = rng.permutation(len(candidates))
        parts = []
        for layer in np.unique(features.layer_N):
            of_layer = features.position_N[features.layer_N == layer]
            pool = order[candidates.layer_N[order] == layer]
            if len(pool) < len(of_layer):
                raise UserError(
                    f"layer {layer} has {len(pool)} other active features: expected {len(of_layer)} or more"
                )
            near = number < _TRIES * draws
            parts.append(_at_positions(pool, candidates.position_N[pool], of_layer) if near else pool[: len(of_layer)])
        # In one order, so that the same set drawn again is noticed.
        chosen = np.sort(np.concatenate([np.empty(0, np.int64), *parts]))
        chosen_sets.setdefault(tuple(chosen.tolist()), candidates[chosen])
    return list(chosen_sets.values())


def _at_positions(pool: np.ndarray, position: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return as many of a shuffled pool as are wanted at each position, then the first of the rest."""
    chosen = np.zeros(len(pool), bool)
    for place, count in zip(*np.unique(wanted, return_counts=True), strict=True):
        chosen[np.flatnonzero(position == place)[:count]] = True
    chosen[np.flatnonzero(~chosen)[: len(wanted) - chosen.sum()]] = True
    return pool[chosen]


def _keys(features: Nodes) -> list[tuple[int, int, int]]:
    """Return layer, position and index of each."""
    columns = features.layer_N, features.position_N, features.index_N
    return list(zip(*(column.tolist() for column in columns), strict=True))
