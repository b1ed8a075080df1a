"""circuit-tracer's own graph files open: an error and a feature of one id come apart, each with its edges."""

import copy
import json

import numpy as np
import pytest
from made_up_documents import made_up_document
from reference_graphs import LAYERS, each_graph, needs_graphs

from saejax.attribution.forms.document import ERROR_TYPE, check_document, read_document
from saejax.attribution.forms.page import page_html
from saejax.errors import UserError


@needs_graphs
@each_graph
def test_files_of_circuit_tracer_have_the_edges_of_its_graph(folder):
    document, ref = json.loads((folder / "graph.json").read_text()), np.load(folder / "reference.npz")
    with pytest.raises(UserError, match="not unique"):
        check_document(document)
    positions = len(ref["ids"])
    ids = [f"{layer}_{feature}_{position}" for layer, position, feature in ref["active_features"]]
    ids += [f"{layer}_-1_{position}" for layer in range(LAYERS) for position in range(positions)]
    ids += [f"E_{token}_{position}" for position, token in enumerate(ref["ids"])]
    ids += [f"{LAYERS + 1}_{token}_{positions - 1}" for token in ref["logit_ids"]]
    target_E, source_E = np.nonzero(ref["edge_mask"])
    wanted = {(ids[s], ids[t]): ref["adjacency"][t, s] for s, t in zip(source_E, target_E, strict=True)}
    found = {(link["source"], link["target"]): link["weight"] for link in read_document(document)["links"]}
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([found[edge] for edge in wanted], list(wanted.values()), rtol=1e-5)
    assert len(page_html(document)) > 10_000


def as_circuit_tracer(document):
    """The same with circuit-tracer's ids of errors."""
    document = copy.deepcopy(document)
    names = {}
    for node in document["nodes"]:
        if node["feature_type"] == ERROR_TYPE:
            names[node["node_id"]] = node["node_id"] = f"0_{node['layer']}_{node['ctx_idx']}"
    names = {f"{name.split('_')[1]}_-1_{name.split('_')[2]}": name for name in names.values()}
    for link in document["links"]:
        link["source"] = names.get(link["source"], link["source"])
    return document


def test_without_a_collision_only_names_change():
    document = made_up_document(features=30, edges=200)
    foreign = as_circuit_tracer(document)
    errors = [node["node_id"] for node in foreign["nodes"] if node["feature_type"] == ERROR_TYPE]
    foreign["qParams"] |= dict(pinnedIds=errors[:2], supernodes=[["a", errors[0]]], clickedId=errors[1])
    found = read_document(foreign)
    ours = [node["node_id"] for node in document["nodes"] if node["feature_type"] == ERROR_TYPE]
    assert found["nodes"] == document["nodes"] and found["links"] == document["links"]
    assert found["qParams"] == document["qParams"] | dict(
        pinnedIds=ours[:2], supernodes=[["a", ours[0]]], clickedId=ours[1]
    )
    assert read_document(document) is document


def test_what_is_no_graph_is_still_refused():
    for damaged in ({}, [], None, dict(nodes=[{}], links=[], qParams={}, metadata={})):
        with pytest.raises(UserError):
            read_document(damaged)
