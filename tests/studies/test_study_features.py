"""Which features of a study matter for which items: words, problems, and what a probe reads and nothing depends on."""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import sparse
from test_study_report import made_up

from saejax.dictionaries import DictionaryConfig
from saejax.interventions.table import EditDefinition, EffectsTable, PromptDefinition
from saejax.matching.importance import FeatureMatch, ItemFeatures
from saejax.matching.transfer.activity import Activity
from saejax.page.blocks import Text
from saejax.stages.study import measure
from saejax.studies import gather_features
from saejax.studies.gather_features import ReadBenchmark, choose_problems, problems, words_on_items
from saejax.studies.report import _associations
from saejax.studies.results import StudyFigures

TEXTS = ("six and two\n8", "two plus six\n8")


def read(splits=("test", "test")):
    """Two items in words; feature 0 fires on "two", feature 1 nowhere, feature 2 on "six" and weakly on "and"."""
    words = [text.replace("\n", " \n").split(" ") for text in TEXTS]
    ends = [np.cumsum([len(word) + (place > 0) for place, word in enumerate(some)]) for some in words]
    flat = [word.strip() for some in words for word in some]
    acts_NxF = np.zeros((len(flat), 3))
    acts_NxF[:, 0] = [2.0 * (word == "two") for word in flat]
    acts_NxF[:, 2] = [{"six": 3.0, "and": 1.0}.get(word, 0.0) for word in flat]
    prompts = [
        PromptDefinition(f"sums/{number}", "sums", split=splits[number], text=text.split("\n")[0], correct="8")
        for number, text in enumerate(TEXTS)
    ]
    edits = [EditDefinition("sums", "clean")]
    test = [prompt for prompt in prompts if prompt.split == "test"]
    table = EffectsTable.block(edits, test, dict(answer_log_prob=np.zeros((1, len(test)))), prompts)
    activity = Activity(sparse.csr_array(acts_NxF), np.ones(len(flat), bool))
    text_N = np.repeat([0, 1], list(map(len, words)))
    features = ItemFeatures(("0", "1"), activity, text_N, np.concatenate(ends), np.zeros(3), np.zeros((0, 3)))
    return ReadBenchmark("generated", table, features, sparse.csr_array(acts_NxF[:2]))


def test_words_are_those_on_which_features_are_most_active_in_sum():
    assert words_on_items(read(), "sums", [0]) == ("two",)
    assert words_on_items(read(), "sums", [1]) == ()
    assert words_on_items(read(), "sums", [2]) == ("six", "and")
    assert words_on_items(read(), "sums", [0, 2]) == ("six", "two", "and")


def test_two_rows_are_matched_once(monkeypatch, tmp_path):
    matched = []

    def match(first, second):
        matched.append((first, second))
        return FeatureMatch(np.array([0, 1]), np.array([2, 0]), (3, 3), 1)

    monkeypatch.setattr(gather_features, "match_features", match)
    monkeypatch.setattr(gather_features, "load_effects", lambda folder: None)
    monkeypatch.setattr(gather_features.ItemFeatures, "load", lambda file: file.parent.name)
    rows = {}
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / gather_features.FEATURES_ON_ITEMS).touch()
        sparse.save_npz(tmp_path / name / gather_features.ITEM_ATTRIBUTION, sparse.csr_array((2, 3)))
        results = {"sums": SimpleNamespace(origin="one file")}
        rows[name] = SimpleNamespace(
            select=lambda kind, results=results: results, folders={"study/sums": tmp_path / name}
        )
    read_by_row = gather_features.read_benchmarks(rows, "sums")
    assert matched == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [*read_by_row["a"].matches["b"].first_M] == [*read_by_row["b"].matches["a"].second_M] == [0, 1]


