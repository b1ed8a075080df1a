"""What follows from the pairs of features that were written: shares, chains, and a table of all pairs."""

import csv
import dataclasses
import io
from collections.abc import Sequence

import numpy as np

from saejax.files import write_text
from saejax.interventions.columns import Columns
from saejax.runner.parts import part_file
from saejax.runner.workspace import Run
from saejax.stages.transfer import TransferConfig
from saejax.transfer.chains import Link, shares, through_layers
from saejax.transfer.compared import Compared, measures_of
from saejax.transfer.results import Chains, ComparedPair, TransferResults


@dataclasses.dataclass(frozen=True)
class FeaturePairs(Columns):
    """Pairs of features, a row each: those of an assignment, and what the first one's features get by chance.

    Attributes:
      second: place of the second dictionary in the results.
      feature, partner: numbers in the first and the second dictionary; partner -1: none.
      value: cosine or correlation; NaN where there is no partner.
      null_partner, null_value: the same of the assignment to what shares nothing with the first dictionary.
    """

    second: np.ndarray
    feature: np.ndarray
    partner: np.ndarray
    value: np.ndarray
    null_partner: np.ndarray
    null_value: np.ndarray

    def link(self, second: int, least: float, null: bool) -> Link:
        """The features that the first dictionary shares with the one at ``second``, of a value from ``least`` on."""
        own = self.second == second
        partner, value = (self.null_partner, self.null_value) if null else (self.partner, self.value)
        return Link.shared(partner[own].astype(np.int64), value[own], least)


def together(
    run: Run, compared: Sequence[Compared], parts: Sequence[str], pairs: Sequence[ComparedPair]
) -> TransferResults:
    """Shares and chains, from the pairs of features that were written."""
    config = run.configs[TransferConfig]
    links: tuple[dict, dict] = {}, {}
    for place, part in enumerate(parts):
        tables: dict[str, FeaturePairs] = {}
        for second in range(place + 1, len(compared)):
            measure = measures_of(config.measures, compared[place], compared[second])[0]
            if measure not in tables:
                tables[measure] = FeaturePairs.load(part_file(run, part, f"-{measure}.parquet"))
            for null in (False, True):
                links[null][place, second] = tables[measure].link(second, config.shared, null)
    described = tuple(one.described() for one in compared)
    labels = [one.labels(run.folder.parent) for one in compared]
    chains: list[Chains] = []
    rows: list[tuple[int, ...]] = []
    for order in _by_layer(compared):
        told, runs = through_layers(described, *links, order, lambda place, feature: labels[place].get(feature))
        rows += [
            (len(chains), number, order[one.start + step], feature)
            for number, one in enumerate(runs)
            for step, feature in enumerate(one.features)
        ]
        chains.append(told)
    ChainLinks(*np.array(rows, np.int32).reshape(-1, 4).T).save(run.folder / "chains.parquet")
    write_text(run.folder / "pairs.csv", _csv(pairs))
    kind = "of activity or cosine" if "activity" in config.measures else "of cosine"
    rule = (
        f"Two features are shared if the one-to-one assignment with the largest sum of {config.measures[0]} values (or "
        f"of the next of {', '.join(config.measures)} that applies) makes them a pair, and their value {kind} is at "
        f"least {config.shared:g}"
    )
    return TransferResults(described, rule, tuple(pairs), shares(described, *links), tuple(chains))


@dataclasses.dataclass(frozen=True)
class ChainLinks(Columns):
    """Features of chains, a row each.

    Attributes:
      group: place among the results' chains; ``chain``: number of the chain, longest first.
      dictionary: place in the results; ``feature``: number.
    """

    group: np.ndarray
    chain: np.ndarray
    dictionary: np.ndarray
    feature: np.ndarray


def _by_layer(compared: Sequence[Compared]) -> list[list[int]]:
    """Places of dictionaries that make a way through a model: of one model and kind of site, one for each layer.

    Of several at a layer the first is taken.
    """
    groups: dict[tuple[str, str], dict[int, int]] = {}
    for place, one in enumerate(compared):
        group = groups.setdefault((one.fingerprint, one.target.partition(".")[0]), {})
        group.setdefault(one.layer, place)
    return [[layers[layer] for layer in sorted(layers)] for layers in groups.values() if len(layers) > 1]


def _csv(pairs: Sequence[ComparedPair]) -> str:
    """The figures of all pairs and measures as a table, each with its null."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    figures = ("nearest", "nearest_back", "matched", "shared", "close")
    told = ["", "_low", "_high", "_null"]
    table.writerow(
        ["first", "second", "measure", *(name + end for name in figures for end in told), "mutual", "mutual_null"]
    )
    for pair in pairs:
        for measure, both in pair.measures.items():
            values = [
                f"{value:.6g}"
                for name in figures
                for value in (*dataclasses.astuple(getattr(both.found, name)), getattr(both.null, name).mean)
            ]
            mutual = [f"{one.mutual:.6g}" for one in (both.found, both.null)]
            table.writerow([pair.first, pair.second, measure, *values, *mutual])
    return out.getvalue()
