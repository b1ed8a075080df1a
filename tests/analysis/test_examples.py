"""Strongest contexts, against a search by brute force over a store held in memory."""

import math

import jax
import numpy as np
import pytest
from every_kind import KINDS

from saejax.analysis import examples
from saejax.analysis.examples import top_examples
from saejax.dictionaries import Dictionary, DictionaryConfig

SITE, WIDTH, FEATURES = "resid_post.3", 16, 32


class Documents(list):
    """Token ids by document; ``groups[i]`` is the group of document i, by default its own."""

    groups = None

    def column(self, name):
        assert name == "group"
        return np.arange(len(self)) if self.groups is None else np.array(self.groups)

    def place(self, document, position):
        return f"document {document}, position {position}"


class MemoryStore:
    """The part of a store that examples read, over arrays: documents, and a vector for each of their tokens."""

    def __init__(self, documents, vectors, sinks=(), held_out=(), groups=None, seed=0):
        self.documents = Documents(np.asarray(ids, np.int32) for ids in documents)
        self.documents.groups = groups
        places = [(d, p) for d, ids in enumerate(self.documents) for p in range(len(ids))]
        order = np.random.default_rng(seed).permutation(len(places))  # rows in no order of documents
        self.place_Rx2 = np.array(places, np.int64)[order]
        self.vector_RxD = np.array([vectors[d][p] for d, p in self.place_Rx2], np.float32)
        self._sinks, self._held_out = set(sinks), set(held_out)
        self.largest_read = self.rows_read = 0

    def rows(self, split, site):
        assert site == SITE
        wanted = [
            row
            for row, (d, p) in enumerate(self.place_Rx2.tolist())
            if (d, p) not in self._sinks and (d in self._held_out) == (split == "held_out")
        ]
        return np.array(wanted, np.int64)

    def read(self, site, rows):
        self.largest_read = max(self.largest_read, len(rows))
        self.rows_read += len(rows)
        return self.vector_RxD[rows]

    def tokens(self, rows):
        documents, positions = self.place_Rx2[rows].T
        ids = np.array([self.documents[d][p] for d, p in self.place_Rx2[rows]], np.int32)
        return documents, positions, ids


def random_dictionary(kind: str) -> Dictionary:
    """Directions at random; biases, thresholds and magnitudes too, where the kind has them."""
    own = dict(topk=dict(k=4), linear=dict(fires_above=0.5), jumprelu=dict(centred=False)).get(kind, {})
    config = DictionaryConfig(kind=kind, site=SITE, d_in=WIDTH, n_features=FEATURES, **own)
    arrays = Dictionary.initial(config, jax.random.key(0)).arrays
    rng = np.random.default_rng(0)
    for name in ("b_enc_F", "b_dec_D", "threshold_F", "r_mag_F", "b_mag_F"):
        if name in arrays and kind not in ("topk", "standard"):
            arrays[name] = np.float32(0.3 * np.abs(rng.normal(size=arrays[name].shape)))
    return Dictionary(config, **{name: jax.numpy.asarray(array) for name, array in arrays.items()})


def identity_dictionary() -> Dictionary:
    """Feature i is coordinate i of the input, so that a test can write activations by hand."""
    config = DictionaryConfig(kind="standard", site=SITE, d_in=WIDTH, n_features=WIDTH)
    eye = np.eye(WIDTH, dtype=np.float32)
    zeros = np.zeros(WIDTH, np.float32)
    return Dictionary(config, W_enc_DxF=eye, b_enc_F=zeros, W_dec_FxD=eye, b_dec_D=zeros)


def random_store(seed=1, documents=40, **options) -> MemoryStore:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, 1000, rng.integers(5, 30)) for _ in range(documents)]
    return MemoryStore(ids, [rng.normal(size=(len(i), WIDTH)) for i in ids], **options)


