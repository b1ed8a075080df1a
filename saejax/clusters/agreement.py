"""Whether groupings agree: of one dictionary in different views, and of dictionaries of one site."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from saejax.clusters.groups import agreement
from saejax.clusters.results import GroupingAgreement
from saejax.interventions.columns import Columns
from saejax.tasks.scoring import middle
from saejax.transfer.compared import Compared
from saejax.transfer.stability import match_by_direction

_SHUFFLES = 100


@dataclasses.dataclass(frozen=True)
class GroupedFeatures(Columns):
    """Features that were looked at, a row for each view and method.

    Attributes:
      view, method: names.
      group: its number; -1: none.
      feature: its number.
      centrality: how alike it is to the others of its group, mean; NaN where there is none.
    """

    view: np.ndarray
    method: np.ndarray
    group: np.ndarray
    feature: np.ndarray
    centrality: np.ndarray

    @classmethod
    def together(cls, tables: Sequence["GroupedFeatures"]) -> "GroupedFeatures":
        """One table of several, which may be none."""
        nothing = cls(*(np.zeros(0, kind) for kind in ("U1", "U1", int, int, float)))
        parts = [table.columns for table in (nothing, *tables)]
        return cls(**{name: np.concatenate([part[name] for part in parts]) for name in nothing.columns})

    def of(self, view: str, method: str) -> tuple[np.ndarray, np.ndarray]:
        """Features that were looked at, and their groups."""
        own = (self.view == view) & (self.method == method)
        return self.feature[own].astype(np.int64), self.group[own].astype(np.int64)


def between_views(
    names: Sequence[str], by: Sequence[str], table: GroupedFeatures, seed: int
) -> tuple[GroupingAgreement, ...]:
    """Whether features that are alike in one view are so in another."""
    found = []
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            for method in by:
                (one, group), (two, other) = table.of(first, method), table.of(second, method)
                _, own, others = np.intersect1d(one, two, return_indices=True)
                found.append(_agreement((first, second, method, ""), group[own], other[others], seed))
    return tuple(found)


def between_dictionaries(
    compared: Sequence[Compared], tables: Sequence[GroupedFeatures], seed: int
) -> tuple[GroupingAgreement, ...]:
    """Whether dictionaries of one site group the features that they share alike."""
    found = []
    for place, first in enumerate(compared):
        for second in range(place + 1, len(compared)):
            other = compared[second]
            if (other.fingerprint, other.dictionary.site) != (first.fingerprint, first.dictionary.site):
                continue
            own_FxD, other_GxD = (np.asarray(one.dictionary.W_dec_FxD[...], np.float32) for one in (first, other))
            matches = match_by_direction(own_FxD, other_GxD)
            table, beside = tables[place], tables[second]
            for view, method in dict.fromkeys(zip(table.view.tolist(), table.method.tolist(), strict=True)):
                known, partner = dict(zip(*table.of(view, method))), dict(zip(*beside.of(view, method)))
                pairs = [
                    (known[one], partner[two])
                    for one, two in zip(matches.first_M.tolist(), matches.second_M.tolist(), strict=True)
                    if one in known and two in partner
                ]
                if pairs:
                    group_M, other_M = np.array(pairs).T
                    found.append(_agreement((first.name, other.name, method, view), group_M, other_M, seed))
    return tuple(found)


def _agreement(
    of: tuple[str, str, str, str], first_M: np.ndarray, second_M: np.ndarray, seed: int
) -> GroupingAgreement:
    rng = np.random.default_rng(seed)
    null = np.array([agreement(first_M, rng.permutation(second_M)) for _ in range(_SHUFFLES)])
    return GroupingAgreement(*of, len(first_M), agreement(first_M, second_M), middle(null))
