"""The stage as a binary: files, results, resuming, and bad input in one line."""

import dataclasses
import json
import re
from collections import Counter

import numpy as np
import pytest
import runs
import settings_read
from made_transcoders import made_set
from torch_sites import relative_error

from saejax import load_jacobian_lens, save_transcoders
from saejax.attribution.forms.features import parse_feature
from saejax.attribution.graph import Graph
from saejax.attribution.graph.data import FEATURE
from saejax.attribution.local.dictionaries import LayerTranscoders
from saejax.attribution.results import AttributeResults
from saejax.attribution.settings import GraphConfig
from saejax.attribution.trace import prompt
from saejax.errors import UserError
from saejax.interpret.jacobian_lens import JacobianLens
from saejax.interpret.neighbours import tokens_through_lens
from saejax.models import identity as hashes
from saejax.models.settings import ModelConfig
from saejax.models.tokens import continuation_ids, encode, pad
from saejax.page.scripts import embedded
from saejax.results import from_json, to_json
from saejax.runner import command, command_line
from saejax.serving.app import GraphServer
from saejax.serving.jobs import Jobs
from saejax.serving.session import ModelSession
from saejax.serving.store import GraphStore
from saejax.stages.attribute import run as stage
from saejax.stages.attribute.outputs import read_lens
from saejax.stages.attribute.requests import _TAKEN, Request, identity, read_given_labels, read_requests, unit_name
from saejax.stages.attribute.traces import trace_key
from saejax.tasks.corpora import read_corpus
from saejax.tasks.settings import CorpusConfig

# One device traces as eight do, and the slow suite traces with two processes.
pytestmark = pytest.mark.usefixtures("single_device")


@pytest.fixture(scope="module")
def flags(tiny_llama, lm, tmp_path_factory):
    """The model and a set of transcoders for it."""
    folder = tmp_path_factory.mktemp("set") / "transcoders"
    save_transcoders(folder, made_set(lm))
    return [f"--model.path={tiny_llama}", f"--graph.transcoders={folder}", "--graph.contexts=2"]


def attribute(tmp_path, *flags: str) -> int:
    return command.run(["attribute"], "", ["attribute", f"--workdir={tmp_path}", *flags])


def assert_contexts_are_those_of_the_corpus(folder, lm):
    """Features that no file describes are searched in the first texts: each one's strongest firing in each text."""
    transcoders, values = made_set(lm), []
    for document in read_corpus(CorpusConfig())[:2]:
        ids_T = encode(lm.tokenizer, document.text)[:32]
        sites = lm(pad([ids_T]), capture=[f"mlp_in.{layer}" for layer in range(len(transcoders))]).sites
        values.append([np.asarray(each.encode(sites[each.site]))[0] for each in transcoders])
    paths = list(folder.iterdir())
    assert len(paths) > 4
    for path in paths:
        layer, index = map(int, path.stem.split("_"))
        details = parse_feature(json.loads(path.read_text()))
        peaks = [value_LxTxF[layer][:, index].max() for value_LxTxF in values]
        expected = sorted((peak for peak in peaks if peak > 0), reverse=True)
        np.testing.assert_allclose([max(each["activations"]) for each in details.examples], expected, rtol=1e-4)
        assert details.name
        quarters = Counter(min(int(4 * peak / expected[0]), 3) for peak in expected)
        assert [len(some) for _, some in details.quantiles] == [min(quarters[at], 2) for at in sorted(quarters)[::-1]]
        for name, some in details.quantiles:
            low, high = map(float, re.findall("[0-9.e+-]+", name))
            assert all(0.99 * low <= max(each["activations"]) <= 1.01 * high for each in some), name
        active = sum(int((value_LxTxF[layer][1:, index] > 0).sum()) for value_LxTxF in values)
        assert sum(height for _, height in details.histogram) == active


