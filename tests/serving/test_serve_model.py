"""The server with a model: what it traces, prunes and changes is what the library gives."""

import contextlib
import copy
import dataclasses
import gc
import json
import shutil
import threading
import time
import weakref
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from made_transcoders import made_set
from made_up_documents import made_up_document

from saejax import save_transcoders
from saejax.attribution.forms.neuronpedia import to_document, write_graph
from saejax.attribution.local.dictionaries import LayerTranscoders
from saejax.attribution.local.edits import Change
from saejax.attribution.settings import GraphConfig
from saejax.attribution.trace.prompt import trace_prompt
from saejax.errors import UserError
from saejax.models.tokens import Tokens
from saejax.runner import command_line
from saejax.runner.results import load_results
from saejax.runner.workplan import Workplan
from saejax.runner.workspace import STARTED, Workspace
from saejax.serving import effects
from saejax.serving import session as benches
from saejax.serving.jobs import THREAD
from saejax.serving.session import ModelSession, targets_of, token_ids, trace_typed
from saejax.serving.store import GraphStore
from saejax.stages.attribute.requests import unit_name

PROMPT = "The war near"
NAME = unit_name(GraphConfig(prompt=PROMPT, transcoders="set"))
UNIT = f"attribute/{NAME}"
GRAPH = f"{UNIT}/graphs/{NAME}"
ASKED = dict(prompt=PROMPT, target=" way", minus=" runs", max_features=0, nodes=0.8, edges=0.98, chat=False)


JOB = SimpleNamespace(say=lambda words: None)


@pytest.fixture(scope="module")
def transcoders(lm):
    return made_set(lm)


@pytest.fixture(scope="module")
def place(tiny_llama, transcoders, tmp_path_factory):
    """A workdir, and the session of a server that is started with flags."""
    folder = tmp_path_factory.mktemp("served")
    save_transcoders(folder / "set", transcoders)
    flags = [f"--model.path={tiny_llama}", f"--graph.transcoders={folder / 'set'}"]
    configs = command_line.read_configs(command_line.stage_flags(), ["serve", *flags])
    return folder / "run", configs


@pytest.fixture(scope="module")
def asker(place, lm, serve, one_device):
    """A server on one device, with no graph yet."""
    root, configs = place
    root.mkdir()
    patch = pytest.MonkeyPatch()
    patch.setattr("saejax.stages.inputs.make_mesh", lambda config: one_device)
    yield serve(GraphStore(root), ModelSession(configs, named=True))
    patch.undo()


@pytest.fixture(scope="module")
def traced(asker):
    """The lines of the first trace."""
    return asker.work("api/trace", ASKED)


@pytest.fixture(scope="module")
def wanted(lm, transcoders, traced):
    pair = lm.token_id(" way"), lm.token_id(" runs")
    return trace_prompt(lm, LayerTranscoders.of(transcoders), PROMPT, targets=[pair])


def test_a_typed_prompt_becomes_a_unit_of_the_stage(asker, traced, wanted, place):
    root, _ = place
    steps = [line["done"] for line in traced if "done" in line]
    assert steps == sorted(steps) and steps[-1] == [line["total"] for line in traced if "total" in line][-1]
    assert traced[-1]["result"]["address"] == f"graph?id=attribute%2F{NAME}%2Fgraphs%2F{NAME}"
    document, same = json.loads((root / f"{GRAPH}.json").read_text()), to_document(wanted.graph.prune(), NAME)
    assert [node["node_id"] for node in document["nodes"]] == [node["node_id"] for node in same["nodes"]]
    weights = [{(one["source"], one["target"]): one["weight"] for one in d["links"]} for d in (document, same)]
    assert weights[0].keys() == weights[1].keys()
    np.testing.assert_allclose(*([w[edge] for edge in weights[0]] for w in weights), rtol=1e-4, atol=1e-6)
    # What a document says is enough to run it again.
    pair = tuple(wanted.readouts.pair_Kx2[0].tolist())
    assert token_ids(document) == wanted.graph.ids_P.tolist() and targets_of(document) == [pair]
    results = load_results(root / UNIT).graphs[NAME]
    assert results.prompt == PROMPT and not results.query_key
    status, page = asker.get(f"graph?id={GRAPH}")
    assert status == 200 and PROMPT in page and '"why":""' in page
    assert asker.work("api/trace", ASKED)[-1] == traced[-1]  # is there, unchanged
    (again,) = asker.work("api/trace", ASKED | dict(max_features=20))[-1].values()
    assert again["address"].endswith(f"{NAME}-2") and (root / UNIT / "done.json").exists()