def test_a_problem_of_each_category_comes_first():
    categories = {str(number): ("ab"[number // 4],) for number in range(8)}
    assert choose_problems(list(categories), categories) == ["0", "4", "1", "2", "3", "5"]
    several = {item: (*names, f"level {item}") for item, names in categories.items()}
    assert choose_problems(list(several), several) == ["0", "4", "1", "2", "3", "5"], "the first category alone"
    assert choose_problems(["1", "2"], {}) == ["1", "2"] and choose_problems([], categories) == []


def show(partners, **changes):
    """The problems of two rows, of which the second is changed, by row and item."""
    read_by_row = {"a": read(), "b": dataclasses.replace(read(changes.pop("splits", ("test", "test"))), **changes)}
    for row, partner in partners.items():
        matches = {
            name: FeatureMatch(*np.array([*pairs.items()], int).reshape(-1, 2).T, (3, 3), 0)
            for name, pairs in partner.items()
        }
        read_by_row[row].matches.update(matches)
    studied = SimpleNamespace(select=lambda kind: {"sums": SimpleNamespace(categories={"0": ("x",), "1": ("y",)})})
    return {(one.row, one.item): one for one in problems(dict.fromkeys("ab", studied), "sums", read_by_row)}


def test_problems_of_rows_that_were_asked_the_same():
    shown = show({"a": {"b": {2: 7}}, "b": {"a": {}}})
    assert set(shown) == {(row, item) for row in "ab" for item in "01"}
    # The attribution of feature 2 for item 0 is 3 nats, that of feature 0 for item 1 is 2 nats.
    assert [text.split(" ")[0] for text in shown["a", "0"].universal] == ["2"] and not shown["a", "0"].specific
    assert [text.split(" ")[0] for text in shown["b", "0"].specific] == ["2"] and not shown["b", "0"].universal


@pytest.mark.parametrize(
    ("changes", "left"), [(dict(splits=("train", "test")), {("b", "1")}), (dict(origin="a file"), set())]
)
def test_rows_with_other_items_are_not_compared(changes, left):
    """The item of a row is skipped where it is a train item or another question, and its features are not "alone"."""
    shown = show({}, **changes)
    assert set(shown) == {("a", "0"), ("a", "1")} | left
    assert all(np.isfinite(one.log_likelihood) for one in shown.values())
    assert not any(one.universal or one.shared or one.specific for one in shown.values())


def test_the_page_says_what_a_probe_reads_and_nothing_depends_on():
    figures = made_up(StudyFigures, itertools.count(1))
    answers = dict(row="a", benchmark="sums", label="addition", associated="yes", probe="yes", agree=False)
    plain = dataclasses.replace(figures.associations[0], **answers)
    without, with_drop = (
        [
            block.text
            for block in _associations(
                dataclasses.replace(figures, associations=(dataclasses.replace(plain, causal=causal),))
            )
            if isinstance(block, Text)
        ]
        for causal in ("no", "yes")
    )
    assert without[1].startswith("A probe of 1 top feature finds the label of new items") and len(with_drop) == 1


@pytest.mark.parametrize(("target", "norm"), [("", ""), ("mlp_out.0", ""), ("mlp_out.0", "token_norm")])
def test_the_rotated_control_of_a_transcoder_turns_about_what_it_reads(tmp_path, monkeypatch, target, norm):
    reads = np.random.default_rng(0).normal(3, 1, (2, 5, 6)).astype(np.float32)
    config = DictionaryConfig(site="mlp_in.0", target=target, d_in=6, n_features=8, centred=False, input_norm=norm)
    items = SimpleNamespace(values=lambda: ((read_NxD, read_NxD) for read_NxD in reads))
    ablation = SimpleNamespace(basis=SimpleNamespace(config=config), train=items, attribution_F=np.zeros(8))
    ablation.with_basis = lambda basis: ablation
    lm = SimpleNamespace(tokenizer=SimpleNamespace(is_fast=True), config=SimpleNamespace(d_model=6))
    measured = SimpleNamespace(items=SimpleNamespace(lm=lm, train=[], test=[]), tested=ablation, placebo_RxF=None)
    centres = []
    monkeypatch.setattr(measure, "rotate", lambda basis, seed, centre_D: centres.append(centre_D))
    monkeypatch.setattr(measure, "read_features", lambda *given: SimpleNamespace(save=lambda path: None))
    measure._save_activity(tmp_path, measured, 1)
    x_NxD = reads.reshape(-1, 6)
    if norm:
        x_NxD = x_NxD * 6**0.5 / np.linalg.norm(x_NxD, axis=1, keepdims=True)
    (centre_D,) = centres
    assert (centre_D is None) == (not target)
    if target:
        np.testing.assert_allclose(centre_D, x_NxD.mean(axis=0), rtol=1e-5)
