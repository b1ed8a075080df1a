"""Do two rows of a study agree on what matters in a benchmark?

Two rankings can be compared. *Items*: by the log-likelihood that each item loses under a row's top features, without
what random sets explain (``item_alignment``); this is defined for any two models that were asked the same items.
*Features*: by attribution, where two rows have dictionaries of one model, whose features are matched by direction
(``stability.match_by_direction``); directions of two models have nothing to do with each other.

A correlation is compared with those where one side is shuffled, and with a placebo: of items, a random set in the place
of one row's top features; of features, partners that fire as often and as strongly, as features that fire often matter
more in every dictionary.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from saejax.dictionaries import Dictionary, stacks
from saejax.files import read_json
from saejax.interventions.study_results import BenchmarkFeature, StudyResults
from saejax.interventions.study_run import RANKING
from saejax.interventions.table import load_effects
from saejax.matching.transfer.stability import compare, match_by_direction
from saejax.page.findings import Findings
from saejax.results import from_json
from saejax.statistics.ranks import holm_by_key
from saejax.studies.item_alignment import ItemLosses, align_items
from saejax.studies.results import AlignmentFigures

LEVEL, LEAST = 0.05, 0.3
RULE = (
    f"Two rows are aligned on a benchmark if the rank correlation of what items lose under the top features, without "
    "what random sets explain, or (Spearman's) of the attributions of matched features of one model, is at least "
    f"{LEAST:g}, is as large with one side shuffled in at most {100 * LEVEL:g} % of the cases after Holm's correction "
    "over all comparisons, and is above its placebo: of items, the 95 % quantile with a random set in the place of one "
    "row's top features; of features, the middle 95 % of what partners give that fire as often and as strongly."
)
_PERMUTATIONS, _SEED = 9999, 789


class Attributions(NamedTuple):
    """The features of a ranking, as ``stability.compare`` takes them; arrays [N]."""

    feature: np.ndarray
    drop: np.ndarray
    firing_rate: np.ndarray
    mean_activation: np.ndarray


def alignments(rows: Mapping[str, Findings]) -> list[AlignmentFigures]:
    """Compare every pair of rows on every benchmark of both.

    Args:
      rows: what each found, by name.

    Raises:
      UserError: a file of a unit is damaged.
    """
    comparisons = [
        comparison
        for first, second in itertools.combinations(rows, 2)
        for benchmark in rows[first].each(StudyResults).keys() & rows[second].each(StudyResults).keys()
        for comparison in _pair((first, second), benchmark, rows)
    ]
    comparisons.sort(key=lambda comparison: (comparison.by, comparison.benchmark))
    p_values = {number: each.p_value for number, each in enumerate(comparisons) if each.p_value is not None}
    for number, p_holm in holm_by_key(p_values).items():
        comparisons[number] = _judge(comparisons[number], p_holm)
    return comparisons


def _judge(comparison: AlignmentFigures, p: float) -> AlignmentFigures:
    """Return a comparison with what the rule says, given its corrected p."""
    correlation = comparison.rank_correlation or 0.0
    above = comparison.control is None or correlation > comparison.control
    return dataclasses.replace(comparison, p_holm=p, aligned=correlation >= LEAST and p <= LEVEL and above)


def _pair(pair: tuple[str, str], benchmark: str, rows: Mapping[str, Findings]) -> Iterator[AlignmentFigures]:
    folders = [rows[name].folders[f"study/{benchmark}"] for name in pair]
    (one_ids, one_items), (two_ids, two_items) = (_losses(folder, benchmark) for folder in folders)
    same = len({rows[name].each(StudyResults)[benchmark].origin for name in pair}) == 1
    shared = [item for item in one_ids if item in two_ids] if same else []
    agreement = align_items(
        one_items.choose(_indices(one_ids, shared)), two_items.choose(_indices(two_ids, shared)), _SEED
    )
    correlation, p, placebo = None, None, None
    if agreement:
        correlation, p, placebo = agreement.correlation, agreement.p_value, agreement.placebo
    yield AlignmentFigures(*pair, benchmark, "items", len(shared), correlation, p, None, placebo, None)
    loaded = [_dictionary(rows[name], benchmark) for name in pair]
    if loaded[0].config.fingerprint == loaded[1].config.fingerprint and loaded[0].config.d_in == loaded[1].config.d_in:
        first, second = (np.asarray(dictionary.W_dec_FxD[...]) for dictionary in loaded)
        matches = match_by_direction(first, second)
        one, two = (_attributions(folder) for folder in folders)
        at_M = np.isin(matches.first_M, one.feature) & np.isin(matches.second_M, two.feature)
        one_M = one.drop[np.searchsorted(one.feature, matches.first_M[at_M])]
        two_M = two.drop[np.searchsorted(two.feature, matches.second_M[at_M])]
        alike, (correlation, p) = compare(one, two, matches, seed=_SEED).alike, rank_correlation(one_M, two_M)
        control = alike.high if alike else None
        yield AlignmentFigures(*pair, benchmark, "features", len(one_M), correlation, p, None, control, None)


def rank_correlation(first_N: np.ndarray, second_N: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """Return Spearman's correlation and its permutation p-value; None if it is not defined.

    Args:
      first_N: finite numbers of N things.
      second_N: others of the same things.
    """
    if len(first_N) < 3 or np.ptp(first_N) == 0 or np.ptp(second_N) == 0:
        return None, None
    one_N, two_N = (rankdata(values_N) for values_N in (first_N, second_N))
    one_N, two_N = ((ranks_N - ranks_N.mean()) / (ranks_N.std() * len(ranks_N) ** 0.5) for ranks_N in (one_N, two_N))
    rng = np.random.default_rng(_SEED)
    seen = float(one_N @ two_N)
    as_large = sum(float(rng.permutation(one_N) @ two_N) >= seen - 1e-12 for _ in range(_PERMUTATIONS))
    return seen, (1 + as_large) / (1 + _PERMUTATIONS)


def _indices(ids: Mapping[str, int], items: Sequence[str]) -> np.ndarray:
    return np.array([ids[item] for item in items], np.int64)


def _losses(folder: Path, benchmark: str) -> tuple[dict[str, int], ItemLosses]:
    """Return the index of each item, and what items lose under the top features and under random sets, in nats."""
    table = load_effects(folder)
    prompts = table.select_prompts(benchmark)
    top_1xP, random_DxP = (
        table.drops(table.select_whole_edits(benchmark, group), prompts, "answer_log_prob")
        for group in ("top", "random")
    )
    return {prompt.id: index for index, prompt in enumerate(prompts)}, ItemLosses(top_1xP[0], random_DxP)


def _attributions(folder: Path) -> Attributions:
    path = folder / RANKING
    ranking: Sequence[BenchmarkFeature] = from_json(tuple[BenchmarkFeature, ...], read_json(path), path)
    ranking = sorted(ranking, key=lambda one: one.feature)
    columns = ([getattr(one, name) for one in ranking] for name in ("attribution", "firing_rate", "mean_activation"))
    return Attributions(np.array([one.feature for one in ranking], np.int64), *map(np.array, columns))


def _dictionary(found: Findings, benchmark: str) -> Dictionary:
    """Return the dictionary that was tested."""
    name = found.each(StudyResults)[benchmark].dictionary
    return stacks.load_trained(name, found.folders, "--study.dictionary")
