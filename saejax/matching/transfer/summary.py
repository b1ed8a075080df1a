"""Shares of features that many dictionaries have in common, chains through the layers, and a table of all pairs.

All follow from the pairs of features that were written for every two compared dictionaries. The shares of a dictionary
follow one measure, the first of ``--transfer.measures`` that applies to all of its pairs, and so do the chains of a
model; results say which.
"""

import csv
import dataclasses
import functools
import io
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Self

import numpy as np

from saejax.files import write_text
from saejax.interpret.feature_record import feature_names
from saejax.interventions.columns import Columns
from saejax.matching.match import Matched
from saejax.matching.transfer.compared import Compared, measures_of
from saejax.matching.transfer.results import Chain, Chains, ComparedPair, FeatureShares, TransferResults
from saejax.runner.parts import part_file
from saejax.runner.workspace import Run
from saejax.stages.transfer import TransferConfig
from saejax.tasks.scoring import wilson

_LISTED = 20  # chains in the results

# Cosine or correlation from which features are shared: that of two random directions is below it in any model's width.
SHARED = 0.7

Pair = tuple[int, int]  # numbers of two dictionaries, the smaller first


class Link(NamedTuple):
    """The features of one dictionary and their partners in another."""

    partner_F: np.ndarray  #: feature of the other dictionary; -1: not shared
    value_F: np.ndarray  #: cosine or correlation of the pair

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
        return Link.shared(partner[in_pair].astype(np.int64), value[in_pair])


@dataclasses.dataclass(frozen=True)
class ChainLinks(Columns):
    """Features of chains, a row each."""

    group: np.ndarray  #: index in the results' ``chains``
    chain: np.ndarray  #: number of the chain, longest first
    dictionary: np.ndarray  #: number of the dictionary in the results
    feature: np.ndarray  #: index of the feature


def summarize(
    run: Run, compared: Sequence[Compared], parts: Sequence[str], pairs: Sequence[ComparedPair], wanted: Sequence[Pair]
) -> TransferResults:
    """Return shares and chains from the pairs of features that were written.

    Args:
      run: the run.
      compared: the dictionaries.
      parts: names of the parts, one for each dictionary but the last.
      pairs: results of the compared pairs.
      wanted: numbers of the compared pairs.
    """
    common = functools.partial(common_measure, run.configs[TransferConfig].measures, compared)
    measure_of: dict[int, str] = {}  # by dictionary
    orders: dict[tuple[int, ...], str] = {}  # of chains
    for index in range(len(compared)):
        if with_it := [pair for pair in wanted if index in pair]:
            measure_of[index] = common(with_it)
    for layers in _by_layer(compared):
        steps = [(min(step), max(step)) for step in itertools.pairwise(layers)]
        if set(steps) <= set(wanted):
            orders[tuple(layers)] = common(steps)
    step_measure = {
        (min(step), max(step)): measure for order, measure in orders.items() for step in itertools.pairwise(order)
    }
    counts = [[np.zeros(each.config.n_features, np.int32) for each in compared] for _ in (False, True)]
    links: tuple[dict[Pair, Link], dict[Pair, Link]] = {}, {}
    # Part by part, and only counts and the links of chains are kept: memory does not grow with the number of pairs.
    for first, part in enumerate(parts):
        load = lambda measure, part=part: FeaturePairs.load(part_file(run, part, f"-{measure}.parquet"))  # noqa: E731
        table = functools.cache(load)
        for second in (j for i, j in wanted if i == first):
            for null in (False, True):
                counts[null][first] += table(measure_of[first]).link(second, null).partner_F >= 0
                partner_F = table(measure_of[second]).link(second, null).partner_F
                counts[null][second][partner_F[partner_F >= 0]] += 1  # no feature is the partner of two
                if (first, second) in step_measure:
                    links[null][first, second] = table(step_measure[first, second]).link(second, null)
    names = functools.cache(lambda index: feature_names(*compared[index].trained_in(run.folder.parent)))
    chains: list[Chains] = []
    rows: list[tuple[int, ...]] = []
    for order, measure in orders.items():
        summary, runs = through_layers(
            compared, measure, *links, order, lambda index, feature: names(index).get(feature)
        )
        rows += [
            (len(chains), number, order[chain.start + step], feature)
            for number, chain in enumerate(runs)
            for step, feature in enumerate(chain.features)
        ]
        chains.append(summary)
    # Reshaped, as no rows at all would have no columns either.
    ChainLinks(*np.array(rows, np.int32).reshape(-1, 4).T).save(run.folder / "chains.parquet")
    write_text(run.folder / "pairs.csv", _csv(pairs))
    return TransferResults(
        tuple(each.described() for each in compared),
        "Two features are shared if the one-to-one assignment with the largest sum of values makes them a pair, and "
        f"their value is at least {SHARED:g}",
        tuple(pairs),
        tuple(
            feature_shares(
                compared[index].name, measure, counts[0][index], counts[1][index], sum(index in pair for pair in wanted)
            )
            for index, measure in measure_of.items()
        ),
        tuple(chains),
    )


