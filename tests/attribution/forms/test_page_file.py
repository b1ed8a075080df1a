"""The file of the page: what it may freeze, and what is refused."""

import copy
import json

import pytest
from reference_graphs import each_graph, needs_graphs

from saejax.attribution.forms.document import ERROR_TYPE, check_document
from saejax.errors import UserError
from saejax.page.graph.page import kept_features, page_html, write_page
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
        (lambda d: d["nodes"][0].update(layer="²"), "expected a number, or E"),
        (lambda d: d["nodes"][0].update(layer="100000"), "expected a number, or E"),  # rows that no page can have
        (lambda d: d["nodes"][0].update(ctx_idx=True), "must be an integer"),
        (lambda d: d["nodes"][0].update(token_prob="0.5"), r"nodes\[0\].token_prob must be a number or null"),
        (lambda d: d["nodes"][0].update(token_prob=float("inf")), "token_prob of the graph is inf"),
        (lambda d: d["metadata"].update(generation_settings=[1]), "generation_settings must be an object or null"),
        (lambda d: d["metadata"].update(pruning_settings="x"), "pruning_settings must be an object or null"),
        (lambda d: d["metadata"].update(feature_details=3), "feature_details must be an object or null"),
        (lambda d: d.update(nodes=[], links=[]), "no nodes"),
        (lambda d: d.clear(), "has no metadata, qParams, nodes, links"),
        (lambda d: d.update(nodes=[{}], links=[], qParams={}, metadata={}), "metadata has no slug"),
    ],
)
def test_a_document_that_is_no_graph_is_refused(document, tmp_path, change, said):
    broken = copy.deepcopy(document)
    change(broken)
    for refuse in (lambda: write_page(tmp_path / "graph.html", broken), lambda: check_document(broken)):
        with pytest.raises(UserError, match=said) as caught:
            refuse()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    for other in ([], None):
        with pytest.raises(UserError, match="the graph must be an object"):
            check_document(other)


def test_odd_values_of_other_programs_hide_no_graph(document):
    """NaN, unpaired surrogates, a set's name that is no text, and a feature whose id says no layer and number."""
    odd, old = copy.deepcopy(document), next(n["node_id"] for n in document["nodes"] if n["feature_type"] != ERROR_TYPE)
    odd = json.loads(json.dumps(odd).replace(f'"{old}"', '"my feature"'))
    odd["metadata"] |= dict(node_threshold=float("nan"), replacement_score=float("nan"), scan="\ud800", prompt="\ud83d")
    odd["metadata"] |= dict(feature_details=dict(neuronpedia_source_set="set"), pruning_settings=None)
    odd["nodes"][1] |= dict(extra=float("nan"), clerp="\udc00")
    page = page_html(check_document(odd))
    page.encode()
    data = json.loads(page.split('id="graph-data">')[1].split("</script>")[0])
    assert data["document"]["nodes"][1]["extra"] is None and "pruned to" not in page
    assert not kept_features({**odd, "nodes": [node for node in odd["nodes"] if node["node_id"] == "my feature"]})
    odd["metadata"]["feature_details"]["neuronpedia_source_set"] = ["set"]
    assert '"source":""' in page_html(odd)


def test_scores_stand_beside_the_share_of_features_that_was_traced(document):
    scored = {**document, "metadata": document["metadata"] | dict(replacement_score=0.5)}
    assert "score 0.50, the share of active features that was traced is not stated" in page_html(scored)
    scored["metadata"] |= dict(generation_settings=dict(active_features=4097, traced_features=4096))
    assert "score 0.50, with 4,096 of 4,097 active features traced (100\u00a0%)" in page_html(scored)
    scored["metadata"]["generation_settings"]["edges"] = "direct gradient x activation, first-order estimates"
    assert ", edges are direct gradient x activation, first-order estimates, pruned" in page_html(scored)
    assert "not stated" not in page_html(document)
    scored["metadata"]["pruning_settings"] = dict(node_threshold=0.999, edge_threshold=0.8)
    said = "pruned to 99.9\u00a0% of the influence of nodes, 80\u00a0% of the influence of edges."  # not to 100 %
    assert said in page_html(scored)


@pytest.mark.parametrize(
    ("scan", "model", "said"),
    [
        ("org/plts@4f1c", "google/gemma-2-2b", "model google/gemma-2-2b, transcoders org/plts@4f1c."),
        ("org/plts@4f1c", None, "made-up, transcoders org/plts@4f1c."),  # of another program, which says no model
        ("gemma-2-2b", None, "model gemma-2-2b."),
    ],
)
def test_the_model_is_named_and_not_the_transcoders_in_its_place(document, scan, model, said):
    metadata = {key: value for key, value in document["metadata"].items() if key != "pruning_settings"}
    metadata |= dict(scan=scan, node_threshold=None) | (dict(generation_settings=dict(model=model)) if model else {})
    assert said in page_html({**document, "metadata": metadata})


@pytest.mark.parametrize(
    ("name", "prompt", "title", "about"),
    [
        ("graph", "a < b", "Attribution graph: a &lt; b", "Attribution graph, "),  # made in Python, without a name
        ("graph", "", "Attribution graph", "Attribution graph, "),
        ("war", "", "Attribution graph: war", "Attribution graph war, "),
    ],
)
def test_the_name_of_a_graph_is_said_where_it_has_one(document, name, prompt, title, about):
    document = copy.deepcopy(document)
    document["metadata"] |= dict(slug=name, prompt=prompt)
    page = page_html(document)
    heading = title.removeprefix("Attribution graph: ")
    assert f"<title>{title}</title>" in page and f"<h1>{heading}</h1>\n<p>{about}" in page


@needs_graphs
@each_graph
def test_an_older_file_of_circuit_tracer_is_refused_where_its_ids_do_not_tell_nodes_apart(folder):
    """Of its later versions all ids are unique, as ours are."""
    document = json.loads((folder / "graph.json").read_text())
    with pytest.raises(UserError, match="not unique.*write the graph anew with a later version"):
        page_html(document)