def test_two_prompts_of_a_file(flags, lm, tmp_path, capsys):
    prompts = tmp_path / "some.jsonl"
    lines = [
        dict(slug="water", prompt="The water near the war", targets=[[" runs", " way"]]),
        dict(slug="ids", token_ids=[5, 17, 33, 8, 41], targets=[]),
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "labels.json").write_text(json.dumps({f"0_{feature}": f"my {feature}" for feature in range(48)}))
    flags = [
        *flags,
        f"--graph.labels={tmp_path / 'labels.json'}",
        "--neuronpedia.source_set=plt-9",
        "--graph.query_key=1.2",
    ]
    assert attribute(tmp_path / "run", *flags, f"--graph.prompts={prompts}") == 0
    folder, said = tmp_path / "run" / "attribute" / "some", capsys.readouterr().out
    assert "  attribute/some: water (1 of 2): started\n" in said
    for slug in ("water", "ids"):
        (page,) = re.findall(rf": {slug} .*; open (.*)\n", said)
        assert (folder / f"{slug}.html").samefile(page)
    saved = json.loads((folder / "done.json").read_text())["results"]
    results = saved["graphs"]
    assert list(results) == ["water", "ids"]
    assert to_json(from_json(AttributeResults, saved, folder)) == saved  # nothing is lost in its class
    water = results["water"]
    assert len(water["targets"]) == 1 and "way" in water["targets"][0]["label"]
    assert water["unexplained"] < 1e-5
    whole = Graph.load(folder / "ids-graph")
    graph = whole.prune()  # the whole graph is saved, so pruning again traces nothing
    assert whole.pruning is None and len(whole.nodes) > len(graph.nodes)
    assert results["ids"]["traced"] == whole.count(FEATURE) and results["ids"]["untraced"] < 1e-6
    assert "active features traced (100\u00a0%)" in (folder / "ids.html").read_text()
    document = json.loads((folder / "graphs" / "ids.json").read_text())
    assert len(document["nodes"]) == len(graph.nodes) and len(document["links"]) == results["ids"]["edges"]
    assert document["metadata"]["feature_details"] == dict(neuronpedia_source_set="plt-9")
    labels = {node["node_id"]: node["clerp"] for node in document["nodes"] if node["activation"] is not None}
    assert labels == {name: f"my {name.split('_')[1]}" if name.startswith("0_") else "" for name in labels}
    assert any(labels.values()) and "my " in (folder / "ids.html").read_text()
    assert_contexts_are_those_of_the_corpus(folder / "features", lm)
    listed = json.loads((folder / "graphs" / "graph-metadata.json").read_text())["graphs"]
    assert [entry["slug"] for entry in listed] == ["water", "ids"]
    (split,) = water["query_key"]
    assert split["query"] == len(water["tokens"]) - 1 and (split["layer"], split["head"]) == (1, 2)
    assert f"Head {split['layer']}.{split['head']} at " in (folder / "water.html").read_text()
    # Killed before the second prompt was done, and after its graph was written.
    (folder / "done.json").unlink()
    (folder / "ids.json").unlink()
    assert attribute(tmp_path / "run", *flags, f"--graph.prompts={prompts}") == 0
    again = json.loads((folder / "done.json").read_text())["results"]["graphs"]
    assert again["ids"] | dict(seconds=0) == results["ids"] | dict(seconds=0)
    assert "kept from an earlier run: water" in capsys.readouterr().out
    np.testing.assert_array_equal(Graph.load(folder / "ids-graph").adjacency_RxS, whole.adjacency_RxS)


def assert_a_lens_tells_of_features(base, lm, tmp_path):
    """The page, its server and the unit's file have the tokens that the Jacobian lens reads; other units do not."""
    turned_DxD = np.linalg.qr(np.random.default_rng(0).standard_normal([lm.config.d_model] * 2))[0].astype(np.float32)
    JacobianLens(lm, {0: turned_DxD}, 1).save(tmp_path / "lens.pt")
    assert attribute(tmp_path / "run", *base, f"--model.lens={tmp_path / 'lens.pt'}") == 0
    folder = (tmp_path / "run" / "attribute" / "one").resolve()
    kept, read = Graph.load(folder / "one-graph").prune(0.99), read_lens(folder)
    nodes = kept.nodes[kept.slice_of(FEATURE)]
    assert read.keys() == set(zip(nodes.layer_N.tolist(), nodes.index_N.tolist(), strict=True))
    jacobians = load_jacobian_lens(lm, tmp_path / "lens.pt").jacobians
    assert read == tokens_through_lens(lm, LayerTranscoders.of(made_set(lm)), list(read), jacobians)
    store, feature = GraphStore(tmp_path / "run"), next(iter(read))
    (details,) = store.details(store.find("attribute/one/graphs/one"), [feature], GraphConfig()).values()
    assert (details.top_logits, details.bottom_logits) == read[feature]
    page = (folder / "one.html").read_text()
    session = ModelSession(command_line.read_configs(command_line.stage_flags(), ["serve"]), named=False)
    served = GraphServer(store, session, Jobs())._graph(dict(id="attribute/one/graphs/one"))
    said = f"Tokens that features raise and lower are read by the Jacobian lens {tmp_path / 'lens.pt'}."
    assert said in page and said in served
    assert embedded(list(read[feature][0]))[1:-1] in page
    assert attribute(tmp_path / "run", *base, "--graph.node_threshold=0.98") == 0
    assert not read_lens(tmp_path / "run" / "attribute" / "one")


