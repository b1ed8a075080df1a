"""A planted circuit: what is asked of its transformer, and what is said of its graphs, against plain ways to say it."""

import dataclasses

import numpy as np
import pytest

from saejax import load_model, load_results
from saejax.attribution.graph.nodes import ERROR, FEATURE, LOGIT, TOKEN
from saejax.ground_truth.algorithms import planted, transformer
from saejax.ground_truth.algorithms.plant_judge import place_edges
from saejax.ground_truth.algorithms.planted import CIRCUIT, Planted
from saejax.ground_truth.hub_folder import save_model
from saejax.models.edits import SiteEdit
from saejax.runner import command


def bits_of(words):
    return [int(words[place]) for place in (0, 2, 4)]


def test_questions_ask_whether_an_odd_number_of_bits_is_1():
    algorithm = Planted()
    questions = algorithm.draw("answers", 200, np.random.default_rng(0))
    for ids_T, (place,), right_1xV in zip(questions.ids_BxT, questions.place_BxN, questions.right_BxNxV, strict=True):
        words = [algorithm.words[word] for word in ids_T]
        assert words[0] == "<s>" and words[place] == "=" and place == len(words) - 1
        assert [algorithm.words[word] for word in np.flatnonzero(right_1xV[0])] == [str(sum(bits_of(words[1:])) % 2)]
    assert 0.05 < questions.fresh_B.mean() < 0.16
    assert not algorithm.batch(200, np.random.default_rng(0)).fresh_B.any()


def test_counterparts_differ_in_the_bits_that_the_behaviour_is_about():
    for prompt in Planted().prompts(20, np.random.default_rng(1)):
        own, other = (text.split() for text in (prompt.text, prompt.counterpart))
        differ = [place for place, pair in enumerate(zip(own, other, strict=True)) if len(set(pair)) > 1]
        assert differ == [4] if prompt.behaviour == "third" else differ in ([0], [2])
        for words, answer in ((own, prompt.correct), (other, prompt.wrong)):
            assert answer == f" {sum(bits_of(words)) % 2}"
        first, second, third = bits_of(own)
        assert dict(prompt.labels) == dict(differ=str(first ^ second), third=str(third))


def test_tests_put_in_what_edits_put_in(tmp_path, one_device):
    """Logits and what is right, question by question, by running the other one and patching its values in."""
    algorithm = Planted()
    fields = transformer.describe(len(algorithm.words), 64, layers=2, width=16)
    config = transformer.read(fields)
    params = transformer.initial(config, 1)
    save_model(tmp_path, fields, transformer.tensors(config, params), algorithm.words)
    model = load_model(str(tmp_path), mesh=one_device)
    some = algorithm.draw("answers", 5, np.random.default_rng(2))
    found = planted.tests(config, params, some.ids_BxT, some.place_BxN, some.right_BxNxV)
    texts = [" ".join(algorithm.words[word] for word in ids_T[1:]) for ids_T in some.ids_BxT]
    tokens = model.tokenize(texts)
    np.testing.assert_array_equal(tokens.ids_BxT[:, :9], some.ids_BxT)
    sites = ["mlp_out.0", "mlp_out.1"]
    own = model(tokens, capture=sites)
    others = {site: np.roll(np.asarray(own.sites[site]), 1, axis=0) for site in sites}
    edits = {
        "answers": [],
        "interchange": [SiteEdit.patch("mlp_out.0", others["mlp_out.0"], positions="last")],
        "answer": [SiteEdit.patch("mlp_out.1", others["mlp_out.1"], positions="last")],
        "alone": [SiteEdit.patch(site, others[site], positions=(0, 8)) for site in sites],
    }
    odd, differ = ([op(bits_of(text.split())) for text in texts] for op in (sum, lambda bits: bits[0] ^ bits[1]))
    third = [bits_of(text.split())[2] for text in texts]
    right = {
        "answers": [one % 2 for one in odd],
        "interchange": [differ[n - 1] ^ third[n] for n in range(5)],
        "answer": [odd[n - 1] % 2 for n in range(5)],
        "alone": [one % 2 for one in odd],
    }
    assert list(found) == list(edits)
    for name, (logits_BxNxV, right_BxNxV) in found.items():
        expected = np.asarray(model(tokens, edits=edits[name]).logits_BxTxV)[:, 8]
        np.testing.assert_allclose(logits_BxNxV[:, 0], expected, atol=2e-5, err_msg=name)
        assert [algorithm.words[word] for word in np.argmax(right_BxNxV[:, 0], axis=-1)] == list(map(str, right[name]))


