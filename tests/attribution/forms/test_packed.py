"""Edges as arrays: nothing is lost, and the strongest come first."""

import base64

import numpy as np
import pytest
from made_up_documents import made_up_document
from pages import scores

from saejax.attribution.forms.packed import packed_edges

KINDS = {"Uint16Array": "<u2", "Uint32Array": "<u4", "Float32Array": "<f4", "Float64Array": "<f8"}


def unpacked(packed, name):
    kind, text = packed[name]
    return np.frombuffer(base64.b64decode(text), KINDS[kind])


@pytest.mark.parametrize("single", [True, False])
def test_edges_come_back_as_they_were_the_strongest_first(single):
    document = made_up_document(features=40, edges=300)
    for link in document["links"] if single else ():
        link["weight"] = float(str(np.float32(link["weight"])))
    packed = packed_edges(document)
    assert packed["weight"][0] == ("Float32Array" if single else "Float64Array") and "more" not in packed
    ids = [node["node_id"] for node in document["nodes"]]
    source_E, target_E, weight_E, score_E = (unpacked(packed, name) for name in ("source", "target", "weight", "score"))
    found = [(ids[a], ids[b], weight) for a, b, weight in zip(source_E, target_E, weight_E, strict=True)]
    wanted = [(link["source"], link["target"], link["weight"]) for link in document["links"]]
    assert sorted(found) == sorted((a, b, np.float32(weight) if single else weight) for a, b, weight in wanted)
    assert (np.diff(score_E) <= 0).all()
    place = {(a, b): score for (a, b, _), score in zip(wanted, scores(document), strict=True)}
    np.testing.assert_allclose(score_E, [place[a, b] for a, b, _ in found], rtol=1e-5)


def test_what_else_links_hold_stays_with_them():
    document = made_up_document(features=20, edges=50)
    for number, link in enumerate(document["links"]):
        link["number"] = number
    packed = packed_edges(document)
    order = [one["number"] for one in packed["more"]]
    assert [document["links"][e]["weight"] for e in order] == unpacked(packed, "weight").tolist()


def test_no_edges_and_weights_beyond_float32():
    document = made_up_document(features=5, edges=4)
    document["links"][0]["weight"] = 1e300
    assert packed_edges(document)["weight"][0] == "Float64Array"
    assert unpacked(packed_edges({**document, "links": []}), "source").size == 0