# Statement 12 of WORKSPACE.md, what must hold.
def test_what_is_shown_of_a_graph_traces_nothing_again(flags, lm, tmp_path, monkeypatch):
    """Each such setting, one after the other; a setting of the trace itself traces."""
    base = [*flags, "--graph.prompt=The water near", "--graph.slug=one", "--graph.max_features=60"]
    base.append("--graph.node_threshold=0.99")
    assert attribute(tmp_path / "run", *base) == 0
    first = Graph.load(tmp_path / "run" / "attribute" / "one" / "one-graph")
    named = sorted(path.name for path in (tmp_path / "run" / "attribute" / "one" / "features").iterdir())
    (tmp_path / "labels.json").write_text(json.dumps({f"0_{feature}": f"my {feature}" for feature in range(48)}))
    (tmp_path / "groups.json").write_text(json.dumps({"*": [["all", *first.prune(0.99).ids[:2]]]}))
    traced = []

    def count(*arguments, **options):
        traced.append(options)
        return prompt.trace_prompt(*arguments, **options)

    monkeypatch.setattr(stage, "trace_prompt", count)
    prompts = tmp_path / "some.jsonl"
    lines = [dict(slug="another-name", prompt="The water near"), dict(slug="new", prompt="The way")]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    shown = [
        "--graph.node_threshold=0.5",
        "--graph.edge_threshold=0.6",
        "--graph.top_edges=3",
        "--graph.min_weight=1e-3",
    ]
    shown += [f"--graph.labels={tmp_path / 'labels.json'}", f"--graph.supernodes={tmp_path / 'groups.json'}"]
    shown += ["--neuronpedia.source_set=plt-9", "--graph.contexts=3", "--graph.query_key=1.2"]
    with monkeypatch.context() as patch:
        patch.setattr(stage, "load_run_model", lambda run: pytest.fail("the model is loaded"))
        patch.setattr("saejax.stages.attribute.run.LocalModel", lambda *parts: pytest.fail("the prompt is run"))
        for flag in shown[:-2]:  # nor is the model loaded, as all is known of these features
            assert attribute(tmp_path / "run", *base, flag) == 0
        assert attribute(tmp_path / "run", *base, "--graph.min_weight=1000000") == 0
    page = (tmp_path / "run" / "attribute" / "one" / "one.html").read_text()
    assert "No feature is kept: --graph.min_weight=1e+06 drops all of them" in page
    for flag in shown[-2:]:
        assert attribute(tmp_path / "run", *base, flag) == 0
    assert traced == []
    folder = tmp_path / "run" / "attribute" / "one"
    again = Graph.load(folder / "one-graph")
    assert np.array_equal(again.adjacency_RxS, first.adjacency_RxS) and again.settings == first.settings
    assert {path.name for path in (folder / "features").iterdir()} >= set(named) and named
    assert "Head 1.2 at " in (folder / "one.html").read_text()
    assert_a_lens_tells_of_features(base, lm, tmp_path)
    assert traced == []
    more = [flag for flag in base if "prompt=" not in flag and "slug" not in flag]
    assert attribute(tmp_path / "run", *more, f"--graph.prompts={prompts}") == 0
    assert len(traced) == 1  # the new line alone
    for flag in ("--graph.max_features=50", "--graph.target= way", "--graph.max_logits=2"):
        assert attribute(tmp_path / "run", *base, flag) == 0
    assert len(traced) == 4
    assert settings_read.never_read("attribute") <= set()


