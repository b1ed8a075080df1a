"""Agreement of two rows on items: simulated rows whose agreement is known."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import spearmanr

from saejax.interventions.table import EditDefinition, EffectsTable, PromptDefinition, save_effects
from saejax.matching.importance import FeatureMatch, ImportanceAlignment
from saejax.studies import alignment
from saejax.studies.alignment import ItemLosses, align_items
from saejax.studies.results import AlignmentFigures

ITEMS, SETS = 100, 20
NULL, TRUE = 100, 100  # pairs of rows that share nothing, and that share what matters


def simulated(rng, fragility_N, importance_N):
    """Losses of a row: items of large fragility lose more under any set, the top features' set is larger than others.

    ``importance_N`` is the logarithm of how much each item depends on the top features.
    """
    top_N = fragility_N * np.exp(0.7 * importance_N) + 0.3 * rng.normal(size=ITEMS)
    random_DxN = np.exp(0.5 * rng.normal(size=(SETS, ITEMS)))
    return ItemLosses(top_N, 0.4 * fragility_N * random_DxN + 0.3 * rng.normal(size=(SETS, ITEMS)))


def pairs(shared, count=1):
    """Pairs of rows on items of one fragility; ``shared`` is the correlation of their importances."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        fragility_N, common_N = np.exp(1.5 * rng.normal(size=ITEMS)), rng.normal(size=ITEMS)
        parts = [np.sqrt(shared) * common_N + np.sqrt(1 - shared) * rng.normal(size=ITEMS) for _ in range(2)]
        yield [simulated(rng, fragility_N, part_N) for part_N in parts]


@pytest.fixture(autouse=True)
def fewer_permutations(monkeypatch):
    monkeypatch.setattr("saejax.studies.alignment._PERMUTATIONS", 199)


KINDS = ["any"] * ITEMS  # of one category
EQUAL = [1] * ITEMS  # answers of one length


def align(first, second, categories=KINDS, lengths=EQUAL):
    return align_items(first, second, categories, lengths, seed=0)


def is_aligned(found):
    return found.correlation >= 0.3 and found.p_value <= 0.05 and found.correlation > found.placebo


def test_fragile_items_make_no_agreement():
    """Losses beyond the mean control set, as they were compared before, agree in many of these pairs."""
    beyond = aligned = 0
    for first, second in pairs(shared=0, count=NULL):
        plain = [losses.top_N - losses.control_DxN.mean(0) for losses in (first, second)]
        beyond += spearmanr(*plain).statistic >= 0.3
        aligned += is_aligned(align(first, second))
    print(f"rows that share nothing but fragile items: {aligned} of {NULL} aligned, {beyond} by plain losses")
    assert aligned <= 0.08 * NULL and beyond >= NULL // 4


KINDS_OF_TWO = ["sum" if i % 3 else "word" for i in range(ITEMS)]


@pytest.mark.parametrize("cause", ["category", "length"])
def test_the_form_of_answers_makes_no_agreement(cause):
    """Rows that lose more where the answer is a calculation, or a long one, and share nothing else, are not aligned."""
    rng, aligned, before = np.random.default_rng(1), 0, 0
    length_N = rng.integers(3, 30, ITEMS)
    for rows in pairs(shared=0, count=NULL):
        if cause == "category":
            more_N = 4 * (np.array(KINDS_OF_TWO) == "sum")
            first, second = (ItemLosses(row.top_N + row.top_N.std() * more_N, row.control_DxN) for row in rows)
        else:
            first, second = (ItemLosses(row.top_N * length_N / 15, row.control_DxN) for row in rows)
        aligned += is_aligned(align(first, second, KINDS_OF_TWO if cause == "category" else KINDS, length_N))
        before += is_aligned(align(first, second))  # without category and length
    print(f"rows that share nothing but {cause}: {aligned} of {NULL} aligned, {before} without the correction")
    assert aligned <= 0.08 * NULL and before >= NULL // 2


