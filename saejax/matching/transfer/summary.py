"""Shares, chains and a table of all pairs, from the pairs of features that were written."""

import csv
import dataclasses
import functools
import io
import itertools
from collections.abc import Sequence

import numpy as np

from saejax.files import write_text
from saejax.interpret.feature_record import feature_names
from saejax.interventions.columns import Columns
from saejax.matching.transfer.chains import SHARED, Link, shares, through_layers
from saejax.matching.transfer.compared import Compared, measures_of
from saejax.matching.transfer.results import Chains, ComparedPair, TransferResults
from saejax.runner.parts import part_file
from saejax.runner.workspace import Run
from saejax.stages.transfer import TransferConfig

Pair = tuple[int, int]  # numbers of two dictionaries, the smaller first


@dataclasses.dataclass(frozen=True)
class FeaturePairs(Columns):
    """Pairs of features of an assignment, and of the assignment under the null, a row each.

    Attributes:
      second: number of the second dictionary in the results.
      feature: feature of the first dictionary.
      partner: feature of the second; -1: none.
      value: cosine or correlation; NaN without a partner.
      null_partner: partner under the null.
      null_value: its value.
    """

    second: np.ndarray
    feature: np.ndarray
    partner: np.ndarray
    value: np.ndarray
    null_partner: np.ndarray
    null_value: np.ndarray

    def link(self, second: int, null: bool) -> Link:
        """Return the features shared with the dictionary number ``second``."""
        in_pair = self.second == second
        partner, value = (self.null_partner, self.null_value) if null else (self.partner, self.value)
        return Link.shared(partner[in_pair].astype(np.int64), value[in_pair])


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
    config = run.configs[TransferConfig]
    links: tuple[dict, dict] = {}, {}
    for first, part in enumerate(parts):
        tables: dict[str, FeaturePairs] = {}
        for second in (j for i, j in wanted if i == first):
            measure = measures_of(config.measures, compared[first], compared[second])[0]
            if measure not in tables:
                tables[measure] = FeaturePairs.load(part_file(run, part, f"-{measure}.parquet"))
            for null in (False, True):
                links[null][first, second] = tables[measure].link(second, null)
    described = tuple(each.described() for each in compared)
    names = functools.cache(lambda index: feature_names(*compared[index].trained_in(run.folder.parent)))
    chains: list[Chains] = []
    rows: list[tuple[int, ...]] = []
    for order in _by_layer(compared):
        if any((min(step), max(step)) not in links[0] for step in itertools.pairwise(order)):
            continue
        summary, runs = through_layers(described, *links, order, lambda index, feature: names(index).get(feature))
        rows += [
            (len(chains), number, order[chain.start + step], feature)
            for number, chain in enumerate(runs)
            for step, feature in enumerate(chain.features)
        ]
        chains.append(summary)
    # Reshaped, as no rows at all would have no columns either.
    ChainLinks(*np.array(rows, np.int32).reshape(-1, 4).T).save(run.folder / "chains.parquet")
    write_text(run.folder / "pairs.csv", _csv(pairs))
    rule = (
        f"Two features are shared if the one-to-one assignment with the largest sum of {config.measures[0]} values (or "
        f"of the next of {', '.join(config.measures)} that applies) makes them a pair, and their value is at least "
        f"{SHARED:g}"
    )
    return TransferResults(described, rule, tuple(pairs), shares(described, *links), tuple(chains))


@dataclasses.dataclass(frozen=True)
class ChainLinks(Columns):
    """Features of chains, a row each.

    Attributes:
      group: index in the results' ``chains``.
      chain: number of the chain, longest first.
      dictionary: number of the dictionary in the results.
      feature: index of the feature.
    """

    group: np.ndarray
    chain: np.ndarray
    dictionary: np.ndarray
    feature: np.ndarray


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