@pytest.mark.parametrize(
    "wrong,message",
    [
        (["--graph.prompt=The war", "--graph.prompts=a.jsonl"], "--graph.prompt and --graph.prompts: expected one"),
        (["--graph.prompt=The war", "--graph.transcoders=./nowhere/at/all"], "nowhere/at/all does not exist"),
        (["--graph.prompt=The war", "--graph.transcoders="], "--graph.transcoders is missing"),
        (["--graph.prompt=The war", "--graph.target= and so on"], "' and so on' is 6 tokens"),
        ([f"--graph.prompt={'The war ' * 200}"], "401 tokens, more than the model's context of 128"),
        (["--graph.prompt=The war", "--graph.slug=../up"], "cannot name a graph"),
        (["--graph.prompt=The war", f"--graph.slug={300 * 'b'}"], "cannot name a graph: use letters, digits, '.', '_'"),
        (["--graph.prompts=none.jsonl"], "none.jsonl does not exist"),
        (["--graph.prompt=The war", "--graph.query_key=first"], "--graph.query_key=first: expected layer.head"),
        (["--graph.prompt=The war", "--graph.query_key=9.0"], "no head 9.0"),
        (["--graph.prompt=The war", "--graph.query_key=1.0@9"], "no position 9 for head 1.0"),
        (["--graph.prompt=The war", "--graph.labels=none.json"], "none.json does not exist"),
        (["--graph.prompt=The war", "--model.lens=none.pt"], "--model.lens=none.pt does not exist"),
        (["--graph.prompt=The war", f"--graph.labels={__file__}"], "holds no labels: expected"),
        ([], "has nothing to make with these settings"),
    ],
)
def test_bad_input_is_one_line(flags, tmp_path, capsys, wrong, message):
    assert attribute(tmp_path, *flags, *wrong) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_all_prompts_and_labels_are_looked_at_before_one_is_traced(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stage, "trace_prompt", lambda *arguments, **options: pytest.fail("a prompt was traced"))
    prompts, labels = tmp_path / "some.jsonl", tmp_path / "labels.json"
    for name, message in (("0_48", "feature 48 of layer 0, where"), ("4_0", "feature 0 of layer 4, where")):
        labels.write_text(json.dumps({"0_47": "the last", name: "of another set"}))
        assert attribute(tmp_path / "run", *flags, "--graph.prompt=The war", f"--graph.labels={labels}") == 2
        error = capsys.readouterr().err
        assert f"labels.json names {message}" in error and error.count("\n") == 1
    prompts.write_text('{"prompt": "The war"}\n{"prompt": "The water", "targets": [" and so on"]}\n')
    assert attribute(tmp_path / "run", *flags, f"--graph.prompts={prompts}") == 2
    assert re.search("error: the-water-[0-9a-f]{8}: the target ' and so on' is 6 tokens", capsys.readouterr().err)
    prompts.write_text('{"prompt": "The war"}\n{"prompt": "The water", "targets": [" way", " way"]}\n')
    assert attribute(tmp_path / "run", *flags, f"--graph.prompts={prompts}") == 2
    assert " appears twice: expected each target once" in capsys.readouterr().err
    # And with less memory than the longest takes.
    prompts.write_text('{"prompt": "The war"}\n{"prompt": "The water near the war"}\n')
    monkeypatch.setattr(prompt, "free_memory", lambda mesh: prompt.Memory(0, 2**28))
    assert attribute(tmp_path / "run", *flags, f"--graph.prompts={prompts}") == 2
    error = capsys.readouterr().err
    assert "error: the-war-" in error and ": no prompt fits into the memory that is free, 0.2 GiB, and " in error
    assert error.count("\n") == 1 and not list((tmp_path / "run").rglob("*.html"))


