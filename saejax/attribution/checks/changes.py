"""Rows of changes for ``interventions.intervene``, made of features of a graph: ablate, scale, set, swap, steer.

Features are nodes of a graph, such as ``features_of(graph, supernode.nodes)``, with the activation that they have in
the prompt. A row is a list of changes that are made together. Lists can be joined with +, and thousands of rows run in
one call:

    rows = [ablate(features_of(graph, group.nodes)) for group in supernodes]
    intervene(replacement, rows, readouts, hold="nothing")

A swap gives features the activations of another prompt. Positions are aligned from the end. With the features of all
layers swapped this is still not the other prompt: tokens, attention from and to the first position, and errors remain.
What transcoders do not explain in the run is added in each layer as it comes.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from saejax.attribution.checks.edits import Change
from saejax.attribution.checks.interventions import intervene
from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import FEATURE, KINDS, Nodes
from saejax.attribution.local.active import Active
from saejax.attribution.local.prompt_run import PromptRun
from saejax.attribution.local.replacement import Replacement
from saejax.attribution.trace.targets import Readouts
from saejax.errors import UserError

FACTORS = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
_TRIES = 20  # for each random set, at the same positions and then at any


@dataclasses.dataclass(frozen=True)
class Steering:
    """What sets of features do to readouts, as a curve.

    Attributes:
      factor_M: by which their activations were multiplied.
      readout_SxMxK: the readouts then, fp32; at the factor 1 those of the prompt.
    """

    factor_M: np.ndarray
    readout_SxMxK: np.ndarray


def features_of(graph: Graph, nodes: Sequence[int] | np.ndarray) -> Nodes:
    """Some features of a graph.

    Args:
      nodes: their places in the graph's table, such as those of a ``Supernode``.

    Raises:
      UserError: one is no feature.
    """
    chosen = graph.nodes[np.asarray(nodes, np.int64)]
    for node, kind in zip(nodes, chosen.kind_N, strict=True):
        if kind != FEATURE:
            raise UserError(f"node {node} of the graph is of the kind {KINDS[kind]}: features alone can be changed")
    return chosen


def ablate(features: Nodes) -> list[Change]:
    """Takes features away: their activation becomes 0."""
    return scale(features, 0.0)


def scale(features: Nodes, factor: float) -> list[Change]:
    """Sets features to a multiple of the activation that they have in the prompt."""
    return _changes(features, factor * features.value_N.astype(np.float64))


def set_to(features: Nodes, value: float | np.ndarray) -> list[Change]:
    """Sets features to an activation, all to one or each to its own."""
    return _changes(features, np.broadcast_to(np.asarray(value, np.float64), len(features)))


def swap(here: Replacement, there: Replacement, features: Nodes | None = None) -> list[Change]:
    """Gives features the activations that they have in another prompt at aligned positions, 0 if they are not active.

    Args:
      here: of the prompt that will run.
      there: of the other prompt; the same model and transcoders.
      features: which, at positions of the first prompt; None: ``features_of_both``.

    Raises:
      UserError: the sets differ, or a position has no counterpart in the other prompt.
    """
    if (here.model is not there.model) or here.dictionaries.configs != there.dictionaries.configs:
        raise UserError("the two prompts were run with different models or transcoders: expected the same")
    features = features_of_both(here, there) if features is None else features
    shift = _shift(here, there)
    first = max(shift + there.first, here.first)
    without = features.position_N[features.position_N < first]
    if len(without):
        raise UserError(
            f"position {without[0]} has no counterpart in the other prompt, of {len(there.ids_P)} tokens: expected "
            f"{first} or more, as both are aligned from the end and the first has no features"
        )
    value_of = dict(zip(_keys(_nodes_of(there.active, shift)), there.active.value_A.tolist(), strict=True))
    return _changes(features, np.array([value_of.get(key, 0.0) for key in _keys(features)]))


def features_of_both(here: Replacement, there: Replacement) -> Nodes:
    """The features that are active in one of two prompts, where these have a position in common.

    Returns:
      Features at positions of the first prompt, with the activations there (0 where the other alone has one), in the
      order (layer, position, feature).
    """
    shift = _shift(here, there)
    own, other = _nodes_of(here.active, 0), _nodes_of(there.active, shift)
    known = set(_keys(own))
    other.value_N[:] = 0
    joined = Nodes.joined(own, other[np.array([key not in known for key in _keys(other)], bool)])
    joined = joined[joined.position_N >= max(shift + there.first, here.first)]
    return joined[np.lexsort((joined.index_N, joined.position_N, joined.layer_N))]


def moved(features: Nodes, here: Replacement, there: Replacement) -> Nodes:
    """Features of the other prompt's graph at the aligned positions of this one, with the other's activations.

    To put a group of that graph in the place of one of this: ``ablate(ours) + set_to(moved(theirs, here, there),
    theirs.value_N)``; a feature may be in one of them only.
    """
    return dataclasses.replace(features, position_N=features.position_N + np.int32(_shift(here, there)))


def steer(
    replacement: Replacement,
    sets: Sequence[Nodes],
    readouts: Readouts,
    factors: Sequence[float] = FACTORS,
    hold: str = "nothing",
) -> Steering:
    """Multiplies the activations of sets of features, all in one call of ``intervene``.

    Args:
      sets: of features of the prompt; some of ``matched`` say what as many others do.
      readouts, hold: see ``intervene``.
    """
    rows = [scale(features, factor) for features in sets for factor in factors]
    changed = intervene(replacement, rows, readouts, hold=hold)
    shape = len(sets), len(factors), len(readouts.labels)
    return Steering(np.asarray(factors, np.float64), changed.readout_RxK.reshape(shape))


def matched(run: PromptRun, features: Nodes, draws: int, seed: int = 456) -> list[Nodes]:
    """Random sets of other active features, as many in each layer: at the same positions, as far as there are so many.

    Where these make too few sets, others are of any positions.

    Args:
      run: of the prompt.
      features: for which the sets are controls.
      draws: how many sets, all different; fewer where no more are found.
      seed: of the choice.

    Raises:
      UserError: a layer has too few active features beside these.
    """
    rng = np.random.default_rng(seed)
    taken = set(_keys(features))
    active = _nodes_of(run.active, 0)
    others = active[np.array([key not in taken for key in _keys(active)], bool)]
    found: dict[tuple[int, ...], Nodes] = {}
    for number in range(2 * _TRIES * draws):
        if len(found) == draws:
            break
        order = rng.permutation(len(others))
        parts = []
        for layer in np.unique(features.layer_N):
            own = features.position_N[features.layer_N == layer]
            pool = order[others.layer_N[order] == layer]
            if len(pool) < len(own):
                raise UserError(f"layer {layer} has {len(pool)} other active features: expected {len(own)} or more")
            near = number < _TRIES * draws
            parts.append(_drawn(pool, others.position_N[pool], own) if near else pool[: len(own)])
        chosen = np.sort(np.concatenate([np.empty(0, np.int64), *parts]))
        found.setdefault(tuple(chosen.tolist()), others[chosen])
    return list(found.values())


def _drawn(pool: np.ndarray, position: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Of a shuffled pool as many as are wanted at each position, then the first of the rest."""
    chosen = np.zeros(len(pool), bool)
    for place, count in zip(*np.unique(wanted, return_counts=True), strict=True):
        chosen[np.flatnonzero(position == place)[:count]] = True
    chosen[np.flatnonzero(~chosen)[: len(wanted) - chosen.sum()]] = True
    return pool[chosen]


def _shift(here: Replacement, there: Replacement) -> int:
    """By how much positions of the other prompt are moved so that both end together."""
    return len(here.ids_P) - len(there.ids_P)


def _nodes_of(active: Active, shift: int) -> Nodes:
    return Nodes.of(FEATURE, active.layer_A, active.position_A + shift, active.feature_A, active.value_A)


def _keys(features: Nodes) -> list[tuple[int, int, int]]:
    """Layer, position and number of each."""
    columns = features.layer_N, features.position_N, features.index_N
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _changes(features: Nodes, value_N: np.ndarray) -> list[Change]:
    return [Change(*key, value) for key, value in zip(_keys(features), value_N.tolist(), strict=True)]
