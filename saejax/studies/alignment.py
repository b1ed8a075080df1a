"""Agreement between two rows of a study on what matters in a benchmark.

Two rankings can be compared between any two models that were asked the same items. *Items*: by the log-likelihood that
each item loses under a row's top features, without what its category, the length of its answer and random sets explain
(``item_alignment``). *Features*: by their attribution, matched by their activity on the items
(``saejax.matching.importance``).

A correlation is compared with those where one side is shuffled, and with placebos: of items, a random set in the place
of one row's top features; of features, a rotated dictionary, and the importance for other items' answers.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from saejax.interventions.table import PromptDefinition, load_effects
from saejax.matching.importance import ItemFeatures, align_importance
from saejax.page.findings import Findings
from saejax.statistics.ranks import holm_by_key
from saejax.studies.benchmark_results import StudyResults
from saejax.studies.benchmark_run import FEATURES_ON_ITEMS, ROTATED_ON_ITEMS
from saejax.studies.item_alignment import ItemLosses, align_items
from saejax.studies.results import AlignmentFigures

LEVEL, LEAST = 0.05, 0.3
RULE = (
    "Two rows are aligned on a benchmark if a rank correlation is at least "
    f"{LEAST:g}, is as large with one side shuffled in at most {100 * LEVEL:g} % of the cases after Holm's correction "
    "over all comparisons, and is above its placebos. Of items it is that of what they lose under the top features, "
    "without what their category, the length of their answer and random sets explain, shuffled within categories; the "
    "placebo is the 95 % quantile with a random set in the place of one row's "
    "top features. Of features it is that of the attributions of those matched by their activity on the items; the "
    "placebos are a rotated dictionary, and the 95 % quantile with the importance for other items' answers."
)
_SEED = 789


def alignments(rows: Mapping[str, Findings]) -> list[AlignmentFigures]:
    """Compare every pair of rows on every benchmark of both.

    Args:
      rows: the findings of each row, by name.

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
    for number, p in holm_by_key(p_values).items():
        correlation, control = comparisons[number].rank_correlation or 0.0, comparisons[number].control
        aligned = correlation >= LEAST and p <= LEVEL and (control is None or correlation > control)
        comparisons[number] = dataclasses.replace(comparisons[number], p_holm=p, aligned=aligned)
    return comparisons


def _pair(pair: tuple[str, str], benchmark: str, rows: Mapping[str, Findings]) -> Iterator[AlignmentFigures]:
    folders = [rows[name].folders[f"study/{benchmark}"] for name in pair]
    results = [rows[name].each(StudyResults)[benchmark] for name in pair]
    (first_items, first_losses), (second_items, second_losses) = (_losses(folder, benchmark) for folder in folders)
    same = results[0].origin == results[1].origin
    shared = [item for item in first_items if item in second_items] if same else []
    agreement = align_items(
        first_losses.choose(_indices(first_items, shared)),
        second_losses.choose(_indices(second_items, shared)),
        [results[0].categories.get(item.removeprefix(f"{benchmark}/"), "") for item in shared],
        [len(first_items[item].correct) for item in shared],
        _SEED,
    )
    correlation, p, placebo = None, None, None
    if agreement:
        correlation, p, placebo = agreement.correlation, agreement.p_value, agreement.placebo
    yield AlignmentFigures(*pair, benchmark, "items", len(shared), correlation, p, None, placebo, None, None, None)
    if not all((folder / FEATURES_ON_ITEMS).exists() for folder in folders):
        return
    first, second = (ItemFeatures.load(folder / FEATURES_ON_ITEMS) for folder in folders)
    importance = (
        align_importance(first, second, ItemFeatures.load(folders[1] / ROTATED_ON_ITEMS), _SEED) if same else None
    )
    if importance:
        controls = [value for value in (importance.rotated, importance.placebo) if value is not None]
        yield AlignmentFigures(
            *pair,
            benchmark,
            "features",
            importance.pairs,
            importance.correlation,
            importance.p_value,
            None,
            max(controls, default=None),
            None,
            importance.shared,
            importance.shared_null,
        )


def _indices(items: Mapping[str, PromptDefinition], chosen: Sequence[str]) -> np.ndarray:
    place = {item: index for index, item in enumerate(items)}
    return np.array([place[item] for item in chosen], np.int64)


def _losses(folder: Path, benchmark: str) -> tuple[dict[str, PromptDefinition], ItemLosses]:
    """Return the items by id, and what they lose under the top features and under random sets, in nats."""
    table = load_effects(folder)
    prompts = table.select_prompts(benchmark)
    top_1xP, random_DxP = (
        table.drops(table.select_whole_edits(benchmark, group), prompts, "answer_log_prob")
        for group in ("top", "random")
    )
    return {prompt.id: prompt for prompt in prompts}, ItemLosses(top_1xP[0], random_DxP)
