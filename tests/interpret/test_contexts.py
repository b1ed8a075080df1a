"""Strongest contexts: which are chosen, from written activations, and against a search by brute force."""

import jax
import numpy as np
import planted
import pytest

from saejax.activations.chunker import SPLITS
from saejax.activations.documents import COLUMNS, Documents
from saejax.interpret import contexts
from saejax.interpret.contexts import as_example, strongest, top_contexts
from saejax.interpret.firings import Block
from saejax.interpret.text import CodedText
from saejax.parallel.mesh import make_mesh


def search(activations, count, ids=None, groups=None):
    """(document, position) of the chosen contexts of a feature with these activations, a list for each document."""
    lengths = [len(row) for row in activations]
    ids = ids or [[100 * d + p for p in range(len(row))] for d, row in enumerate(activations)]
    table = np.zeros((len(lengths), len(COLUMNS)), np.int32)
    table[:, COLUMNS.index("split")] = SPLITS.index("train")
    table[:, COLUMNS.index("group")] = np.arange(len(lengths)) if groups is None else groups
    names = tuple(map(str, range(len(lengths))))
    documents = Documents.contiguous(np.concatenate(ids).astype(np.int32), np.array(lengths), table, names)
    text = CodedText(documents, [str(i) for i in range(100 * len(lengths) + 100)])
    value = np.concatenate(activations).astype(np.float32)
    place = np.flatnonzero(value > 0)
    block = Block(0, 1, np.zeros(len(place), np.int64), place, value[place])
    chosen = np.array(strongest(block, documents, text, 0, count), np.int64)
    return list(zip(text.document(chosen).tolist(), text.position(chosen).tolist(), strict=True))


@pytest.fixture
def short(monkeypatch):
    """Contexts of one token before and after."""
    monkeypatch.setattr(contexts, "BEFORE", 1)
    monkeypatch.setattr(contexts, "AFTER", 1)


def test_new_documents_come_before_more_places_of_a_known_one(short):
    assert search([[9, 0, 0, 8, 0, 0, 7, 0, 6], [0, 2, 0]], 3) == [(0, 0), (0, 3), (1, 1)]


def test_new_groups_come_before_more_documents_of_a_known_one():
    assert [d for d, _ in search([[9, 0], [8, 0], [7, 0], [2, 0], [1, 0]], 3, groups=[0, 0, 0, 1, 1])] == [0, 1, 3]


def test_strong_documents_of_a_group_and_strong_places_of_a_document_crowd_nothing_out(short):
    assert search([[9, 0]] * 60 + [[2, 0]], 2, groups=[0] * 60 + [1])[1] == (60, 0)
    assert [d for d, _ in search([[9.0] * 60, [0, 2, 0]], 2, groups=[0, 0])] == [0, 1]


def test_places_inside_a_context_already_shown_are_passed_over(short):
    assert search([[9, 8, 7, 0, 0, 0, 3]], 3) == [(0, 0), (0, 2), (0, 6)]


def test_a_context_that_repeats_is_shown_once_and_crowds_nothing_out():
    repeats = [[0, 5, 0]] * 11
    assert search([*repeats, [0, 3, 0]], 3, ids=[[1, 2, 3]] * 11 + [[1, 2, 4]]) == [(0, 1), (11, 1)]


def test_a_feature_that_never_fires_has_no_contexts():
    assert search([[0, 0], [0, 0]], 3) == []


def test_the_search_finds_what_brute_force_finds(tmp_path):
    """On a store whose documents all differ: the strongest place of each of the strongest documents."""
    store, dictionary = planted.make_store(tmp_path / "store"), planted.dictionary(40)
    found = top_contexts(store, dictionary, [3, 0, 39], 5, planted.TEXTS, make_mesh())
    assert list(found) == [3, 0, 39]
    rows = store.rows("train", planted.SITE)
    document_R, position_R, _ = store.tokens(rows)
    f_RxF = np.asarray(jax.nn.relu(dictionary.encode(store.read(planted.SITE, rows))))
    for feature, shown in found.items():
        best = {}
        for document, position, value in zip(document_R.tolist(), position_R.tolist(), f_RxF[:, feature], strict=True):
            best[document] = max(best.get(document, (0.0, 0)), (float(value), -position))
        order = sorted(best, key=lambda document: -best[document][0])[:5]
        expected = [(document, -best[document][1]) for document in order if best[document][0] > 0]
        assert [(context["document"], context["position"]) for context in shown] == expected
        for context in shown:
            example = as_example(context, store.documents)
            assert (
                example.activation == max(example.activations) == pytest.approx(best[context["document"]][0], rel=5e-3)
            )
