"""The results of the stage ``transfer``: chains of features through the layers, and a table of all pairs.

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

from saejax.files import write_text
from saejax.matching.transfer.chains import SHARED, FeaturePairs, Followed, Link, follow
from saejax.matching.transfer.compared import Compared, measures_of
from saejax.matching.transfer.results import Chain, Chains, ComparedDictionary, ComparedPair, TransferResults
from saejax.matching.transfer.settings import TransferConfig
from saejax.runner.parts import part_file
from saejax.runner.workspace import Run
from saejax.stages.transfer.inputs import find_names, knows_live

_LISTED = 20  # chains in the results


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
    names = functools.cache(lambda index: find_names(compared[index], run))

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
                entry.name,
                entry.config.model,
                entry.config.site,
                entry.target,
                entry.config.n_features,
                knows_live(entry, run.folder.parent),
            )
            for entry in compared
        ),
        "Two features are shared if the one-to-one assignment with the largest sum of values makes them a pair, and "
        f"their value is at least {SHARED:g}",
        tuple(pairs),
        tuple(through_layers(order) for order in _by_layer(compared)),
    )


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