@pytest.mark.parametrize(
    "line,message",
    [
        ('{"slug": "a"}', "is no prompt to trace"),
        ('{"prompt": "a", "token_ids": [1]}', "is no prompt to trace"),
        ('{"prompt": 3}', "prompt and targets are texts"),
        ('{"prompt": "a", "targets": 5}', "prompt and targets are texts"),
        ('{"prompt": "a", "targets": {" b": 1}}', "prompt and targets are texts"),
        ('{"prompt": "a"}\n{"prompt": ""}', "line 2: the prompt is empty"),
        ('{"token_ids": []}', "line 1: the prompt is empty"),
        ('{"prompt": "a", "slug": "searched"}', "cannot name a graph"),
        ('{"prompt": "a", "slug": "graph-metadata"}', "cannot name a graph"),
        (f'{{"prompt": "a", "slug": "{300 * "b"}"}}', "bbb cannot name a graph: use letters, .* at most 100 in all"),
        ('{"prompt": "a", "slug": "x "}\n', "cannot name a graph: use letters"),
        ('{"prompt": "a", "slug": "x"}\n{"prompt": "b", "slug": "X"}', "slug 'X' of an earlier line"),
        ("{", "is not JSON"),
        ('{"prompt": "a", "targets": [["b"]]}', "prompt and targets are texts"),
        ('{"prompt": "a", "targets": [["b", 1]]}', "prompt and targets are texts"),
        ('{"prompt": "twice"}\n{"prompt": "twice"}', "slug 'twice' of an earlier line"),
        ("", "holds no prompts"),
    ],
)
def test_bad_files_of_prompts(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(line)
    config = GraphConfig(transcoders="set", prompts=str(file))
    assert unit_name(config) == "prompts"
    with pytest.raises(UserError, match=message):
        read_requests(config)


def test_labels_that_no_reader_gets_through_are_one_line(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"deep\.json holds no labels"):
        read_given_labels(GraphConfig(labels=str(tmp_path / "deep.json")))


def test_a_trace_is_that_of_its_dictionaries_and_targets(tmp_path, tiny_llama):
    """Of two parts of one repository, or two choices of files in a folder, the traces differ."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "one.json").write_text("{}")
    (tmp_path / "set" / "two").mkdir()
    configs = command_line.read_configs(command_line.stage_flags(), ["attribute", f"--model.path={tiny_llama}"])
    base = GraphConfig(prompt="a", dictionaries=(str(tmp_path / "set"),))
    request, other = Request("a", "a", ()), Request("a", "a", (" b",))
    others = [dict(dictionaries=(str(tmp_path / "set" / "two"),)), dict(l0=("small",)), dict(direct=True)]
    keys = [
        trace_key(configs | dataclasses.replace(base, **changes), request)
        for changes in ({}, dict(node_threshold=0.5), *others)
    ]
    assert keys[0] == keys[1] and len(set(keys)) == 4 and trace_key(configs | base, other) not in keys
    in_bfloat16 = dataclasses.replace(configs[ModelConfig], dtype="bfloat16")
    assert trace_key(configs | base | in_bfloat16, request) not in keys
    (tmp_path / "set" / "one.json").write_text("{ }")
    assert trace_key(configs | base, request) not in keys


def test_a_large_lens_is_hashed_once(tmp_path, monkeypatch):
    """Every command and process asks for the fingerprint."""
    read, hash_file = [], hashes.file_sha256
    monkeypatch.setattr(hashes, "file_sha256", lambda path: read.append(path.name) or hash_file(path))
    monkeypatch.setattr(hashes, "_HASHED_AT_ONCE", 2)
    monkeypatch.setenv("SAEJAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "lens.npz").write_bytes(b"many")
    config = GraphConfig(dictionaries=(str(tmp_path / "set"),), lens=str(tmp_path / "lens.npz"))
    before = identity(config)
    assert identity(config) == before and read == ["lens.npz"]
    (tmp_path / "lens.npz").write_bytes(b"other")
    assert identity(config) != before and read == ["lens.npz"] * 2


@pytest.mark.parametrize(
    ("written", "targets"),
    [
        ('" way> runs"', (" way> runs",)),  # one target, not one for each of its letters, and no difference
        ('[" >=", "->"]', (" >=", "->")),
        ('[[" way", " >="], " runs"]', ((" way", " >="), " runs")),
    ],
)
def test_targets_are_texts_as_they_are_written_and_pairs_are_differences(tmp_path, written, targets):
    (tmp_path / "some.jsonl").write_text(f'{{"prompt": "a", "targets": {written}}}')
    (request,) = read_requests(GraphConfig(prompts=str(tmp_path / "some.jsonl")))
    assert request.targets == targets
    flags = GraphConfig(prompt="a", transcoders="set", target=" >=")
    assert read_requests(flags)[0].targets == (" >=",)
    assert read_requests(dataclasses.replace(flags, minus="->"))[0].targets == ((" >=", "->"),)
    with pytest.raises(UserError, match=r"--graph.minus is subtracted from --graph.target, which is missing"):
        unit_name(dataclasses.replace(flags, target="", minus=" a"))


@pytest.mark.parametrize(
    "texts",
    [
        ("The capital of the country with the longest coast", "The capital of the country with the longest river"),
        ("the 法国", "the 德国"), ("2 + 2", "2 - 2"), ("The war", "the war"), ("a b", "a  b"), ("a-b", "a b"),
        ("a\n", "a"), ("summary", "summary graph"), ("summary!", "summary"), ("graph metadata", "graph-metadata"),
    ],
)  # fmt: skip
def test_prompts_that_differ_have_folders_of_their_own(texts, tmp_path):
    names = [unit_name(GraphConfig(prompt=text, transcoders="set")) for text in texts]
    assert names[0] != names[1] and all(len(name) < 60 for name in names)
    assert unit_name(GraphConfig(prompt="the capital of france is", transcoders="set")) == "the-capital-of-france-is"
    lines = [dict(token_ids=[5, 17]), *(dict(prompt=text) for text in ("5 17", "5-17", texts[0]))]
    (tmp_path / "ids.jsonl").write_text("\n".join(map(json.dumps, lines)))
    slugs = [request.slug for request in read_requests(GraphConfig(prompts=str(tmp_path / "ids.jsonl")))]
    assert len(set(slugs)) == 4 and slugs[-1] == names[0]  # a line's name is that of the flag


def test_files_of_prompts_that_differ_have_folders_of_their_own():
    files = ["demo", "demo.v1", "demo.v2", "数据 1", "数学 1", "features", "a_b", "a-b", f"{'x' * 60}1", f"{'x' * 60}2"]
    names = [unit_name(GraphConfig(prompts=f"texts/{file}.jsonl", transcoders="set")) for file in files]
    assert len({*names, *_TAKEN}) == len(files) + len(_TAKEN)
    assert all(name.isascii() and len(name) < 60 for name in names)
    assert (names[0], names[1], names[6]) == ("demo", "demo.v1", "a_b")


def test_of_an_answer_the_first_token_is_explained(lm):
    request = Request("capital", "The", ((" Khartoum", " Rome"),), answers=True)
    first_ids = (continuation_ids(lm.tokenizer, answer)[0] for answer in request.targets[0])
    assert stage._targets(lm, request) == [tuple(first_ids)]
    with pytest.raises(UserError, match="the target ' Khartoum' is [2-9] tokens"):
        stage._targets(lm, dataclasses.replace(request, answers=False))


@pytest.mark.slow  # eight devices trace as one elsewhere, and two processes run as one with other stages
@pytest.mark.parametrize("mesh", ["data", "model"])
def test_two_processes_trace_as_one(flags, tmp_path, mesh):
    (tmp_path / "ids.jsonl").write_text('{"slug": "ids", "token_ids": [5, 17, 33, 8]}')
    own = [*flags, f"--graph.prompts={tmp_path / 'ids.jsonl'}", "--graph.max_logits=3"]
    own += ["--graph.node_threshold=1", "--graph.edge_threshold=1"]
    assert attribute(tmp_path / "one", *own) == 0
    for process in runs.start_pair("attribute", [*own, f"--workdir={tmp_path / 'two'}", f"--mesh.{mesh}=2"]):
        runs.finish(process)
    folders = [tmp_path / name / "attribute" / "ids" for name in ("one", "two")]
    first, second = (Graph.load(folder / "ids-graph") for folder in folders)
    assert np.array_equal(first.nodes.index_N, second.nodes.index_N) and first.count(FEATURE) > 20
    assert relative_error(second.adjacency_RxS, first.adjacency_RxS) < 1e-5
    first, second = (json.loads((folder / "ids.json").read_text()) for folder in folders)
    assert first["scores"] == pytest.approx(second["scores"], abs=1e-6)
