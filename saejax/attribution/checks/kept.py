"""How much of an answer the first n features of an order keep: ours beside circuit-tracer's.

Of the features that are active in a prompt the first 0.1, 0.2, 0.5, 1, ..., 100 % are kept and all others set to 0;
errors stay, for all orders alike. So circuits are compared at equal numbers of features. Orders:

    elimination  by how long it stays when what adds least to the answer goes first (``graph.elimination``); for CPR
    mixed        by the better of its places in the orders above and below; for CMD
    influence    circuit-tracer's, by which it prunes nodes (``graph.pruning``)
    random       the control

Features without a node, which no order knows, come last in the first three, the most active first. Faithfulness, CPR
and CMD are those of ``causal.faithfulness``, over prompts of a behaviour.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from saejax.attribution.checks.circuit_runs import Circuit, run_circuits
from saejax.attribution.graph import Graph
from saejax.attribution.graph.elimination import elimination_order
from saejax.attribution.graph.nodes import FEATURE
from saejax.attribution.graph.pruning import source_influence
from saejax.attribution.local.replacement import Replacement
from saejax.attribution.results import KeptResults, KeptScore
from saejax.attribution.trace.targets import Readouts
from saejax.causal.clustered import Resampling
from saejax.causal.faithfulness import SHARES, area, faithfulness
from saejax.results import Interval

ORDERS = ("elimination", "mixed", "influence")
DRAWS = 5  # random orders of each prompt
RUNS = 2 + (len(ORDERS) + DRAWS) * (len(SHARES) - 1)
_RESAMPLES = 2000
SCORES = dict(cpr="elimination", cmd="mixed")  # which of our orders each is of


class KeptReadouts(NamedTuple):
    """The first readout with growing numbers of features kept: none, then each share; all orders, then random ones.

    Attributes:
      readout_ExX: fp64, orders by 1 + shares.
      active: how many features are active.
    """

    readout_ExX: np.ndarray
    active: int


def keep_features(replacement: Replacement, graph: Graph, readouts: Readouts, seed: int) -> KeptReadouts:
    """Runs a prompt with the first features of each order alone.

    Args:
      replacement, readouts: of which the graph is; the first readout is judged.
      graph: a whole one.
      seed: of the random orders.
    """
    count = len(replacement.active)
    size_S = np.ceil(np.array(SHARES[:-1]) * count).astype(int)
    masks = [np.zeros(count, bool), np.ones(count, bool)]
    for order_A in _orders(replacement, graph, np.random.default_rng([seed, count])):
        for size in size_S:
            masks.append(np.zeros(count, bool))
            masks[-1][order_A[:size]] = True
    errors_LxP = np.ones((replacement.model.config.n_layers, len(replacement.ids_P)), bool)
    readout_C = run_circuits(replacement, [Circuit(mask_A, errors_LxP) for mask_A in masks], readouts)[:, 0]
    ends_Ex2 = np.broadcast_to(readout_C[:2], (len(ORDERS) + DRAWS, 2)).astype(np.float64)
    between_ExS = readout_C[2:].reshape(len(ends_Ex2), -1)
    return KeptReadouts(np.concatenate([ends_Ex2[:, :1], between_ExS, ends_Ex2[:, 1:]], axis=1), count)


def _orders(replacement: Replacement, graph: Graph, rng: np.random.Generator) -> list[np.ndarray]:
    """The active features in each order, and in random ones."""
    active, features = replacement.active, graph.nodes[graph.slice_of(FEATURE)]
    place_F = active.places(features.layer_N, features.position_N, features.index_N)
    rest_A = np.setdiff1d(np.arange(len(active)), place_F)
    rest_A = rest_A[np.argsort(-active.value_A[rest_A], kind="stable")]
    first_K = np.eye(1, len(graph.logit_K))[0]
    by_influence = np.argsort(-source_influence(graph)[: len(features)], kind="stable")
    by_elimination = elimination_order(graph, first_K)
    mixed = np.argsort(np.minimum(np.argsort(by_elimination), np.argsort(by_influence)), kind="stable")
    known = [np.concatenate([place_F[order_F], rest_A]) for order_F in (by_elimination, mixed, by_influence)]
    return [*known, *(rng.permutation(len(active)) for _ in range(DRAWS))]


def compare_orders(prompts: Sequence[KeptReadouts], templates: Sequence[str], seed: int) -> KeptResults:
    """CPR and CMD of the orders over the prompts of a behaviour.

    Args:
      prompts: of each, what ``keep_features`` gave.
      templates: of each; prompts of one are not independent.
      seed: of the bootstrap samples.
    """
    readout_ExXxP = np.stack([prompt.readout_ExX for prompt in prompts], axis=2)
    over = Resampling.of(templates, _RESAMPLES, seed)
    empty_P, model_P = readout_ExXxP[0, 0], readout_ExXxP[0, -1]
    counts = tuple(round(share * np.mean([prompt.active for prompt in prompts])) for share in SHARES)
    ends = float(model_P.mean()), float(empty_P.mean())
    why = None if len(prompts) > 1 else "one prompt has no interval"
    if why is None and over.mean(model_P - empty_P).low <= 0:
        why = "removing all features does not clearly cost the answer"
    if why:
        return KeptResults(len(prompts), SHARES, counts, {}, {}, *ends, reason=why)
    curve_ExS = faithfulness(readout_ExXxP.mean(axis=2))
    named = dict(zip(ORDERS, curve_ExS, strict=False)) | dict(random=curve_ExS[len(ORDERS) :].mean(axis=0))
    scores = {score: _score(readout_ExXxP, score, over) for score in SCORES}
    lines = {name: tuple(curve_S.tolist()) for name, curve_S in named.items()}
    return KeptResults(len(prompts), SHARES, counts, lines, scores, *ends, reason=None)


def _score(readout_ExXxP: np.ndarray, score: str, over: Resampling) -> KeptScore:
    """A score of two orders with 95 % intervals: prompts are drawn before the ratio is taken."""
    own, theirs = (readout_ExXxP[ORDERS.index(name)] for name in (SCORES[score], "influence"))
    areas_2xR = np.array([_areas(over.share_RxP @ part.T, score) for part in (own, theirs)])
    mean_2 = np.array([_areas(part.mean(axis=1), score) for part in (own, theirs)])
    random_N = _areas(readout_ExXxP[len(ORDERS) :].mean(axis=2), score)
    return KeptScore(
        effect=_interval(mean_2[0], areas_2xR[0]),
        influence=_interval(mean_2[1], areas_2xR[1]),
        difference=_interval(mean_2[0] - mean_2[1], areas_2xR[0] - areas_2xR[1]),
        random=Interval(float(random_N.mean()), float(random_N.min()), float(random_N.max())),
    )


def _areas(readout_xX: np.ndarray, score: str) -> np.ndarray:
    return area(faithfulness(readout_xX), np.array(SHARES), score)


def _interval(mean: float, areas_R: np.ndarray) -> Interval:
    low, high = np.quantile(areas_R, (0.025, 0.975))
    return Interval(float(mean), float(low), float(high))
