"""The file of the page: what it may freeze, and what is refused."""

import json

import pytest

from saejax.attribution.forms.page import write_page
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
