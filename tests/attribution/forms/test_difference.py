"""Two graphs side by side, against sets counted by hand."""

import copy

import numpy as np
import pytest
from made_up_documents import made_up_document
from pages import FEATURE

from saejax.attribution.forms.difference import compare_graphs
from saejax.errors import UserError


@pytest.fixture
def document():
    return made_up_document(features=30, edges=200, layers=6)


def features(document):
    return [node for node in document["nodes"] if node["feature_type"] == FEATURE]


def without(document, gone):
    links = [one for one in document["links"] if not {one["source"], one["target"]} & gone]
    return {**document, "nodes": [node for node in document["nodes"] if node["node_id"] not in gone], "links": links}


def test_a_graph_beside_itself(document):
    found = compare_graphs(document, document)
    assert found.features == (30, 30) and found.shared == 30 and found.jaccard == 1.0
    assert found.edges == 200 and found.correlation == pytest.approx(1.0)
    assert all(one.ids[0] == one.ids[1] and one.shares[0] == one.shares[1] for one in found.found)
    assert all(first == second for _, first, second in found.outputs)


def test_a_part_of_it(document):
    gone = {node["node_id"] for node in features(document)[:10]}
    part = without(document, gone)
    for link in part["links"]:
        link["weight"] *= -2.0
    found = compare_graphs(copy.deepcopy(document), part)
    assert found.features == (30, 20) and found.shared == 20 and found.jaccard == pytest.approx(20 / 30)
    missing = {one.ids[0] for one in found.found if one.ids[1] is None}
    assert missing == gone and found.elsewhere == 20
    assert found.edges == len(part["links"])
    order = [
        abs((1 if s[0] is None else s[0]) - (1 if s[1] is None else s[1])) for s in (f.shares for f in found.found)
    ]
    assert order == sorted(order, reverse=True)


def test_prompts_of_other_lengths_are_aligned_from_their_ends(document):
    """One with two more tokens in front has the same features two positions on."""
    moved = copy.deepcopy(document)
    moved["metadata"]["prompt_tokens"] = ["new", "tokens", *document["metadata"]["prompt_tokens"]]
    name = {}
    for node in moved["nodes"]:
        first, second, _ = node["node_id"].split("_")
        node["ctx_idx"] += 2
        name[node["node_id"]] = node["node_id"] = f"{first}_{second}_{node['ctx_idx']}"
    name = dict(zip([node["node_id"] for node in document["nodes"]], [node["node_id"] for node in moved["nodes"]]))
    for link in moved["links"]:
        link["source"], link["target"] = name[link["source"]], name[link["target"]]
    found = compare_graphs(document, moved)
    assert found.jaccard == 1.0 and found.correlation == pytest.approx(1.0) and found.edges == 200
    assert found.shifted is not None and found.shifted < 0.2
    weights = np.array([link["weight"] for link in document["links"]])
    for link, noise in zip(moved["links"], np.random.default_rng(0).normal(size=200)):
        link["weight"] = float(noise)
    noise = [link["weight"] for link in moved["links"]]
    assert compare_graphs(document, moved).correlation == pytest.approx(np.corrcoef(weights, noise)[0, 1])


def test_nothing_in_common_and_other_sets(document):
    empty = without(document, {node["node_id"] for node in features(document)})
    found = compare_graphs(empty, {**empty, "links": []})
    assert found.jaccard is None and found.shared == 0 and not found.found
    assert compare_graphs({**empty, "links": []}, {**empty, "links": []}).correlation is None
    one, two = (copy.deepcopy(document) for _ in range(2))
    one["metadata"]["generation_settings"], two["metadata"]["generation_settings"] = (
        dict(transcoders="a"),
        dict(transcoders="b"),
    )
    with pytest.raises(UserError, match="different sets, a and b"):
        compare_graphs(one, two)