@pytest.mark.parametrize("forgotten", [False, True])
def test_pruned_again_from_the_whole_graph(asker, traced, wanted, place, forgotten, request):
    root, _ = place
    if forgotten:  # a server that was started anew, and finds model and set in the unit
        bare = command_line.read_configs(command_line.stage_flags(), ["serve"])
        asker = request.getfixturevalue("serve")(GraphStore(root), ModelSession(bare, named=False))
    data = asker.data(f"graph?id={GRAPH}&nodes=0.95&edges=0.6")
    assert len(data["document"]["nodes"]) == len(wanted.graph.prune(0.95, 0.6).nodes)
    assert [data["live"][name] for name in ("nodes", "edges", "whole")] == [0.95, 0.6, True]
    for wrong in ("nodes=NaN&edges=0.5", "nodes=2&edges=0.5"):
        status, text = asker.get(f"graph?id={GRAPH}&{wrong}")
        assert status == 404 and "expected a share" in text


def test_groups_of_nodes_that_other_thresholds_show_are_saved(asker, traced):
    first = {node["node_id"] for node in asker.data(f"graph?id={GRAPH}")["document"]["nodes"]}
    whole = [node["node_id"] for node in asker.data(f"graph?id={GRAPH}&nodes=1&edges=1")["document"]["nodes"]]
    groups = [["more", *[name for name in whole if name not in first][:2]]]
    state = dict(supernodes=groups, pinnedIds=groups[0][1:], sg_pos=json.dumps({groups[0][1]: [0.5, 40]}))
    for saved, status in ((state, 200), ([["none", "9_9_9"]], 400)):
        connection, answer = asker.open("api/state", dict(graph=GRAPH, state=saved), "PUT")
        with contextlib.closing(connection):
            assert answer.status == status and len(groups[0]) == 3
    # Also where they are pruned away: the page counts them.
    for shares in ("nodes=1&edges=1", "nodes=0.5&edges=0.5"):
        shown = asker.data(f"graph?id={GRAPH}&{shares}")["document"]["qParams"]
        assert {name: shown[name] for name in state} == state
    assert asker.get(f"graph?id={GRAPH}")[0] == 200


def test_changes_do_what_edits_of_the_model_do(asker, lm, transcoders, traced, wanted):
    """Some features of one layer at one position, ablated; against the decoder with the transcoder's own edit."""
    active, last = wanted.local.active, len(wanted.graph.ids_P) - 1
    features = active.feature_A[(active.layer_A == 1) & (active.position_A == last)].tolist()[:3]
    changes = [["scale", 0.0, *(f"1_{feature}_{last}" for feature in features)]]
    tokens = Tokens(wanted.graph.ids_P[None], np.array([last + 1], np.int32))
    edited = lm(tokens, edits=[transcoders[1].ablate(features, positions=(last, None))]).logits_BxTxV[0, last]
    assert len(features) > 1
    asker.check_change(dict(graph=GRAPH, changes=changes, freeze="none"), wanted.local.logits_V, edited, lm)
    nothing = asker.work("api/change", dict(graph=GRAPH, changes=[["scale", 1.0, changes[0][2]]], freeze="none"))
    assert abs(nothing[-1]["result"]["kl"]) < 1e-9 and max(map(abs, nothing[-1]["result"]["random_kl"])) < 1e-9


