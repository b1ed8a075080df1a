"""Features of a graph of SAEs changed by the server: what the decoder does with the SAEs' own edits."""

import numpy as np
import pytest
from made_transcoders import made_sae

from saejax import save_dictionary
from saejax.attribution.local.state import prompt_ids
from saejax.attribution.settings import GraphConfig
from saejax.models.tokens import Tokens
from saejax.runner import command_line
from saejax.serving.session import ModelSession
from saejax.serving.store import GraphStore
from saejax.stages.attribute.requests import unit_name

PROMPT, SITES = "The war near", ("resid_post.0", "mlp_out.2")
NAME = unit_name(GraphConfig(prompt=PROMPT, transcoders="set"))
GRAPH = f"attribute/{NAME}/graphs/{NAME}"


@pytest.fixture(scope="module")
def saes(lm):
    """Random SAEs, whose largest token is a sink."""
    return [made_sae(lm, site, prompt_ids(lm, PROMPT), seed=seed) for seed, site in enumerate(SITES)]


@pytest.fixture(scope="module")
def asker(tiny_llama, saes, serve, one_device, tmp_path_factory):
    """A server that traced the prompt with SAEs."""
    folder = tmp_path_factory.mktemp("served")
    for place, sae in enumerate(saes):
        save_dictionary(folder / f"sae{place}", sae)
    (folder / "run").mkdir()
    flags = [f"--model.path={tiny_llama}", f"--graph.dictionaries={folder / 'sae0'},{folder / 'sae1'}"]
    configs = command_line.read_configs(command_line.stage_flags(), ["serve", *flags])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saejax.stages.inputs.make_mesh", lambda config: one_device)
        asker = serve(GraphStore(folder / "run"), ModelSession(configs, named=True))
        asked = dict(prompt=PROMPT, target=" way", minus=" runs", max_features=0, nodes=0.99, edges=0.99)
        assert "result" in asker.work("api/trace", asked)[-1]
        yield asker


def test_changes_do_what_edits_of_the_saes_do(asker, lm, saes):
    """One SAE's features ablated at a position, one of a later SAE set there: each reads what was changed below."""
    ids_P = prompt_ids(lm, PROMPT)
    tokens = Tokens(ids_P[None], np.array([len(ids_P)], np.int32))
    read = lm(tokens, capture=SITES).sites
    inside_P = np.all([np.asarray(sae.is_not_sink(read[site]))[0] for sae, site in zip(saes, SITES)], axis=0)
    at = int(np.flatnonzero(inside_P)[-1])
    features = [np.flatnonzero(np.asarray(sae.encode(read[site]))[0, at]).tolist() for sae, site in zip(saes, SITES)]
    changes = [["scale", 0.0, *(f"0_{feature}_{at}" for feature in features[0])]]
    changes.append(["set", 2.5, f"2_{features[1][0]}_{at}"])
    here = dict(positions=(at, at + 1))
    edits = [saes[0].ablate(features[0], **here), saes[1].set([features[1][0]], 2.5, **here)]
    ran = [lm(tokens, edits=some).logits_BxTxV[0, -1] for some in ([], edits, edits[:1])]
    assert len(features[0]) > 1 and np.abs(ran[1] - ran[2]).max() > 1e-2 < np.abs(ran[2] - ran[0]).max()
    asker.check_change(dict(graph=GRAPH, changes=changes, freeze="none"), ran[0], ran[1], lm)


def test_nothing_can_be_held_and_the_page_says_so(asker, saes):
    data = asker.data(f"graph?id={GRAPH}")
    assert data["live"]["freeze_modes"] == ["none"]
    feature = next(node["node_id"] for node in data["document"]["nodes"] if node["activation"] is not None)
    body = dict(graph=GRAPH, changes=[["scale", 0, feature]], freeze="all")
    assert "expected none, as this graph is of SAEs" in asker.work("api/change", body)[-1]["error"]
