"""The file of the page: what it may freeze, and what is refused."""

import json

import numpy as np
import pytest
from made_up_documents import made_up_document
from pages import scores

from saejax.attribution.forms.page import page_edges, write_page
from saejax.errors import UserError
from saejax.page.scripts import embedded


def test_data_cannot_leave_its_element():
    text = embedded({"label": "</script><!--<script>&\u2028\u2029", "half": "\ud800"})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text)["label"] == "</script><!--<script>&\u2028\u2029"
    text.encode()


def test_pages_are_the_same_bytes(document, tmp_path):
    for name in ("a", "b"):
        write_page(tmp_path / name, document)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def broken(document, change):
    copy = json.loads(json.dumps(document))
    change(copy)
    return copy


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("links"), "has no links"),
        (lambda d: d["metadata"].pop("prompt_tokens"), "metadata has no prompt_tokens"),
        (lambda d: d["nodes"][3].pop("ctx_idx"), r"nodes\[3\] has no ctx_idx"),
        (lambda d: d["nodes"].append(d["nodes"][0]), "not unique"),
        (lambda d: d["links"][2].update(target="nobody"), r"links\[2\].target of the graph is 'nobody'"),
        (lambda d: d["links"][2].update(weight="1"), r"links\[2\].weight must be a number"),
        (lambda d: d["links"][2].update(weight=float("nan")), "weights must be finite"),
        (lambda d: d["nodes"][0].update(ctx_idx=99), "the prompt has 11 tokens"),
        (lambda d: d["nodes"][0].update(layer="x"), "expected a number, or E"),
        (lambda d: d["nodes"][0].update(ctx_idx=True), "must be an integer"),
        (lambda d: d.update(nodes=[], links=[]), "no nodes"),
    ],
)
def test_a_document_that_is_no_graph_is_refused(document, tmp_path, change, said):
    with pytest.raises(UserError, match=said) as caught:
        write_page(tmp_path / "graph.html", broken(document, change))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_edges_come_as_they_were_the_strongest_first():
    document = made_up_document(features=40, edges=300)
    edges, ids = page_edges(document), [node["node_id"] for node in document["nodes"]]
    found = [(ids[a], ids[b], w) for a, b, w in zip(edges["source"], edges["target"], edges["weight"], strict=True)]
    wanted = [(link["source"], link["target"], link["weight"]) for link in document["links"]]
    assert sorted(found) == sorted(wanted) and (np.diff(edges["score"]) <= 0).all()
    score = dict(zip(wanted, scores(document), strict=True))
    np.testing.assert_allclose(edges["score"], [score[edge] for edge in found], rtol=1e-5)
    assert page_edges({**document, "links": []})["source"] == []