def test_text_is_continued_beside_the_clean_text_and_random_features(asker, lm, transcoders, traced, wanted):
    local, last = wanted.local, len(wanted.graph.ids_P) - 1
    feature = int(local.active.feature_A[(local.active.layer_A == 1) & (local.active.position_A == last)][0])
    settings = dict(tokens=3, temperature=1.5, seed=3, onward=True)
    body = dict(graph=GRAPH, changes=[["set", 9.0, f"1_{feature}_{last}"]], freeze="none") | settings
    result = asker.work("api/generate", body)[-1]["result"]
    assert [kind for kind, _ in result["texts"]] == ["clean", "changed", "random", "random", "random"]
    change = Change(1, slice(last, None), feature, 9.0)
    for changes, (_, shown) in zip(([], [change]), result["texts"], strict=False):
        assert shown == lm.tokenizer.decode(local.generate(changes, 3, temperature=1.5, seed=3).ids_N)
    # Random features add as much to the stream.
    rows = []
    keep = mock.patch.object(type(local), "generate_rows", lambda self, edits, *_, **__: rows.extend(edits[1:]) or [])
    named = [("set", 9.0, [f"1_{feature}_{last}"])]
    with keep, pytest.raises(ValueError, match="zip"):
        effects.continuations(local, named, "none", 3)
    run = type(local).run
    keep = mock.patch.object(
        type(local), "run", lambda self, edits, *a, **b: rows.extend(edits) or run(self, edits, *a, **b)
    )
    with keep:
        effects.effects(local, named, "none")
    doses = []
    for (one,) in rows:
        position = one.position.start if isinstance(one.position, slice) else one.position
        old = local.active.value_A[local.active.index_of[one.layer, position, one.feature]]
        doses.append(abs(one.value - old) * np.linalg.norm(np.asarray(transcoders[1].W_dec_FxD[...])[one.feature]))
    assert len(doses) == 4 + 8 and np.ptp(doses) < 1e-4 * doses[0]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("trace", dict(prompt=""), "the prompt is empty"),
        ("generate", dict(tokens=0), "tokens is 0: expected"),
        ("generate", dict(temperature=-1), "temperature is -1"),
        ("generate", dict(seed=1.5), "seed is 1.5"),
        ("generate", dict(freeze="all"), "freeze is 'all'"),
        ("generate", dict(), "nothing is changed"),
        ("trace", dict(prompt="The war " * 200), "more than the model's context"),
        ("trace", dict(prompt="\ud800"), "prompt has an unpaired surrogate"),
        ("trace", dict(target=" and so on"), "is 6 tokens"),
        ("trace", dict(max_features=-1), "max_features is -1"),
        ("trace", dict(nodes=1.5), "nodes is 1.5: expected a share"),
        ("trace", dict(nodes=10**400), "expected a share"),
        ("trace", dict(chat=True), "has no chat template"),
        ("change", dict(graph="../../etc/passwd"), "there is no graph"),
        ("change", dict(), "nothing is changed"),
        ("change", dict(changes=[["scale", 0, "1_47_0"]]), "is not active at position 0"),
        ("change", dict(changes=[["scale", 1e999, "1_4_2"]]), "changes are lists"),
        ("change", dict(changes=[["scale", 10**400, "1_4_2"]]), "changes are lists"),
        ("change", dict(changes=[["scale", 0, "<b>"]]), "changes are lists"),
        ("change", dict(changes=[["scale", 0, "1_4_2"]], freeze="me"), "freeze is 'me'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(asker, traced, place, path, body, said):
    before = sorted((place[0] / "attribute").iterdir())
    change = dict(graph=GRAPH, changes=[], freeze="none")
    good = dict(trace=ASKED, change=change, generate=change | dict(tokens=1, temperature=0, seed=0))[path]
    (line,) = [one for one in asker.work(f"api/{path}", good | body) if "error" in one]
    assert said in line["error"] and "\n" not in line["error"]
    assert sorted((place[0] / "attribute").iterdir()) == before


def test_a_request_that_is_killed_leaves_no_thread_and_no_files(asker, traced, place, monkeypatch):
    ended = threading.Event()

    def endless(model, dictionaries, request, config, on_progress):
        try:
            while True:
                on_progress(1, 3)
                time.sleep(0.01)
        finally:
            ended.set()

    monkeypatch.setattr(benches, "trace_request", endless)
    before = sorted((place[0] / "attribute").iterdir())
    connection, answer = asker.open("api/trace", ASKED | dict(prompt="The water near"), "POST")
    while "done" not in json.loads(answer.readline()):
        pass
    answer.close()
    connection.close()
    ended.wait()
    while THREAD in [thread.name for thread in threading.enumerate()]:  # one that stays fails by the time limit
        time.sleep(0.01)
    assert sorted((place[0] / "attribute").iterdir()) == before


def test_another_model_than_the_graphs_is_refused(asker, traced, place, lm, monkeypatch):
    monkeypatch.setattr(benches, "open_parts", lambda run: (lm, LayerTranscoders.of(made_set(lm, seed=5))))
    store = GraphStore(place[0])
    graph = store.find(GRAPH)
    with pytest.raises(UserError, match="features .* are active when"):
        ModelSession(place[1], named=True).run(graph, store.document(graph), JOB)


def test_a_prompt_that_is_traced_again_under_its_slug_is_run_anew(place, asker, traced, lm, transcoders, tmp_path):
    """What is kept of a graph belongs to its document, not to its name."""
    session, store, runs = ModelSession(place[1], named=True), GraphStore(tmp_path), []
    for prompt in (PROMPT, "The water near the war"):
        graph = trace_prompt(lm, LayerTranscoders.of(transcoders), prompt, max_logits=1).graph
        write_graph(tmp_path, to_document(graph.prune(), "same"))
        found = store.find("same")
        runs.append(session.run(found, store.document(found), JOB))
        assert runs[-1].ids_P.tolist() == graph.ids_P.tolist()
    assert runs[0] is not runs[1]


def test_one_model_is_in_memory_at_a_time(place, lm, tmp_path, monkeypatch):
    """Not the first one beside the next, for which it makes room."""
    configs = place[1] | dataclasses.replace(place[1][GraphConfig], contexts=1)
    sets: list[weakref.ref] = []

    def opened(run):
        gc.collect()
        assert not [each for each in sets if each() is not None]
        other = copy.copy(lm), LayerTranscoders.of(made_set(lm))
        sets.extend(map(weakref.ref, other))
        return other

    monkeypatch.setattr(benches, "open_parts", opened)
    (tmp_path / "run").mkdir()
    session, store = ModelSession(configs, named=True), GraphStore(tmp_path / "run")
    job = SimpleNamespace(say=lambda words: None, progress=lambda done, total: None, stopping=lambda: False)
    settings = dict(prompt=PROMPT, max_features=20)
    for l0 in ((), ("small",)):  # other settings of what is opened
        now = configs | dataclasses.replace(configs[GraphConfig], l0=l0)
        graph = trace_typed(session, now, store, settings, job)
        assert store.find(graph)
    assert len(sets) == 4 and [each() is None for each in sets] == [True, True, False, False]


def test_a_unit_that_another_process_makes_is_left_alone(asker, traced, place, monkeypatch):
    """A request that cannot have the unit deletes nothing of it."""
    root, made = place[0], []

    def refuse(stages, configs, workdir, *rest, **more):
        unit = f"attribute/{configs[GraphConfig].slug}"
        folder = Workspace(root).folder(unit, Workplan(configs).fingerprint(unit))
        folder.mkdir(parents=True)
        (folder / STARTED).write_text("{}")
        (folder / "half.json").write_text("of another process")
        made.append(folder)
        raise UserError("another process works on it")

    monkeypatch.setattr(benches, "run_stages", refuse)
    (line,) = [one for one in asker.work("api/trace", ASKED | dict(prompt="The way")) if "error" in one]
    assert "another process" in line["error"] and (made[0] / "half.json").exists()
    shutil.rmtree(made[0])


def test_targets_are_those_that_a_document_names_or_the_tokens_of_its_logits():
    document = made_up_document(features=4, edges=5, outputs=2)
    logits = [node["node_id"].split("_")[1] for node in document["nodes"] if node["feature_type"] == "logit"]
    assert targets_of(document) == list(map(int, logits))
    for targets, wanted in (([[3, 4], [5, -1]], [(3, 4), 5]), ("ab", None), ([[1]], None), ([["a", 1]], None)):
        document["metadata"]["generation_settings"] = dict(targets=targets)
        if wanted:
            assert targets_of(document) == wanted
        else:
            with pytest.raises(UserError, match="does not name the tokens that it explains"):
                targets_of(document)
