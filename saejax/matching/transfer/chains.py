"""Shares of features that many dictionaries have in common, and chains of shared features through the layers.

Both follow from the pairs of features that the assignments found between every two compared dictionaries.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from saejax.matching.transfer.results import Chain, Chains, ComparedDictionary, FeatureShares
from saejax.tasks.scoring import wilson

_LISTED = 20  # chains in the results

# Cosine or correlation from which features are shared: that of two random directions is below it in any model's width.
SHARED = 0.7


class Link(NamedTuple):
    """The features of one dictionary and their partners in another.

    Attributes:
      partner_F: feature of the other dictionary; -1: not shared.
      value_F: cosine or correlation of the pair.
    """

    partner_F: np.ndarray
    value_F: np.ndarray

    @classmethod
    def shared(cls, partner_F: np.ndarray, value_F: np.ndarray) -> "Link":
        """Return the pairs of an assignment whose value is at least ``SHARED``."""
        return cls(np.where(np.nan_to_num(value_F, nan=-1.0) >= SHARED, partner_F, -1), value_F)

    def back(self, features: int) -> "Link":
        """Return the same from the other dictionary, which has ``features`` features."""
        has = np.flatnonzero(self.partner_F >= 0)
        partner_G, value_G = np.full(features, -1), np.full(features, np.nan)
        partner_G[self.partner_F[has]], value_G[self.partner_F[has]] = has, self.value_F[has]
        return Link(partner_G, value_G)


Links = Mapping[tuple[int, int], Link]  # by the numbers of every two compared dictionaries, the smaller first


def shares(dictionaries: Sequence[ComparedDictionary], links: Links, null: Links) -> tuple[FeatureShares, ...]:
    """Return the shares of each dictionary's features that are shared with all others, with some, with none.

    Args:
      dictionaries: the dictionaries.
      links: links between compared ones.
      null: the same under the null.
    """
    all_shares = []
    for index, dictionary in enumerate(dictionaries):
        others = sum(index in pair for pair in links)
        if not others:
            continue
        count_F, chance_F = (_count_shared(index, dictionaries, some) for some in (links, null))
        all_shares.append(
            FeatureShares(
                name=dictionary.name,
                everywhere=wilson(count_F == others),
                somewhere=wilson(count_F > 0),
                nowhere=wilson(count_F == 0),
                everywhere_null=float((chance_F == others).mean()),
                somewhere_null=float((chance_F > 0).mean()),
            )
        )
    return tuple(all_shares)


def _count_shared(index: int, dictionaries: Sequence[ComparedDictionary], links: Links) -> np.ndarray:
    """Return the number of other dictionaries that share each feature of a dictionary, [F]."""
    others = [first + second - index for first, second in links if index in (first, second)]
    return np.sum([_between(index, other, dictionaries, links).partner_F >= 0 for other in others], axis=0)


def _between(first: int, second: int, dictionaries: Sequence[ComparedDictionary], links: Links) -> Link:
    if first < second:
        return links[first, second]
    return links[second, first].back(dictionaries[first].features)


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


def through_layers(
    dictionaries: Sequence[ComparedDictionary],
    links: Links,
    null: Links,
    order: Sequence[int],
    label: Callable[[int, int], str | None],
) -> tuple[Chains, list[Followed]]:
    """Return the chains through the layers of a model, summarised and in full.

    Args:
      dictionaries: as for ``shares``.
      links: as for ``shares``.
      null: as for ``shares``.
      order: numbers of the dictionaries in the order of layers.
      label: (number of the dictionary, feature) -> name of the feature, or None.
    """
    steps = list(itertools.pairwise(order))
    runs = follow([_between(*step, dictionaries, links) for step in steps])
    chance = follow([_between(*step, dictionaries, null) for step in steps])
    longest = []
    for run in runs[:_LISTED]:
        places = order[run.start : run.start + len(run.features)]
        labels = [label(place, feature) for place, feature in zip(places, run.features, strict=True)]
        name = dictionaries[places[0]].name
        longest.append(Chain(name, run.features, run.value, next(filter(None, labels), None)))
    names = tuple(dictionaries[place].name for place in order)
    return Chains(names, _lengths(runs), _lengths(chance), tuple(longest)), runs


def _lengths(runs: Sequence[Followed]) -> dict[int, int]:
    return dict(sorted(Counter(len(run.features) for run in runs).items()))