def written_store(activations, ids=None, **options) -> MemoryStore:
    """A store whose feature 0 has these activations, one list per document; every other feature is 0."""
    vectors = [np.pad(np.array(row, float)[:, None], ((0, 0), (0, WIDTH - 1))) for row in activations]
    if ids is None:
        ids = [[100 * d + p for p in range(len(row))] for d, row in enumerate(activations)]
    return MemoryStore(ids, vectors, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_passed_over_would_not_have_been_shown(kind, monkeypatch):
    stores = [random_store(documents=300) for _ in range(2)]
    some = top_examples(stores[0], random_dictionary(kind), [5, 0, 31], 1, str, batch=512)
    monkeypatch.setattr(examples, "_SLACK", 1e9)  # every row is encoded
    every = top_examples(stores[1], random_dictionary(kind), [5, 0, 31], 1, str, batch=512)
    assert {f: [(e.document, e.position) for e in found] for f, found in some.items()} == {
        f: [(e.document, e.position) for e in found] for f, found in every.items()
    }
    assert stores[0].rows_read < 0.8 * stores[1].rows_read


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_brute_force(kind):
    store = random_store(held_out={3, 4, 5})
    dictionary = random_dictionary(kind)
    features = [5, 0, 31]
    found = top_examples(store, dictionary, features, 7, str, before=3, after=2, batch=64)
    assert list(found) == features
    f_RxF = dictionary.encode(store.vector_RxD)
    all_RxF = np.abs(np.where(dictionary.fires(f_RxF), f_RxF, 0))  # of a linear dictionary, the size
    assert kind != "linear" or (np.asarray(f_RxF) < -0.5).any()
    by_place = {tuple(place): row for row, place in enumerate(store.place_Rx2.tolist())}
    for feature in features:
        best = {}  # document -> (activation, position) of its maximum
        for (document, position), row in by_place.items():
            value = float(all_RxF[row, feature])
            if value > 0:
                best[document] = max(best.get(document, (0.0, 0)), (value, position))
        expected = sorted(best.items(), key=lambda item: -item[1][0])[:7]
        assert [(e.document, e.position) for e in found[feature]] == [(d, p) for d, (_, p) in expected]
        for example in found[feature]:
            assert example.place == f"document {example.document}, position {example.position}"
            assert example.activation == max(example.activations)
            start = example.position - example.peak
            assert start == max(example.position - 3, 0)
            ids = store.documents[example.document]
            assert list(example.tokens) == [str(i) for i in ids[start : example.position + 3]]
            expected_acts = [
                all_RxF[by_place[example.document, start + i], feature] for i in range(len(example.tokens))
            ]
            np.testing.assert_allclose(example.activations, expected_acts, rtol=1e-5, atol=1e-6)


def test_reads_no_more_than_a_batch_at_once():
    store = random_store()
    top_examples(store, random_dictionary("topk"), [1, 2], 50, str, batch=300)
    assert 256 <= store.largest_read <= 300 < len(store.place_Rx2)


def test_splits_are_searched_as_asked():
    store = written_store([[0, 9, 0], [0, 5, 0]], held_out={0})
    both = top_examples(store, identity_dictionary(), [0], 5, str)[0]
    train = top_examples(store, identity_dictionary(), [0], 5, str, splits=("train",))[0]
    assert [e.document for e in both] == [0, 1]
    assert [e.document for e in train] == [1]


def test_attention_sinks_are_neither_found_nor_given_an_activation():
    store = written_store([[99, 0, 4, 0]], sinks={(0, 0)})
    (example,) = top_examples(store, identity_dictionary(), [0], 3, str)[0]
    assert example.position == example.peak == 2
    assert math.isnan(example.activations[0])
    assert example.activations[1:] == (0.0, 4.0, 0.0)


def test_a_feature_that_never_fires_has_no_examples():
    store = written_store([[0, 1, 0]])
    assert top_examples(store, identity_dictionary(), [3, 0], 2, str)[3] == []


def test_new_documents_come_before_more_places_of_a_known_one():
    store = written_store([[9, 0, 0, 8, 0, 0, 7, 0, 6], [0, 2, 0]])
    found = top_examples(store, identity_dictionary(), [0], 3, str, before=1, after=1)[0]
    # Two documents first, then the next place of document 0, in order of strength.
    assert [(e.document, e.position) for e in found] == [(0, 0), (0, 3), (1, 1)]


def test_new_groups_come_before_more_documents_of_a_known_one():
    store = written_store([[9, 0], [8, 0], [7, 0], [2, 0], [1, 0]], groups=[0, 0, 0, 1, 1])
    found = top_examples(store, identity_dictionary(), [0], 3, str)[0]
    assert [e.document for e in found] == [0, 1, 3]


def test_a_group_full_of_strong_documents_does_not_crowd_out_others():
    store = written_store([[9, 0]] * 60 + [[2, 0]], groups=[0] * 60 + [1])
    found = top_examples(store, identity_dictionary(), [0], 2, str)[0]
    assert [e.document for e in found][1] == 60


def test_a_document_full_of_strong_places_does_not_crowd_out_others():
    store = written_store([[9.0] * 60, [0, 2, 0]], groups=[0, 0])
    found = top_examples(store, identity_dictionary(), [0], 2, str, before=1, after=1)[0]
    assert [e.document for e in found] == [0, 1]


def test_places_inside_a_context_already_shown_are_passed_over():
    store = written_store([[9, 8, 7, 0, 0, 0, 3]])
    found = top_examples(store, identity_dictionary(), [0], 3, str, before=2, after=2)[0]
    assert [e.position for e in found] == [0, 6]


def test_a_context_that_repeats_is_shown_once():
    store = written_store([[0, 5, 0], [0, 5, 0], [0, 3, 0]], ids=[[1, 2, 3], [1, 2, 3], [1, 2, 4]])
    found = top_examples(store, identity_dictionary(), [0], 3, str)[0]
    assert [e.tokens for e in found] == [("1", "2", "3"), ("1", "2", "4")]


def test_many_repeats_do_not_crowd_out_other_contexts():
    repeats = [[0, 5, 0]] * 11
    store = written_store([*repeats, [0, 3, 0]], ids=[[1, 2, 3]] * 11 + [[1, 2, 4]])
    found = top_examples(store, identity_dictionary(), [0], 3, str, batch=8)[0]
    assert [e.activation for e in found] == [5.0, 3.0]


def test_features_out_of_range_and_no_features():
    store = random_store(documents=2)
    with pytest.raises(ValueError, match="32"):
        top_examples(store, random_dictionary("topk"), [0, 32], 1, str)
    assert top_examples(store, random_dictionary("topk"), [], 1, str) == {}


def test_a_feature_asked_for_twice_is_searched_once():
    found = top_examples(random_store(documents=3), random_dictionary("topk"), [4, 4, 2], 2, str)
    assert list(found) == [4, 2]
