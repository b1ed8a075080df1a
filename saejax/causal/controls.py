"""Control features: random ones that fire as often and as strongly as the features under test.

A set of features that fires often and strongly moves the output whatever it means. So each feature under
test is compared with features that were not picked, matched on the very prompts and positions on which the
effect is measured, and on those that lend what stands in a removed feature's place, in

- *firing rate*: the share of positions at which the feature fires (activation above zero; in a linear dictionary, its
  size above the dictionary's threshold),
- *mean activation*: the mean of the activation's size over the positions at which it fires,
- *decoder norm*: the length of its direction; 1 in most dictionaries, but not of neurons, and
- *position*: how far from the prompt's end it fires, on average: what is changed late reaches the answer by fewer ways.

The distance between two features is Euclidean in the logarithms of all four, each divided by its standard deviation
over all features that fire (``FeatureStatistics.coordinates``). Features that match one by one may still add up or
cancel, so of the drawn sets those are kept that change the site by as much together as the tested set does
(``nearest_in_size``).
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from saejax.causal.results import ControlMatch
from saejax.errors import UserError
from saejax.interventions.activity import FeatureStatistics

ADVICE = "lower --ablate.top or --ablate.matches, raise --task.test_prompts"


class TooFewControls(UserError):
    """Too few features fire for matched controls.

    Attributes:
      fact: that they are too few, in words, without advice.
    """

    def __init__(self, fact: str, advice: str):
        super().__init__(f"{fact}: {advice}, or train a dictionary with more live features")
        self.fact = fact


def nearest_features(statistics: FeatureStatistics, features: Sequence[int], tested: bool = False) -> np.ndarray:
    """The possible controls of each feature, nearest first.

    Args:
      statistics: measured on the prompts and positions of the test.
      features: K features that fire there.
      tested: whether these, too, may stand in each other's and in their own place.

    Returns:
      Feature indices [K, C]: in each row the C features that fire, and unless ``tested`` are not in ``features``, by
      distance from that row's feature; equals in order of index.
    """
    features_K = np.asarray(features, np.int64)
    if not statistics.fires_at_all_F[features_K].all():
        raise ValueError("a feature that never fires has no matched control")
    fires_F = statistics.fires_at_all_F
    firing_N = np.flatnonzero(fires_F)
    place_NxX = statistics.coordinates(firing_N)
    candidates_C = firing_N if tested else np.setdiff1d(firing_N, features_K)
    own_KxX, other_CxX = (place_NxX[np.searchsorted(firing_N, some)] for some in (features_K, candidates_C))
    apart_KxC = np.square(own_KxX[:, None, :] - other_CxX[None, :, :]).sum(axis=2)
    return candidates_C[np.argsort(apart_KxC, axis=1, kind="stable")]


def fitting_matches(statistics: FeatureStatistics, features: Sequence[int], matches: int) -> int:
    """As many of ``matches`` as ``draw_controls`` can always give a choice among; at least 1, which it may refuse."""
    return max(min(matches, int(statistics.fires_at_all_F.sum()) - 2 * len(features) + 1), 1)


def draw_controls(
    statistics: FeatureStatistics,
    features: Sequence[int],
    draws: int,
    matches: int,
    seed: int | Sequence[int],
    advice: str = ADVICE,
) -> np.ndarray:
    """Draws sets of control features, each matched one to one to ``features``.

    Within a draw the features are served in random order; each takes one, uniformly, of the ``matches``
    nearest features (``nearest_features``) that the draw does not hold yet.

    Args:
      statistics: measured on the prompts and positions of the test.
      features: K distinct features that fire there.
      draws: number of sets, N.
      matches: how many nearest free features each control is drawn from, at least 1.
      seed: of the draws, for ``numpy.random.default_rng``.
      advice: what to do where too few other features fire.

    Returns:
      Feature indices [N, K]; column k is matched to ``features[k]``, no feature is twice in a row.

    Raises:
      TooFewControls: fewer than K + matches - 1 other features fire, so that a choice among ``matches`` cannot
        always be given.
    """
    nearest_KxC = nearest_features(statistics, features)
    _check_enough(len(nearest_KxC), nearest_KxC.shape[1], matches, advice)
    return _drawn(nearest_KxC, np.full(len(nearest_KxC), matches), draws, seed)


def draw_alike(
    statistics: FeatureStatistics,
    features: Sequence[int],
    draws: int,
    matches: int,
    seed: int | Sequence[int],
    advice: str = ADVICE,
) -> np.ndarray:
    """Draws sets as ``features`` would have been drawn, were they a random set: they may hold those, too.

    As ``draw_controls``, but of the ``matches`` nearest other features and those of ``features`` that lie as near,
    itself among them. Where it does not matter which features of a pool are under test, these sets and the tested one
    are alike (``claims``); sets that leave the tested features out are not.

    Args:
      statistics, features, draws, matches, seed, advice: as for ``draw_controls``, and refused likewise.
    """
    nearest_KxC = nearest_features(statistics, features, tested=True)
    others_KxC = np.cumsum(~np.isin(nearest_KxC, features), axis=1)
    _check_enough(len(nearest_KxC), nearest_KxC.shape[1] - len(nearest_KxC), matches, advice)
    return _drawn(nearest_KxC, (others_KxC < matches).sum(axis=1) + 1, draws, seed)


def _check_enough(count: int, others: int, matches: int, advice: str) -> None:
    if count and others < count + matches - 1:
        fact = f"only {others} features besides the {count} under test fire on the test prompts"
        raise TooFewControls(f"{fact}, but matched controls need {count + matches - 1}", advice)


def _drawn(nearest_KxC: np.ndarray, width_K: np.ndarray, draws: int, seed: int | Sequence[int]) -> np.ndarray:
    """Sets of one feature for each of K, in random order, of its ``width`` nearest that the set does not hold yet."""
    rng, count = np.random.default_rng(seed), len(nearest_KxC)
    drawn_NxK = np.zeros((draws, count), np.int64)
    for drawn_K in drawn_NxK:
        taken: set[int] = set()
        for k in rng.permutation(count):
            # Of the first width + len(taken) candidates at least `width` are free, if there are so many.
            near = nearest_KxC[k, : width_K[k] + len(taken)].tolist()
            free = [feature for feature in near if feature not in taken][: width_K[k]]
            drawn_K[k] = free[rng.integers(len(free))]
            taken.add(int(drawn_K[k]))
    return drawn_NxK


def nearest_in_size(size_N: np.ndarray, wanted: float, count: int) -> np.ndarray:
    """Which ``count`` of N sets change the site by most nearly as much as the tested one, in their order.

    Args:
      size_N: how much each set changes the site, at least 0; see ``joint_size``.
      wanted: the same of the tested set.
      count: at most N.
    """
    least = max(1e-6 * max(wanted, size_N.max(initial=0.0)), 1e-300)
    apart_N = np.abs(np.log(np.maximum(size_N, least)) - np.log(max(wanted, least)))
    return np.sort(np.argsort(apart_N, kind="stable")[:count])


def joint_size(change_KxK: np.ndarray, features_K: np.ndarray, sets: Sequence[Sequence[int]]) -> np.ndarray:
    """The norm of what removing each set changes at the site, [S]: that of the sum, not the sum of the norms.

    Args:
      change_KxK: inner products of what removing each of K features changes, over all positions.
      features_K: which features they are, rising.
      sets: of them.
    """
    places = [np.searchsorted(features_K, np.asarray(one, np.int64)) for one in sets]
    return np.sqrt([max(float(change_KxK[np.ix_(place, place)].sum()), 0.0) for place in places])


def disjoint_sets(statistics: FeatureStatistics, features: Sequence[int], matches: int) -> int:
    """How many control sets without a feature in common the pool holds: each one's ``matches`` nearest features.

    Found by bisection: m sets are there if m copies of each of K slots can be given different features, which is a
    maximum matching in a bipartite graph.

    Args:
      statistics: measured on the prompts and positions of the test.
      features: K distinct features that fire there.
      matches: how many nearest features of each are in the pool.
    """
    pool_KxM = nearest_features(statistics, features)[:, :matches]
    count, width = pool_KxM.shape
    low, high = 0, len(np.unique(pool_KxM)) // max(count, 1)
    while low < high:
        copies = (low + high + 1) // 2
        columns = np.repeat(pool_KxM, copies, axis=0).reshape(-1)
        starts = np.arange(count * copies + 1) * width
        graph = csr_array(
            (np.ones(len(columns), bool), columns, starts), shape=(count * copies, len(statistics.fires_F))
        )
        fits = (maximum_bipartite_matching(graph, perm_type="column") >= 0).all()
        low, high = (copies, high) if fits else (low, copies - 1)
    return low


def match_ratios(statistics: FeatureStatistics, features: Sequence[int], controls_NxK: np.ndarray) -> ControlMatch:
    """How well the controls match; None with no features or where the tested ones' values are 0."""
    features_1xK = np.asarray(features, np.int64)[None, :]

    def ratio(value_F: np.ndarray) -> float | None:
        own_1xK = value_F[features_1xK]
        return float(np.median(value_F[controls_NxK] / own_1xK)) if controls_NxK.size and own_1xK.all() else None

    norm_F = np.ones(len(statistics.fires_F)) if statistics.norm_F is None else statistics.norm_F
    place_F, fires_F = statistics.place_F, np.maximum(statistics.fires_F, 1)
    return ControlMatch(
        firing_rate_ratio=ratio(statistics.firing_rate_F),
        activation_ratio=ratio(statistics.mean_activation_F),
        norm_ratio=ratio(norm_F),
        place_ratio=None if place_F is None else ratio(place_F / fires_F),
    )
