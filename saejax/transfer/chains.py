"""What many dictionaries share: features that are everywhere, those of one alone, and chains through the layers.

All is made of the pairs of features that the assignments found, between each two dictionaries.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from saejax.tasks.scoring import wilson
from saejax.transfer.results import Chain, Chains, ComparedDictionary, FeatureShares

_LISTED = 20  # chains in the results


class Link(NamedTuple):
    """The features of one dictionary and their partners in another; -1 where one has none, or shares nothing with it.

    Attributes:
      partner_F: in the other dictionary.
      value_F: their cosine or correlation.
    """

    partner_F: np.ndarray
    value_F: np.ndarray

    @classmethod
    def shared(cls, partner_F: np.ndarray, value_F: np.ndarray, least: float) -> "Link":
        """Of an assignment: the pairs whose value is at least so large."""
        return cls(np.where(np.nan_to_num(value_F, nan=-1.0) >= least, partner_F, -1), value_F)

    def back(self, features: int) -> "Link":
        """The same from the other dictionary, which has so many features."""
        has = np.flatnonzero(self.partner_F >= 0)
        partner_G, value_G = np.full(features, -1), np.full(features, np.nan)
        partner_G[self.partner_F[has]], value_G[self.partner_F[has]] = has, self.value_F[has]
        return Link(partner_G, value_G)


Links = Mapping[tuple[int, int], Link]  # from the first to the second of every two dictionaries, by their places


def shares(dictionaries: Sequence[ComparedDictionary], links: Links, null: Links) -> tuple[FeatureShares, ...]:
    """How many features of each dictionary are shared with all others, with some, with none.

    Args:
      dictionaries: that were compared.
      links: between them.
      null: the same where nothing is shared.
    """
    found, others = [], len(dictionaries) - 1
    for own, one in enumerate(dictionaries):
        count_F, chance_F = (_others_with(own, dictionaries, some) for some in (links, null))
        found.append(
            FeatureShares(
                name=one.name,
                everywhere=wilson(count_F == others),
                somewhere=wilson(count_F > 0),
                nowhere=wilson(count_F == 0),
                everywhere_null=float((chance_F == others).mean()),
                somewhere_null=float((chance_F > 0).mean()),
            )
        )
    return tuple(found)


def _others_with(own: int, dictionaries: Sequence[ComparedDictionary], links: Links) -> np.ndarray:
    """With how many other dictionaries each feature of one is shared."""
    others = [other for other in range(len(dictionaries)) if other != own]
    return np.sum([_between(own, other, dictionaries, links).partner_F >= 0 for other in others], axis=0)


def _between(first: int, second: int, dictionaries: Sequence[ComparedDictionary], links: Links) -> Link:
    if first < second:
        return links[first, second]
    return links[second, first].back(dictionaries[first].features)


class Followed(NamedTuple):
    """A chain: the place in the order at which it begins, its features from there on, and its weakest link."""

    start: int
    features: tuple[int, ...]
    value: float


def follow(links: Sequence[Link]) -> list[Followed]:
    """All chains of two features or more, longest first, then by their weakest link.

    Args:
      links: from each of some dictionaries to the next.
    """
    found: list[Followed] = []
    begun: dict[int, Followed] = {}  # by the feature of the present dictionary in which they end
    for place, link in enumerate(links):
        ended, going = begun, {}
        for feature in np.flatnonzero(link.partner_F >= 0).tolist():
            value, partner = float(link.value_F[feature]), int(link.partner_F[feature])
            before = ended.pop(feature, Followed(place, (feature,), np.inf))
            going[partner] = Followed(before.start, (*before.features, partner), min(before.value, value))
        found += ended.values()
        begun = going
    found += begun.values()
    return sorted(found, key=lambda run: (-len(run.features), -run.value))


def through_layers(
    dictionaries: Sequence[ComparedDictionary],
    links: Links,
    null: Links,
    order: Sequence[int],
    label: Callable[[int, int], str | None],
) -> tuple[Chains, list[Followed]]:
    """Chains through the layers of a model.

    Args:
      dictionaries, links, null: as for ``shares``.
      order: places of the dictionaries to go through, by layer.
      label: what a feature (place of the dictionary, number) is called.

    Returns:
      What there is to say of them, and all of them.
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