@dataclasses.dataclass
class Nodes:
    kind_N: np.ndarray
    layer_N: np.ndarray
    position_N: np.ndarray


class SmallGraph:
    """Two features of MLP 0 at position 2, an error there, words 0 to 2, and a logit."""

    n_layers, ids_P, probability_K = 1, np.zeros(3), np.ones(1)
    nodes = Nodes(
        np.array([FEATURE, FEATURE, ERROR, TOKEN, TOKEN, TOKEN, LOGIT]),
        np.array([0, 0, 0, 0, 0, 0, 1]),
        np.array([2, 2, 2, 0, 1, 2, 2]),
    )
    target_R = np.array([0, 1, 6])
    adjacency_RxS = np.array([[0, 0, 0, 1, 3, 0.0], [0, 0, 0, 0, -2, 2.0], [4, -2, 1, 0, 1, 0.0]], np.float32)

    def count(self, kind):
        return int((self.nodes.kind_N == kind).sum())

    def slice_of(self, kind):
        (where,) = np.nonzero(self.nodes.kind_N == kind)
        return slice(where[0], where[-1] + 1)


def test_edges_of_places_add_up_what_goes_through_those_of_features():
    found = place_edges(SmallGraph())
    # Of the logit: features have 4/8 and 2/8 of its influence, the error 1/8, word 1 has 1/8; word 1 has 3/4 and 1/2 of
    # what the features get. The first and the last word are left out.
    expected = {((-1, 1, -1), (0, 2, -1)): 0.5 * 0.75 + 0.25 * 0.5, ((0, 2, -1), (1, 2, -1)): 7 / 8}
    expected[(-1, 1, -1), (1, 2, -1)] = 1 / 8
    for i, source in enumerate(found.sources):
        for j, target in enumerate(found.targets):
            assert found.weight_SxR[i, j] == pytest.approx(expected.get((source, target), 0), abs=1e-6)
    assert {(place, 8) for place in (0, 1)} <= {target for _, target in CIRCUIT}


def test_a_circuit_of_two_layers_takes_two_layers(tmp_path, capsys):
    flags = ["--algorithm.names=planted", "--algorithm.layers=3"]
    assert command.run(["algorithm"], "", ["program", f"--workdir={tmp_path}", *flags]) == 2
    assert "the planted circuit has 2 layers" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_planted_circuit_is_found(tmp_path):
    flags = ["--algorithm.names=planted", "--algorithm.width=32", "--algorithm.batch=128"]
    assert command.run(["algorithm"], "", ["program", f"--workdir={tmp_path}", *flags, "--mesh.data=8"]) == 0
    results = load_results(tmp_path / "algorithm" / "planted")
    assert all(share.mean >= results.wanted[sort] for sort, share in results.accuracy.items())
    scores = results.planted
    assert scores.auroc["trained"].mean >= 0.95 and scores.auroc["random"].mean < scores.auroc["trained"].mean
    carried = scores.carried["differ"]
    assert carried["whole site"].share.mean > 0.95 and carried["DAS"].share.mean > 0.9
    assert carried["trained"].share.mean > 0.6 and carried["random"].share.mean < 0.2
    assert scores.carried["third"]["whole site"].share.mean < 0.05
