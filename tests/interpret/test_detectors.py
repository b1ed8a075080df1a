"""The search of labels against all sets of codes, and labels of planted features and of random directions."""

import itertools
import json

import numpy as np
import planted
import pytest

from saejax.interpret import detectors
from saejax.interpret.detectors import PairCounts, search
from saejax.interpret.firings import Block
from saejax.interpret.labels import bars, partners
from saejax.interpret.text import SHAPES, CodeCounts, shape_of
from saejax.models.loading import load_model

pytestmark = pytest.mark.usefixtures("single_device")


def test_the_search_finds_the_best_of_all_sets(monkeypatch):
    monkeypatch.setattr(detectors, "MOST", 3)
    rng = np.random.default_rng(1)
    code = rng.integers(0, 7, 3000)
    fires = rng.random((3000, 20)) < rng.random((7, 20))[code] ** 3
    place, feature = np.nonzero(fires)
    block = Block(0, 20, feature, place, np.ones(len(place), np.float32))
    found = search(block, "token", CodeCounts(code), PairCounts(block, code[block.place]))
    for i, detector in enumerate(found):
        sets = [some for n in (1, 2, 3) for some in itertools.combinations(range(7), n)]
        scores = {}
        for some in sets:
            claimed = np.isin(code, some)
            scores[some] = 2 * np.sum(claimed & fires[:, i]) / (claimed.sum() + fires[:, i].sum())
        best = pytest.approx(max(scores.values()))
        assert detector.search_f1 == best and scores[tuple(sorted(detector.codes))] == best


@pytest.mark.parametrize(
    ("text", "shape", "spaced"),
    [(" the", 0, True), ("The", 1, False), (" NASA", 2, True), ("eBay", 3, False), ("2026", 4, False), (",", 5, False)]
    + [(" ==", 6, True), ("\n\n", 7, False), ("  ", 8, False), ("a1", 9, False), ("", 8, False), ("中", 3, False)],
)
def test_what_tokens_look_like(text, shape, spaced):
    assert shape_of(text) == shape + spaced * len(SHAPES)


def test_others_of_a_like_firing_rate():
    rate = np.array([0.5, 0.1, 0.3, 0.2])
    assert partners(rate, [True] * 4).tolist() == [2, 3, 0, 2]  # of the most frequent one: not the rarest
    assert partners(rate, [True, False, True, False]).tolist() == [2, 2, 0, 2]
    assert partners(rate, [False, True, False, False]).tolist() == [-1] * 4


def test_the_bar_is_what_random_directions_of_a_like_rate_reach():
    rate, f1 = np.linspace(0, 1, 1000), np.linspace(0, 1, 1000)
    bar = bars(np.array([0.2, 0.9]), rate, f1)
    assert bar == pytest.approx([0.2 + 0.045, 0.9 + 0.045], abs=0.004)


@pytest.fixture(scope="module")
def planted_run(tmp_path_factory, tiny_llama):
    """The planted features and 152 random directions, interpreted; held-out vectors as planted, and random ones."""
    folder, lm = tmp_path_factory.mktemp("planted"), load_model(str(tiny_llama))
    found = []
    for seed in (0, 9):
        store = planted.make_store(folder / f"store{seed}", held_out_seed=seed)
        result = planted.interpreter(folder / f"unit{seed}", store, lm, planted.dictionary(160)).interpret()
        files = sorted((folder / f"unit{seed}" / "features").glob("*.json"))
        found.append((result, [one for file in files for one in json.loads(file.read_text())]))
        assert not (folder / f"unit{seed}" / "firings").exists()
    return found


def test_planted_features_get_their_labels(planted_run):
    result, records = planted_run[0]
    says = {}
    for concept, one in zip(planted.CONCEPTS, records, strict=False):
        best = one["detector"]
        assert best["family"] == concept and best["f1"]["mean"] > 0.95 and one["label"] == best["says"]
        says[concept] = one["label"]
    a, b = planted.TEXTS[1], planted.TEXTS[2]
    assert says["pair"] == f"ends “{a}{b}”" and says["position"] == "position 5 to 7" and says["shape"] == "digits"
    assert says["previous"] == f"after “{planted.TEXTS[3]}”" and says["next"] == f"before “{planted.TEXTS[8]}”"
    assert all(0.0 <= one["shuffled_f1"] < 0.3 for one in records[: len(planted.CONCEPTS)])
    shuffled = [one["shuffled_f1"] for one in records if one.get("tokens")]  # of features that fire
    assert len(shuffled) == result.labels.features
    assert result.labels.shuffled_f1 == pytest.approx(np.mean(shuffled), abs=1e-4)


def test_random_directions_get_no_labels(planted_run):
    result, records = planted_run[0]
    random = records[len(planted.CONCEPTS) + 1 :]
    assert sum("label" in one for one in random) <= 0.05 * len(random)
    assert result.random.features == result.labels.features == 159 and result.random.share.mean <= 0.05


def test_held_out_text_scores_labels_and_does_nothing_else(planted_run):
    (_, first), (result, second) = planted_run
    assert result.labels.labelled == 0  # nothing that was learnt holds on noise
    for on_text, on_noise in zip(first, second, strict=True):
        pairs = [one["detector"] | dict(f1=None) if "detector" in one else None for one in (on_text, on_noise)]
        assert pairs[0] == pairs[1]
        changed = dict.fromkeys(("detector", "label", "shuffled_f1"))
        assert on_text | changed == on_noise | changed
