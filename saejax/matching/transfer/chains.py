"""Pairs of features of two dictionaries, and chains of such pairs through the layers."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from saejax.interventions.columns import Columns
from saejax.matching.match import Matched

# Cosine or correlation from which features are shared: two random directions are below it in any model's width.
SHARED = 0.7

Pair = tuple[int, int]  # numbers of two dictionaries, the smaller first


class Link(NamedTuple):
    """The features of one dictionary and their partners in another."""

    partner_F: np.ndarray  #: feature of the other dictionary; -1: not shared
    value_F: np.ndarray  #: cosine or correlation of the pair

    def back(self, features: int) -> "Link":
        """Return the same from the other dictionary, which has ``features`` features."""
        has = np.flatnonzero(self.partner_F >= 0)
        partner_G, value_G = np.full(features, -1), np.full(features, np.nan)
        partner_G[self.partner_F[has]], value_G[self.partner_F[has]] = has, self.value_F[has]
        return Link(partner_G, value_G)


@dataclasses.dataclass(frozen=True)
class FeaturePairs(Columns):
    """Pairs of features of an assignment, and of the assignment under the null, a row each."""

    second: np.ndarray  #: number of the second dictionary in the results
    feature: np.ndarray  #: feature of the first dictionary
    partner: np.ndarray  #: feature of the second; -1: none
    value: np.ndarray  #: cosine or correlation; NaN without a partner
    null_partner: np.ndarray  #: partner under the null
    null_value: np.ndarray  #: its value

    @classmethod
    def of(cls, second: int, matched: Matched, null: Matched) -> Self:
        """Return the pairs with the dictionary number ``second``."""
        features = len(matched.partner_F)
        number_F, feature_F = np.full(features, second, np.int32), np.arange(features, dtype=np.int32)
        sides = [
            (matching.partner_F.astype(np.int32), matching.value_F.astype(np.float32)) for matching in (matched, null)
        ]
        return cls(number_F, feature_F, *sides[0], *sides[1])

    @classmethod
    def joined(cls, tables: Sequence[Self]) -> Self:
        """Return the rows of some tables, one after the other."""
        return cls(*(np.concatenate(column) for column in zip(*(table.columns.values() for table in tables))))

    def link(self, second: int, null: bool) -> Link:
        """Return the features shared with the dictionary number ``second``."""
        in_pair = self.second == second
        partner, value = (self.null_partner, self.null_value) if null else (self.partner, self.value)
        is_shared_F = np.nan_to_num(value[in_pair], nan=-1.0) >= SHARED
        return Link(np.where(is_shared_F, partner[in_pair].astype(np.int64), -1), value[in_pair])


class Followed(NamedTuple):
    """A chain: its first dictionary in the order, its features from there on, and the value of its weakest link."""

    start: int
    features: tuple[int, ...]
    value: float


def follow(links: Sequence[Link]) -> list[Followed]:
    """Return all chains of at least two features, longest first, then by their weakest link.

    Args:
      links: links from each dictionary to the next.
    """
    finished: list[Followed] = []
    begun: dict[int, Followed] = {}  # by the feature of the current dictionary in which they end
    for place, link in enumerate(links):
        ended, going = begun, {}
        for feature in np.flatnonzero(link.partner_F >= 0).tolist():
            value, partner = float(link.value_F[feature]), int(link.partner_F[feature])
            # Popped: what is left afterwards ends here.
            before = ended.pop(feature, Followed(place, (feature,), np.inf))
            going[partner] = Followed(before.start, (*before.features, partner), min(before.value, value))
        finished += ended.values()
        begun = going
    finished += begun.values()
    # By the weakest link, as a chain of similar features is only as good as that.
    return sorted(finished, key=lambda run: (-len(run.features), -run.value))