def with_placebos(rng, pair, shared):
    """Both rows with 19 placebo sets; ``shared`` is the part of what the text of items explains of any chosen set."""
    fragility_N, text_N = np.exp(1.5 * rng.normal(size=ITEMS)), rng.normal(size=ITEMS)

    def chosen():
        noise_N = rng.normal(size=ITEMS)
        return simulated(rng, fragility_N, np.sqrt(shared) * text_N + np.sqrt(1 - shared) * noise_N).top_N

    if shared:  # of the top features, too
        pair = [ItemLosses(chosen(), simulated(rng, fragility_N, text_N).control_DxN) for _ in pair]
    return [ItemLosses(row.top_N, row.control_DxN, [np.stack([chosen() for _ in range(19)])]) for row in pair]


def test_the_text_of_items_makes_no_agreement():
    """A defect: a model of random weights agreed with a trained one, as any features chosen on these items did."""
    rng, before, aligned = np.random.default_rng(2), 0, 0
    for pair in pairs(shared=0, count=NULL):
        rows = with_placebos(rng, pair, shared=0.6)
        before += is_aligned(align(*(ItemLosses(row.top_N, row.control_DxN) for row in rows)))
        aligned += is_aligned(align(*rows))
    print(f"rows that share nothing but text: {aligned} of {NULL} aligned, {before} without placebo sets")
    assert aligned <= 0.08 * NULL and before >= NULL // 2
    found = sum(is_aligned(align(*with_placebos(rng, pair, shared=0))) for pair in pairs(shared=1, count=TRUE))
    print(f"rows that share what matters, with placebo sets: {found} of {TRUE} aligned")
    assert found >= 0.8 * TRUE


def test_agreement_within_categories_is_found():
    """Opposite levels of the categories hide it from a correlation over all items."""
    sums_N = np.array(KINDS_OF_TWO) == "sum"
    first, second = next(iter(pairs(shared=1)))
    first = ItemLosses(first.top_N + 5 * first.top_N.std() * sums_N, first.control_DxN)
    second = ItemLosses(second.top_N - 5 * second.top_N.std() * sums_N, second.control_DxN)
    assert align(first, second).correlation < 0.1
    assert is_aligned(align(first, second, KINDS_OF_TWO))


def test_shared_importance_is_found():
    found = sum(is_aligned(align(*pair)) for pair in pairs(shared=1, count=TRUE))
    print(f"rows that share what matters: {found} of {TRUE} aligned")
    assert found >= 0.8 * TRUE


def test_a_row_agrees_with_itself_and_not_with_the_other_way_round():
    first, _ = next(iter(pairs(shared=0)))
    itself = align(first, first)
    assert itself.correlation == pytest.approx(1) and itself.p_value == 1 / 200 and itself.placebo < 0.5
    turned = ItemLosses(-first.top_N, first.control_DxN)
    assert align(first, turned).correlation < -0.5


def test_items_that_were_not_measured_are_left_out():
    first, second = next(iter(pairs(shared=1)))
    wanted = align(first.choose(np.arange(1, ITEMS)), second.choose(np.arange(1, ITEMS)), KINDS[1:], EQUAL[1:])
    first.control_DxN[3, 0] = np.nan
    assert align(first, second) == wanted


