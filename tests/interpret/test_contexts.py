"""Strongest contexts: which are chosen, from written activations, and against a search by brute force."""

import numpy as np
import planted
import pytest
from tiny_models import byte_level_tokenizer

from saejax.activations.chunker import SPLITS
from saejax.activations.documents import COLUMNS, Documents
from saejax.interpret import contexts
from saejax.interpret.contexts import strongest, surroundings, top_contexts
from saejax.interpret.firings import Block
from saejax.interpret.questions import detect, explain
from saejax.interpret.text import CodedText
from saejax.models.tokens import token_piece
from saejax.parallel.mesh import make_mesh
from saejax.stages.report.run import as_example
from saejax.unicode import join_pieces


def coded(ids, groups=None, pieces=()):
    """A text of documents with these tokens, by default named by their numbers."""
    lengths = np.array([len(row) for row in ids])
    table = np.zeros((len(ids), len(COLUMNS)), np.int32)
    table[:, COLUMNS.index("split")] = SPLITS.index("train")
    table[:, COLUMNS.index("group")] = np.arange(len(ids)) if groups is None else groups
    documents = Documents.contiguous(
        np.concatenate(ids).astype(np.int32), lengths, table, tuple(map(str, range(len(ids))))
    )
    return CodedText(documents, pieces or [str(i) for i in range(100 * len(ids) + 100)])


def search(activations, count, ids=None, groups=None):
    """(document, position) of the chosen contexts of a feature with these activations, a list for each document."""
    text = coded(ids or [[100 * d + p for p in range(len(row))] for d, row in enumerate(activations)], groups)
    value = np.concatenate(activations).astype(np.float32)
    place = np.flatnonzero(value > 0)
    block = Block(0, 1, np.zeros(len(place), np.int64), place, value[place])
    chosen = np.array(strongest(block, text, 0, count), np.int64)
    return list(zip(text.document(chosen).tolist(), text.position(chosen).tolist(), strict=True))


@pytest.fixture
def short(monkeypatch):
    """Contexts of one token before and after."""
    monkeypatch.setattr(contexts, "BEFORE", 1)
    monkeypatch.setattr(contexts, "AFTER", 1)


def test_neither_contexts_nor_codes_reach_beyond_the_document(short):
    text, place = coded([[5, 6, 7], [8]]), np.arange(4)
    places, inside = surroundings(text, place)
    assert inside.tolist() == [[False, True, True], [True, True, True], [True, True, False], [False, True, False]]
    assert places.tolist() == [[0, 0, 1], [0, 1, 2], [1, 2, 2], [3, 3, 3]]
    size = len(text.texts)
    assert text.code("pair", place).tolist() == [-1, 5 * size + 6, 6 * size + 7, -1]
    assert text.code("triple", place).tolist() == [-1, -1, (5 * size + 6) * size + 7, -1]
    assert text.code("previous", place).tolist() == [-1, 5, 6, -1] and text.code("next", place).tolist() == [
        6,
        7,
        -1,
        -1,
    ]


@pytest.mark.parametrize(
    ("activations", "expected"),
    [
        ([[9, 0, 0, 8, 0, 0, 7, 0, 6], [0, 2, 0]], [(0, 0), (0, 3), (1, 1)]),  # a new document comes first
        ([[9, 8, 7, 0, 0, 0, 3]], [(0, 0), (0, 2), (0, 6)]),  # a place inside a context that is shown is passed over
        ([[0, 0], [0, 0]], []),
    ],
)
def test_contexts_of_documents(short, activations, expected):
    assert search(activations, 3) == expected


def test_new_groups_come_before_more_documents_of_one_that_is_shown():
    assert [d for d, _ in search([[9, 0], [8, 0], [7, 0], [2, 0], [1, 0]], 3, groups=[0, 0, 0, 1, 1])] == [0, 1, 3]


def test_strong_documents_strong_places_and_repeated_contexts_crowd_nothing_out(short):
    assert search([[9, 0]] * 60 + [[2, 0]], 2, groups=[0] * 60 + [1])[1] == (60, 0)
    assert [d for d, _ in search([[9.0] * 60, [0, 2, 0]], 2, groups=[0, 0])] == [0, 1]
    assert search([[0, 5, 0]] * 11 + [[0, 3, 0]], 3, ids=[[1, 2, 3]] * 11 + [[1, 2, 4]]) == [(0, 1), (11, 1)]


def test_the_search_finds_what_brute_force_finds(tmp_path):
    """On a store whose documents all differ: the strongest place of each of the strongest documents."""
    store, dictionary = planted.make_store(tmp_path / "store"), planted.dictionary(40)
    found = top_contexts(store, dictionary, [3, 0, 39], 5, planted.TEXTS, make_mesh())
    assert list(found) == [3, 0, 39]
    dense = planted.Dense(store, dictionary)
    for feature, shown in found.items():
        best = {}
        for document, position, value in zip(dense.document, dense.position, dense.f[:, feature], strict=True):
            best[document] = max(best.get(document, (0.0, 0)), (float(value), -position))
        order = sorted(best, key=lambda document: -best[document][0])[:5]
        expected = [(document, -best[document][1]) for document in order if best[document][0] > 0]
        assert [(context["document"], context["position"]) for context in shown] == expected
        for context in shown:
            example, strongest = as_example(context, store.documents), best[context["document"]][0]
            assert example.activation == max(example.activations) == pytest.approx(strongest, rel=5e-3)


@pytest.mark.parametrize("sentence", ["我爱北京天安门", "नमस्ते दुनिया", "สวัสดี ชาวโลก", "a 👩‍💻 é", "plain text"])
def test_tokens_that_spell_a_character_together_are_read_as_one(sentence, monkeypatch):
    """Contexts, their marks and questions to a judge hold the characters of a tokenizer of bytes, whichever is active.

    The tokens of the first character are bytes where a context lacks one of them.
    """
    monkeypatch.setattr(contexts, "BEFORE", 100)
    monkeypatch.setattr(contexts, "AFTER", 100)
    tokenizer = byte_level_tokenizer()
    ids = tokenizer(sentence)["input_ids"]
    pieces = list(map(token_piece(tokenizer), range(len(tokenizer))))
    text, is_stored = coded([ids], pieces=pieces), np.ones(len(ids), bool)
    is_stored[0] = False
    ends = [len(tokenizer(sentence[:number])["input_ids"]) for number in range(1, len(sentence) + 1)]
    for place in range(1, len(ids)):
        value = np.array([2.0], np.float32)
        block = Block(0, 1, np.zeros(1, np.int64), np.array([place]), value)
        (context,) = contexts.contexts(block, text, is_stored, 0, [place])
        assert "".join(context["tokens"]) == sentence
        assert len(context["tokens"]) == len(context["acts"]) and context["position"] == place
        assert context["acts"][context["peak"]] == 2 == sum(act or 0 for act in context["acts"])
        number = int(np.searchsorted(ends, place, side="right"))  # the character that the token ends or is part of
        marked = f"{sentence[:number]}<<{sentence[number]}>>{sentence[number + 1 :]}"
        if all(len(token) == 1 for token in context["tokens"]):
            assert explain([context], []).text == f"Text 1: {marked}"
        assert sentence in detect("a label", [context]).text
    left = [pieces[token] for token in ids[1:]]
    shown, firsts = join_pieces(left)
    assert len(shown) == len(firsts) and "\ufffd" not in "".join(shown)
    spelled = "".join(shown[sum(token.startswith("\\x") for token in shown) :])
    assert spelled and sentence.endswith(spelled)
