"""Effects of groups of features on behaviours, compared with matched features; some groups are named after one.

They follow from the effects that ``ablate`` measured with ``--ablate.effects=all``, each feature ablated alone. Prompts
of even number form the groups in the view ``effects``; those of odd number test them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import false_discovery_control

from saejax.interventions.activity import FeatureStatistics, coordinates
from saejax.interventions.importance import Importance, load_drops
from saejax.matching.clusters.results import GroupCost
from saejax.statistics.ranks import rank_p

_DRAWS, _MATCHES = 2000, 10
_COUNTED = 10**6  # positions that turn firing rates into counts
LEVEL = 0.05  # largest q-value at which a group is named after a behaviour


@dataclasses.dataclass(frozen=True)
class BehaviourEffects:
    """Effects of ablating each feature on a behaviour.

    Attributes:
      table: importance of all features that fire on its test prompts.
      drop_NxP: drop in logit difference, of each of them on each prompt.
    """

    table: Importance
    drop_NxP: np.ndarray

    @classmethod
    def load(cls, folder: Path, behaviour: str) -> "BehaviourEffects":
        """Load the effects from an ablate unit's folder."""
        return cls(Importance.load(Importance.file(folder, behaviour)), load_drops(folder, behaviour))

    def statistics(self, features: int) -> FeatureStatistics:
        """Return how often and how strongly each of a dictionary's features fires on the prompts."""
        fires_F, sum_F = np.zeros(features, np.int64), np.zeros(features)
        # At least 1, as a feature in the table fires somewhere, however rarely.
        fires_F[self.table.feature] = np.maximum(np.round(self.table.firing_rate * _COUNTED), 1)
        sum_F[self.table.feature] = self.table.mean_activation * fires_F[self.table.feature]
        return FeatureStatistics(_COUNTED, fires_F, sum_F)


def profiles(behaviours: Mapping[str, BehaviourEffects]) -> tuple[np.ndarray, np.ndarray]:
    """Return the features that fire on any behaviour, [F], and their effects on every even prompt, [F, P].

    The effects on each behaviour are divided by their root mean square, so that all behaviours have equal weight.
    """
    feature_F = np.unique(np.concatenate([effects.table.feature for effects in behaviours.values()]))
    parts = []
    for effects in behaviours.values():
        # Even prompts form groups and odd ones test them, so that a group cannot fit the noise that it is tested on.
        drop_NxP = effects.drop_NxP[:, ::2]
        part_FxP = np.zeros((len(feature_F), drop_NxP.shape[1]))
        size = float(np.sqrt(np.mean(np.square(drop_NxP)))) if drop_NxP.size else 0.0
        part_FxP[np.searchsorted(feature_F, effects.table.feature)] = drop_NxP / (size or 1.0)
        parts.append(part_FxP)
    return feature_F, np.concatenate(parts, axis=1)


def costs(
    groups: Sequence[Sequence[int]], behaviours: Mapping[str, BehaviourEffects], features: int, seed: int
) -> list[dict[str, GroupCost]]:
    """Return the effect of each group on each behaviour on whose prompts any of its features fires.

    Args:
      groups: features of each group.
      behaviours: effects by behaviour.
      features: number of features of the dictionary.
      seed: seed of the matched sets, which contain no feature of the group.
    """
    costs_by_group: list[dict[str, GroupCost]] = [{} for _ in groups]
    for name, effects in behaviours.items():
        statistics = effects.statistics(features)
        cost_F = np.zeros(features)
        cost_F[effects.table.feature] = effects.drop_NxP[:, 1::2].mean(axis=1)
        for place, group in enumerate(groups):
            firing = statistics.firing(group)
            # With fewer others, matched sets would run out of features to draw.
            if not firing or 2 * len(firing) + _MATCHES > len(effects.table.feature):
                continue
            cost_N = cost_F[_matched_sets(statistics, firing, [seed, place])].sum(axis=1)
            cost = float(cost_F[firing].sum())
            p = rank_p(cost, cost_N)
            costs_by_group[place][name] = GroupCost(len(firing), cost, float(cost_N.mean()), p, p)
    return _adjusted(costs_by_group)


def _matched_sets(statistics: FeatureStatistics, group: Sequence[int], seed: Sequence[int]) -> np.ndarray:
    """Return sets of features without those of a group, [N, K].

    In each set a feature stands for one of the group that is among the nearest in firing rate and activation.

    Args:
      statistics: of all features.
      group: K features that fire.
      seed: seed of the draws.
    """
    firing = np.flatnonzero(statistics.fires_F)
    others = np.setdiff1d(firing, group)
    place_XxC = coordinates(statistics.firing_rate_F[firing], statistics.mean_activation_F[firing])
    group_KxC, other_AxC = (place_XxC[np.searchsorted(firing, some)] for some in (np.asarray(group), others))
    # K + matches - 1 candidates: so many stay free whatever the set has taken.
    near = [
        others[np.argsort(np.square(other_AxC - place_C).sum(axis=1), kind="stable")[: len(group) + _MATCHES - 1]]
        for place_C in group_KxC
    ]
    rng = np.random.default_rng(seed)
    drawn_NxK = np.zeros((_DRAWS, len(group)), np.int64)
    for drawn_K in drawn_NxK:
        taken: set[int] = set()
        # In random order: whoever draws late finds its nearest features taken.
        for k in rng.permutation(len(group)):
            free = [feature for feature in near[k].tolist() if feature not in taken][:_MATCHES]
            drawn_K[k] = free[rng.integers(len(free))]
            taken.add(int(drawn_K[k]))
    return drawn_NxK


def _adjusted(costs_by_group: list[dict[str, GroupCost]]) -> list[dict[str, GroupCost]]:
    """Return the effects with q-values over all groups and behaviours."""
    keys = [(place, name) for place, by_behaviour in enumerate(costs_by_group) for name in by_behaviour]
    if keys:
        # Over groups and behaviours together, since names are given wherever any of them is significant.
        q_N = false_discovery_control([costs_by_group[place][name].p for place, name in keys])
        for (place, name), q in zip(keys, q_N, strict=True):
            costs_by_group[place][name] = dataclasses.replace(costs_by_group[place][name], q=float(q))
    return costs_by_group


def primitives(costs_of_group: Mapping[str, GroupCost]) -> tuple[str, ...]:
    """Return the behaviours on which a group has a larger effect than matched features."""
    return tuple(
        name for name, cost in costs_of_group.items() if cost.q <= LEVEL and cost.drop > max(cost.matched_drop, 0.0)
    )
