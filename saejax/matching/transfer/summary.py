"""Chains of features through the layers, and a table of all pairs of dictionaries.

Chains follow from the pairs of features that were written for every two compared dictionaries. Those of a model follow
one measure, the first of ``--transfer.measures`` that applies to all of its successive layers; results say which.
"""

import csv
import dataclasses
import functools
import io
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from saejax.files import write_text
from saejax.interpret.feature_record import feature_names
from saejax.interventions.columns import Columns
from saejax.matching.match import Matched
from saejax.matching.transfer.compared import Compared, measures_of
from saejax.matching.transfer.results import Chain, Chains, ComparedDictionary, ComparedPair, TransferResults
from saejax.matching.transfer.settings import TransferConfig
from saejax.runner.parts import part_file
from saejax.runner.workspace import Run

_LISTED = 20  # chains in the results

# Cosine or correlation from which features are shared: that of two random directions is below it in any model's width.
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
        sides = [(each.partner_F.astype(np.int32), each.value_F.astype(np.float32)) for each in (matched, null)]
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


def summarize(
    run: Run, compared: Sequence[Compared], parts: Sequence[str], pairs: Sequence[ComparedPair]
) -> TransferResults:
    """Return the results with chains from the pairs of features that were written, and write ``pairs.csv``.

    Args:
      run: the run.
      compared: the dictionaries.
      parts: names of the parts, one for each dictionary but the last.
      pairs: results of the compared pairs.
    """
    names = functools.cache(lambda index: feature_names(*compared[index].trained_in(run.folder.parent)))

    def link(measure: str, first: int, second: int, null: bool) -> Link:
        low, high = min(first, second), max(first, second)
        # A pair's features are in the part of the dictionary that was named first.
        forward = FeaturePairs.load(part_file(run, parts[low], f"-{measure}.parquet")).link(high, null)
        return forward if first == low else forward.back(compared[first].config.n_features)

    def through_layers(order: Sequence[int]) -> Chains:
        steps, wanted = list(itertools.pairwise(order)), run.configs[TransferConfig].measures
        applying = [measures_of(wanted, compared[first], compared[second]) for first, second in steps]
        # There is one: of two widths activity was asked for, or the run has ended before.
        measure = next(name for name in wanted if all(name in names for names in applying))
        runs, chance = (follow([link(measure, *step, null) for step in steps]) for null in (False, True))
        longest = []
        for chain in runs[:_LISTED]:
            places = order[chain.start : chain.start + len(chain.features)]
            labels = (names(place).get(feature) for place, feature in zip(places, chain.features, strict=True))
            label = next(filter(None, labels), None)
            longest.append(Chain(compared[places[0]].name, chain.features, chain.value, label))
        dictionaries = tuple(compared[place].name for place in order)
        return Chains(dictionaries, measure, _lengths(runs), _lengths(chance), tuple(longest))

    write_text(run.folder / "pairs.csv", _csv(pairs))
    return TransferResults(
        tuple(
            ComparedDictionary(
                each.name,
                each.config.model,
                each.config.site,
                each.target,
                each.config.n_features,
                each.knows_live(run.folder.parent),
            )
            for each in compared
        ),
        "Two features are shared if the one-to-one assignment with the largest sum of values makes them a pair, and "
        f"their value is at least {SHARED:g}",
        tuple(pairs),
        tuple(through_layers(order) for order in _by_layer(compared)),
    )


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


def _lengths(runs: Sequence[Followed]) -> dict[int, int]:
    return dict(sorted(Counter(len(run.features) for run in runs).items()))


def _by_layer(compared: Sequence[Compared]) -> list[list[int]]:
    """Return the dictionaries of one model and kind of site in the order of layers, as numbers; one for each layer.

    Of several at a layer the first is used.
    """
    groups: dict[tuple[str, str], dict[int, int]] = {}
    for place, dictionary in enumerate(compared):
        group = groups.setdefault((dictionary.model_key, dictionary.target.partition(".")[0]), {})
        group.setdefault(dictionary.layer, place)
    return [[layers[layer] for layer in sorted(layers)] for layers in groups.values() if len(layers) > 1]


def _csv(pairs: Sequence[ComparedPair]) -> str:
    """Return the figures of all pairs and measures as a CSV table, each with its null."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    figures = ("nearest", "nearest_back", "matched", "shared")
    suffixes = ["", "_low", "_high", "_null"]
    table.writerow(["first", "second", "measure", *(name + end for name in figures for end in suffixes)])
    for pair in pairs:
        for measure, both in pair.measures.items():
            values = [
                f"{value:.6g}"
                for name in figures
                for value in (*dataclasses.astuple(getattr(both.scores, name)), getattr(both.null, name).mean)
            ]
            table.writerow([pair.first, pair.second, measure, *values])
    return out.getvalue()
