"""Agreement between two rows of a study on what matters in a benchmark.

Two rankings can be compared between any two models that were asked the same items. *Items*: by the log-likelihood that
each item loses under a row's top features, without what its category, the length of its answer and random sets explain
(``align_items``). *Features*: by their attribution, matched by their activity on the items
(``saejax.matching.importance``).

A correlation is compared with those where one side is shuffled, and with placebos: of items, other sets in the
place of one row's top features; of features, a rotated dictionary, and the importance for corrupted answers.

Plain losses of items would agree between models that share no feature: fragile items, which lose much under any
change, lose much in every model; and items of one kind have answers of one form (a calculation, a word) and length,
with more or less to lose. Hence

1. Losses become ranks within each category of items. Out of the ranks of what items lose under the top features are
   regressed the ranks of their answers' lengths and of what they lose under both rows' control sets, on average.
2. The statistic is the correlation of the residuals, with a p-value from permutations within categories.
3. The placebo is the same statistic with another set in the place of one row's top features. A control set, with the
   other control sets of the same row as its controls, has the effect of fragile items on features that were not chosen.
   Sets that the same attribution chose for corrupted answers (placebo sets), or among the directions of untrained
   dictionaries, have the effect of the items' text. Both rows read it, so that a model of random weights may agree with
   a trained one.

``tests/studies/test_alignment.py`` simulates rows that share nothing but fragility, categories, lengths or text.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saejax.interventions.table import PromptDefinition, load_effects
from saejax.matching.importance import ItemFeatures, align_importance
from saejax.page.findings import Findings
from saejax.stages.study.measure import ROTATED_ON_ITEMS
from saejax.stages.study.results import StudyResults
from saejax.statistics.ranks import holm_by_key
from saejax.studies.gather_features import ReadBenchmark
from saejax.studies.results import AlignmentFigures

LEVEL, LEAST = 0.05, 0.3
RULE = (
    "Two rows are aligned on a benchmark if a rank correlation is at least "
    f"{LEAST:g}, is as large (of features: as many standard errors) with one side shuffled in at most "
    f"{100 * LEVEL:g} % of the cases after Holm's correction "
    "over all comparisons, and is above its placebos. Of items it is that of what they lose under the top features, "
    "without what their category, the length of their answer and random sets explain, shuffled within categories; the "
    "placebo is the largest of the 95 % quantiles with random sets, placebo sets or untrained dictionaries' in the "
    "place of one row's top features. Of features it is that of the attributions of those matched by their activity on "
    "the items; the placebos are a rotated dictionary, and the 95 % quantile with the importance for corrupted answers."
)
_SEED, _PERMUTATIONS, PLACEBO_QUANTILE = 789, 9999, 0.95


@dataclasses.dataclass(frozen=True)
class ItemLosses:
    """The log-likelihood that N items lose in one row, in nats."""

    top_N: np.ndarray  #: under the top features
    control_DxN: np.ndarray  #: under each of D control sets
    #: under sets that were chosen as the top features were, [D, N] a kind: for corrupted answers (placebo sets), or of
    #: untrained dictionaries
    chosen: Sequence[np.ndarray] = ()

    def choose(self, items: np.ndarray) -> "ItemLosses":
        """Return the losses of some items, by their indices."""
        chosen = [loss_DxN[:, items] for loss_DxN in self.chosen]
        return ItemLosses(self.top_N[items], self.control_DxN[:, items], chosen)

    def with_others_as_top(self) -> list[list["ItemLosses"]]:
        """Return the losses with each other set in the place of the top features, by kind of set.

        Control sets have the others of them as controls. Chosen sets that were not measured on all items are left out.
        """
        controls = [
            ItemLosses(control_N, np.delete(self.control_DxN, draw, axis=0))
            for draw, control_N in enumerate(self.control_DxN)
        ]
        chosen = [
            [ItemLosses(loss_N, self.control_DxN) for loss_N in loss_DxN if np.isfinite(loss_N).all()]
            for loss_DxN in self.chosen
        ]
        return [controls, *chosen]


@dataclasses.dataclass(frozen=True)
class ItemAlignment:
    """Agreement of two rows on items."""

    correlation: float  #: of the ranks of losses, without what categories, lengths and control sets explain, -1 to 1
    p_value: float  #: share of permutations of the items within categories in which it is as large, above 0
    #: the largest of the 95 % quantiles of the statistic with other sets in the place of the top features, of one kind
    #: and in one of the rows
    placebo: float
    least: float  #: the smallest p-value that so many orders of the items allow


def alignments(rows: Mapping[str, Findings], read: Mapping[str, Mapping[str, ReadBenchmark]]) -> list[AlignmentFigures]:
    """Compare every pair of rows on every benchmark of both.

    Args:
      rows: the findings of each row, by name.
      read: benchmark -> the features of the rows that saved them, by row.

    Raises:
      UserError: a file of a unit is damaged.
    """
    compared = [
        comparison
        for first, second in itertools.combinations(rows, 2)
        for benchmark in rows[first].select(StudyResults).keys() & rows[second].select(StudyResults).keys()
        for comparison in _pair((first, second), benchmark, rows, read.get(benchmark, {}))
    ]
    compared.sort(key=lambda pair: (pair[0].by, pair[0].benchmark))
    comparisons, least = [comparison for comparison, _ in compared], [p for _, p in compared]
    p_values = {
        number: comparison.p_value for number, comparison in enumerate(comparisons) if comparison.p_value is not None
    }
    for number, p in holm_by_key(p_values).items():
        correlation, control = comparisons[number].rank_correlation or 0.0, comparisons[number].control
        is_beyond = control is not None and correlation >= LEAST and correlation > control
        # What the correction alone denies, because so few items have no smaller p-value, cannot be told.
        is_untold = control is None or (is_beyond and p > LEVEL and len(p_values) * least[number] > LEVEL)
        aligned = None if is_untold else is_beyond and p <= LEVEL
        comparisons[number] = dataclasses.replace(comparisons[number], p_holm=p, aligned=aligned)
    return comparisons


def _pair(
    pair: tuple[str, str], benchmark: str, rows: Mapping[str, Findings], read: Mapping[str, ReadBenchmark]
) -> Iterator[tuple[AlignmentFigures, float]]:
    """Yield the comparisons of a pair, each with the smallest p-value that it could have."""
    folders = [rows[name].folders[f"study/{benchmark}"] for name in pair]
    results = [rows[name].select(StudyResults)[benchmark] for name in pair]
    (first_items, first_losses), (second_items, second_losses) = (_losses(folder, benchmark) for folder in folders)
    same = results[0].origin == results[1].origin
    shared = [item for item in first_items if item in second_items] if same else []
    agreement = align_items(
        first_losses.choose(_indices(first_items, shared)),
        second_losses.choose(_indices(second_items, shared)),
        # The first category alone: few items have the same combination of several, such as subject and level.
        [next(iter(results[0].categories.get(item.removeprefix(f"{benchmark}/"), ())), "") for item in shared],
        [len(first_items[item].correct) for item in shared],
        _SEED,
    )
    both: Any = dict(first=pair[0], second=pair[1], benchmark=benchmark, p_holm=None, aligned=None)
    by_items = AlignmentFigures(
        **both,
        by="items",
        n=len(shared),
        rank_correlation=agreement.correlation if agreement else None,
        p_value=agreement.p_value if agreement else None,
        control=agreement.placebo if agreement else None,
        shared=None,
        shared_null=None,
    )
    yield by_items, agreement.least if agreement else 0.0
    if pair[0] in read and (match := read[pair[0]].matches.get(pair[1])):
        first, second = (read[name].features for name in pair)
        rotated = ItemFeatures.load(folders[1] / ROTATED_ON_ITEMS)
        importance = align_importance(first, second, match, rotated, _SEED)
        # A rotated dictionary may have too few pairs to correlate; without corrupted answers there is no placebo.
        controls = [value for value in (importance.rotated, importance.placebo) if value is not None]
        has_placebo = importance.placebo is not None
        by_features = AlignmentFigures(
            **both,
            by="features",
            n=len(match.first_M),
            rank_correlation=importance.correlation,
            p_value=importance.p_value,
            control=max(controls) if has_placebo else None,
            shared=match.shared if min(match.live) else None,
            shared_null=match.shared_null if min(match.live) else None,
        )
        yield by_features, 0.0  # eight pairs or more have enough orders


def _indices(items: Mapping[str, PromptDefinition], chosen: Sequence[str]) -> np.ndarray:
    place = {item: index for index, item in enumerate(items)}
    return np.array([place[item] for item in chosen], np.int64)


def _losses(folder: Path, benchmark: str) -> tuple[dict[str, PromptDefinition], ItemLosses]:
    """Return the items by id, and what they lose under the top features and the sets beside them, in nats."""
    table = load_effects(folder)
    prompts = table.select_prompts(benchmark)
    top_1xP, random_DxP, *chosen = (
        table.drops(table.select_whole_edits(benchmark, group), prompts, "answer_log_prob")
        for group in ("top", "random", "placebo", "untrained")
    )
    return {prompt.id: prompt for prompt in prompts}, ItemLosses(top_1xP[0], random_DxP, chosen)


def align_items(
    first: ItemLosses, second: ItemLosses, categories: Sequence[str], lengths: Sequence[int], seed: int
) -> ItemAlignment | None:
    """Return the agreement of two rows on the same items; None where it cannot be told.

    That takes 8 items, 2 control sets, and so many items of one category that they can be shuffled. Items with a loss
    that was not measured (NaN) are left out.

    Args:
      first: losses of a row.
      second: losses of another row under its own features, of the same items in the same order.
      categories: category of each item.
      lengths: length of each item's right answer, in characters.
      seed: of the permutations.
    """
    every = [array for losses in (first, second) for array in (losses.top_N[None], losses.control_DxN)]
    measured = np.flatnonzero(np.all([np.isfinite(array).all(axis=0) for array in every], axis=0))
    first, second = first.choose(measured), second.choose(measured)
    least_sets = min(len(first.control_DxN), len(second.control_DxN))
    if len(first.top_N) < 8 or least_sets < 2 or min(np.ptp(first.top_N), np.ptp(second.top_N)) == 0:
        return None
    _, category_N = np.unique(np.asarray(categories)[measured], return_inverse=True)
    length_N = np.asarray(lengths)[measured]
    first_N, second_N = _residuals(first, second, category_N, length_N)
    orders = sum(math.lgamma(1 + count) for count in np.bincount(category_N))  # logarithm of their number
    if orders < -math.log(LEVEL) or not (first_N.any() and second_N.any()):
        return None
    seen, rng = float(first_N @ second_N), np.random.default_rng(seed)
    by_category = np.argsort(category_N, kind="stable")
    as_large = 0
    for _ in range(_PERMUTATIONS):
        # Sorted by category first and a random number next: a permutation within categories.
        order_N = np.lexsort((rng.random(len(category_N)), category_N))
        as_large += float(first_N[order_N] @ second_N[by_category]) >= seen - 1e-12
    # One row and one kind of set at a time: where any such set agrees with the other row, the top features are nothing
    # special.
    placebos = [[(other, second) for other in others] for others in first.with_others_as_top()]
    placebos += [[(first, other) for other in others] for others in second.with_others_as_top()]
    placebo = max(
        float(
            np.quantile(
                [np.dot(*_residuals(*pair, category_N, length_N)) for pair in pairs], PLACEBO_QUANTILE, method="higher"
            )
        )
        for pairs in placebos
        if pairs
    )
    least = max(math.exp(-orders), 1 / (1 + _PERMUTATIONS))
    return ItemAlignment(seen, (1 + as_large) / (1 + _PERMUTATIONS), placebo, least)


def _residuals(
    first: ItemLosses, second: ItemLosses, category_N: np.ndarray, length_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ranks of both rows' losses without what lengths and control sets explain, of unit length."""
    controls = [losses.control_DxN.mean(axis=0) for losses in (first, second)]
    design_NxC = np.stack([_ranks(value_N, category_N) for value_N in (length_N, *controls)], axis=1)
    residuals = []
    for losses in (first, second):
        ranks_N = _ranks(losses.top_N, category_N)
        left_N = ranks_N - design_NxC @ np.linalg.lstsq(design_NxC, ranks_N, rcond=None)[0]
        size = float(np.linalg.norm(left_N))
        # Where all is explained, what rounding leaves would pass for ranks.
        residuals.append(left_N / size if size > 1e-9 else np.zeros_like(left_N))
    return residuals[0], residuals[1]


def _ranks(value_N: np.ndarray, category_N: np.ndarray) -> np.ndarray:
    """Return centred ranks within categories, from -1/2 to 1/2, so that a large category has no larger ones."""
    from scipy.stats import rankdata

    ranks_N = np.empty(len(value_N))
    for category in np.unique(category_N):
        here = category_N == category
        ranks_N[here] = (rankdata(value_N[here]) - 0.5) / here.sum() - 0.5
    return ranks_N