def test_items_of_two_rows_are_read_from_their_tables(tmp_path, monkeypatch):
    first, second = next(iter(pairs(shared=1)))
    rows = {}
    for name, losses, order in (("a", first, np.arange(ITEMS)), ("b", second, np.arange(ITEMS)[::-1])):
        edits = [EditDefinition("gsm8k", "clean"), EditDefinition("gsm8k", "top", features=(1,))]
        edits += [EditDefinition("gsm8k", "random", index=i, features=(2 + i,)) for i in range(SETS)]
        prompts = [PromptDefinition(f"test:{i:03d}", "gsm8k", correct="9" * (i % 7)) for i in order]
        value_ExP = -20.0 - np.concatenate([np.zeros((1, ITEMS)), losses.top_N[None], losses.control_DxN])[:, order]
        save_effects(tmp_path / name, EffectsTable.block(edits, prompts, dict(answer_log_prob=value_ExP)))
        kinds = {
            prompt.id: (KINDS_OF_TWO[place], f"level {place}") for prompt, place in zip(prompts, order, strict=True)
        }
        results = {"gsm8k": SimpleNamespace(origin="one file", dictionary="topk", categories=kinds)}
        folders = {"study/gsm8k": tmp_path / name}
        rows[name] = SimpleNamespace(select=lambda cls, results=results: results, folders=folders)
    (found,) = alignment.alignments(rows, {})
    wanted = align_items(first, second, KINDS_OF_TWO, [i % 7 for i in range(ITEMS)], seed=alignment._SEED)
    assert (found.by, found.n, found.aligned) == ("items", ITEMS, True)
    assert found.rank_correlation == pytest.approx(wanted.correlation) and found.control == pytest.approx(
        wanted.placebo
    )
    # Features that agree are aligned only if there is a placebo that they can exceed.
    monkeypatch.setattr(alignment.ItemFeatures, "load", lambda path: None)
    match = FeatureMatch(np.arange(20), np.arange(20), (40, 80), 4)
    read = {"gsm8k": {name: SimpleNamespace(features=None, matches={"b": match}) for name in rows}}
    for rotated, placebo, answer in ((0.1, 0.2, True), (None, 0.2, True), (0.1, 0.95, False), (0.1, None, None)):
        agreement = ImportanceAlignment(0.9, 0.001, rotated, placebo)
        monkeypatch.setattr(alignment, "align_importance", lambda *args, agreement=agreement: agreement)
        by = {comparison.by: comparison for comparison in alignment.alignments(rows, read)}
        assert by["features"].aligned is answer and by["items"].aligned is True
        assert (by["features"].n, by["features"].shared, by["features"].shared_null) == (20, 0.5, 0.1)


def test_too_little_to_compare():
    first, second = next(iter(pairs(shared=0)))
    few = np.arange(7)
    assert align(first.choose(few), second.choose(few), KINDS[:7], EQUAL[:7]) is None
    alone = ItemLosses(first.top_N, first.control_DxN[:1])
    assert align(alone, second) is None
    assert align(ItemLosses(np.zeros(ITEMS), first.control_DxN), second) is None
    # Of categories of one item each there is nothing to shuffle, and of few pairs too little for a p-value of 5 %.
    for kinds, is_told in ((np.arange(ITEMS), False), (np.minimum(np.arange(ITEMS), ITEMS - 3), False), (KINDS, True)):
        assert (align(first, second, kinds) is not None) == is_told


def test_items_whose_orders_are_too_few_for_the_correction_are_not_told(monkeypatch):
    """In 24 orders no p-value is below 1 / 24: of two comparisons even equal losses would be answered no."""
    kinds = np.repeat(["a", "b", "c", "d"], [3, 2, 2, 1])
    first, _ = next(iter(pairs(shared=0)))
    few = np.argsort(-first.top_N)[: len(kinds)]
    same = first.choose(few)
    found = align_items(same, same, kinds, EQUAL[: len(kinds)], 0)
    assert found.least == pytest.approx(1 / 24) and found.correlation == pytest.approx(1)
    figures = dict(first="a", benchmark="sums", by="items", n=8, p_holm=None, aligned=None, shared=None)

    def compare(*p_values, control=0.1):
        comparisons = [
            (
                AlignmentFigures(
                    second=str(n), rank_correlation=0.9, p_value=p, control=control, shared_null=None, **figures
                ),
                found.least,
            )
            for n, p in enumerate(p_values)
        ]
        monkeypatch.setattr(alignment, "_pair", lambda *args: iter(comparisons))
        rows = dict.fromkeys("ab", SimpleNamespace(select=lambda cls: dict(sums=None)))
        return [comparison.aligned for comparison in alignment.alignments(rows, {})]

    assert compare(0.04) == [True] and compare(0.06) == [False]
    assert compare(0.04, 0.04) == [None, None]
    assert compare(0.04, 0.04, control=0.95) == [False, False], "a placebo decides, whatever p"