def common_measure(measures: Sequence[str], compared: Sequence[Compared], pairs: Sequence[Pair]) -> str:
    """Return the first measure that applies to all of some pairs; activity does wherever another one fails."""
    applying = [measures_of(measures, compared[first], compared[second]) for first, second in pairs]
    return next(name for name in measures if all(name in names for names in applying))


def feature_shares(name: str, measure: str, count_F: np.ndarray, null_F: np.ndarray, compared: int) -> FeatureShares:
    """Return the shares of a dictionary's features that are shared with all others, with some, with none.

    Args:
      name: of the dictionary.
      measure: by which features are shared.
      count_F: number of other dictionaries that share each feature.
      null_F: the same under the null.
      compared: number of dictionaries that it was compared with.
    """
    return FeatureShares(
        name=name,
        measure=measure,
        everywhere=wilson(count_F == compared),
        somewhere=wilson(count_F > 0),
        nowhere=wilson(count_F == 0),
        everywhere_null=float((null_F == compared).mean()),
        somewhere_null=float((null_F > 0).mean()),
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


def through_layers(
    compared: Sequence[Compared],
    measure: str,
    links: Mapping[Pair, Link],
    null: Mapping[Pair, Link],
    order: Sequence[int],
    label: Callable[[int, int], str | None],
) -> tuple[Chains, list[Followed]]:
    """Return the chains through the layers of a model, summarised and in full.

    Args:
      compared: the dictionaries.
      measure: by which features are shared.
      links: links between the dictionaries of successive layers, by their numbers, the smaller first.
      null: the same under the null.
      order: numbers of the dictionaries in the order of layers.
      label: (number of the dictionary, feature) -> name of the feature, or None.
    """

    def step(first: int, second: int, some: Mapping[Pair, Link]) -> Link:
        if first < second:
            return some[first, second]
        return some[second, first].back(compared[first].config.n_features)

    runs, chance = (follow([step(*pair, some) for pair in itertools.pairwise(order)]) for some in (links, null))
    longest = []
    for run in runs[:_LISTED]:
        places = order[run.start : run.start + len(run.features)]
        labels = [label(place, feature) for place, feature in zip(places, run.features, strict=True)]
        name = compared[places[0]].name
        longest.append(Chain(name, run.features, run.value, next(filter(None, labels), None)))
    names = tuple(compared[place].name for place in order)
    return Chains(names, measure, _lengths(runs), _lengths(chance), tuple(longest)), runs


def _lengths(runs: Sequence[Followed]) -> dict[int, int]:
    return dict(sorted(Counter(len(run.features) for run in runs).items()))


def _by_layer(compared: Sequence[Compared]) -> list[list[int]]:
    """Return the dictionaries of one model and kind of site in the order of layers, as numbers; one for each layer.

    Of several at a layer the first is used.
    """
    groups: dict[tuple[str, str], dict[int, int]] = {}
    for place, dictionary in enumerate(compared):
        group = groups.setdefault((dictionary.fingerprint, dictionary.target.partition(".")[0]), {})
        group.setdefault(dictionary.layer, place)
    return [[layers[layer] for layer in sorted(layers)] for layers in groups.values() if len(layers) > 1]


def _csv(pairs: Sequence[ComparedPair]) -> str:
    """Return the figures of all pairs and measures as a CSV table, each with its null."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    figures = ("nearest", "nearest_back", "matched", "shared", "close")
    suffixes = ["", "_low", "_high", "_null"]
    table.writerow(
        ["first", "second", "measure", *(name + end for name in figures for end in suffixes), "mutual", "mutual_null"]
    )
    for pair in pairs:
        for measure, both in pair.measures.items():
            values = [
                f"{value:.6g}"
                for name in figures
                for value in (*dataclasses.astuple(getattr(both.scores, name)), getattr(both.null, name).mean)
            ]
            mutual = [f"{scores.mutual:.6g}" for scores in (both.scores, both.null)]
            table.writerow([pair.first, pair.second, measure, *values, *mutual])
    return out.getvalue()
