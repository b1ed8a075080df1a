"""Captured activations against plain forward passes of single documents; what is stored, and what goes wrong."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from saejax.activations import torch_capture
from saejax.activations.documents import KINDS as DOCUMENT_KINDS
from saejax.activations.store import Store
from saejax.activations.writer import StoreWriter
from saejax.errors import Interrupted, UserError
from saejax.models import source
from saejax.models.sites import KINDS, Site
from saejax.settings import CaptureConfig, CorpusConfig, ModelConfig
from saejax.tasks.behaviours import Prompt, write_prompts
from saejax.workspace import Run

ALL_SITES = tuple(f"{kind}.{layer}" for layer in (0, 2) for kind in KINDS)
WORDS = ["the", "cat", "near", "dogs", "runs", "capital", "France", "is", "Paris", "war", "lasted", "year", "1732"]
TRAIN_PROMPTS = ("The capital of France is", "3 + 4 =")


@dataclasses.dataclass
class Setup:
    """A model, a corpus and prompts; ``run(**settings)`` captures into a folder and opens the store."""

    model: str
    folder: object

    def make_run(self, name="capture", corpus=(), say=lambda line: None, stopping=lambda: False, model=None, **capture):
        settings = dict(sites=ALL_SITES, store_dtype="float32", shard_rows=200, batch_tokens=64, max_sink_share=1.0)
        configs = dict(
            model=ModelConfig(path=str(model or self.model)),
            corpus=CorpusConfig(
                **dict(path=str(self.folder / "corpus.jsonl"), context=32, held_out=0.3) | dict(corpus)
            ),
            capture=CaptureConfig(**settings | capture),
        )
        (self.folder / name).mkdir(exist_ok=True)
        return Run("capture", "", self.folder / name, configs, dict(baseline=self.folder), say, stopping)

    def capture(self, *args, **options):
        run = self.make_run(*args, **options)
        results = torch_capture.run_capture(run)
        return Store.open(run.folder), results


def corpus_texts():
    rng = np.random.default_rng(0)
    lengths = [1, 3, 40, 12, 7, 25, 90, 9, 18, 5, 33, 2]
    return ["3", *(" ".join(rng.choice(WORDS, length)) for length in lengths[1:])]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only cost time on products this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def setup(tiny_llama, tmp_path_factory) -> Setup:
    folder = tmp_path_factory.mktemp("capture")
    lines = [json.dumps(dict(text=text, group=f"g{i // 2}")) for i, text in enumerate(corpus_texts())]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    prompts = [Prompt("capital", "train", text, " a", " b", "", "", ()) for text in TRAIN_PROMPTS]
    prompts.insert(1, Prompt("capital", "test", "The capital of Spain is", " a", " b", "", "", ()))
    write_prompts(folder / "prompts.jsonl", prompts)
    return Setup(tiny_llama, folder)


@pytest.fixture(scope="module")
def captured(setup):
    """Every kind of site at two layers, every position, fp32."""
    return setup.capture("whole")


@pytest.fixture(scope="module")
def torch_model(tiny_llama):
    return source.load_torch_model(source.resolve(ModelConfig(path=str(tiny_llama))), "float32")


def plain_forward(model, ids) -> dict[str, np.ndarray]:
    """The value at every site for one document without padding, by other ways than those of the capture.

    The stream comes from ``output_hidden_states`` (the last of which is normalised, so layer 3 is not read); what
    attention and MLP read and write from their innermost products.
    """
    values, handles = {}, []

    def keep(name, module, before):
        def hook(module, args, output):
            values[name] = (args[0] if before else output)[0].detach().clone()

        handles.append(module.register_forward_hook(hook))

    for number, layer in enumerate(model.model.layers):
        keep(f"attn_out.{number}", layer.self_attn.o_proj, False)
        keep(f"mlp_in.{number}", layer.mlp.up_proj, True)
        keep(f"mlp_out.{number}", layer.mlp.down_proj, False)
    with torch.no_grad():
        stream = model(torch.tensor(ids[None].astype(np.int64)), output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    for layer in range(3):
        values[f"resid_pre.{layer}"], values[f"resid_post.{layer}"] = stream[layer][0], stream[layer + 1][0]
        values[f"resid_mid.{layer}"] = stream[layer][0] + values[f"attn_out.{layer}"]
    return {name: value.float().numpy() for name, value in values.items()}


def rows_by_place(store):
    """Row id of every (document, position)."""
    rows = np.arange(store.manifest["rows"])
    document_N, position_N, _ = store.tokens(rows)
    places = dict(zip(zip(document_N.tolist(), position_N.tolist(), strict=True), rows.tolist(), strict=True))
    assert len(places) == len(rows)  # no token twice
    return places


def relative_error(found, expected) -> float:
    return np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max()


def check_against_plain_forward(store, model, tolerance):
    places = rows_by_place(store)
    for document, ids in enumerate(store.documents):
        expected = plain_forward(model, ids)
        positions = [position for position in range(len(ids)) if (document, position) in places]
        rows = np.array([places[document, position] for position in positions], np.int64)
        if not positions:
            continue
        assert store.tokens(rows)[2].tolist() == ids[positions].tolist()
        for site in store.sites:
            assert relative_error(store.read(site, rows), expected[site][positions]) < tolerance, (site, document)


def test_every_site_equals_a_plain_forward_pass(captured, torch_model):
    store, _ = captured
    assert store.sites == ALL_SITES
    check_against_plain_forward(store, torch_model, 1e-5)


def test_every_token_is_stored_once_and_no_padding(captured):
    store, results = captured
    expected = {(i, position) for i, ids in enumerate(store.documents) for position in range(len(ids))}
    assert set(rows_by_place(store)) == expected
    assert results["padding_share"] > 0  # there was padding to leave out
    assert 1 in store.documents.lengths_N  # and a document of one token
    assert results["documents"] == {split: len(store.documents.of(split)) for split in ("train", "held_out")}
    assert sum(results["tokens"].values()) == len(expected) == results["sites"]["attn_out.0"]["rows"]
    assert results["sites"]["attn_out.0"] | dict(d=64, bytes=len(expected) * 64 * 4) == results["sites"]["attn_out.0"]


def test_documents_are_the_texts_cut_up_and_the_train_prompts(captured, setup):
    store, _ = captured
    documents = store.documents
    tokenizer = source.load_tokenizer(source.resolve(ModelConfig(path=str(setup.model))))
    pieces = {}
    for i, ids in enumerate(documents):
        kind = DOCUMENT_KINDS[documents.column("kind")[i]]
        pieces.setdefault((kind, documents.column("source")[i]), []).append(
            (documents.column("start")[i], ids.tolist())
        )
        assert len(ids) <= 32
    for index, text in enumerate(corpus_texts()):
        joined = [token for _, ids in sorted(pieces.pop(("corpus", index))) for token in ids]
        assert joined == tokenizer(text)["input_ids"]
    prompts = {source_index: found for (kind, source_index), found in pieces.items() if kind == "prompt"}
    assert sorted(prompts) == [0, 2]  # the one between them is a test prompt
    assert [prompts[i][0][1] for i in (0, 2)] == [tokenizer(text)["input_ids"] for text in TRAIN_PROMPTS]
    groups = documents.column("group")
    assert not set(groups[documents.split_N == 0]) & set(groups[documents.split_N == 1])
    assert set(documents.split_N[documents.column("kind") == 1]) == {0}


def test_the_manifest_ties_the_store_to_model_and_corpus(captured, setup):
    store, _ = captured
    found = source.resolve(ModelConfig(path=str(setup.model)))
    assert store.model == dict(name=str(setup.model), revision="", fingerprint=found.fingerprint, dtype="float32")
    store.check_model(found)
    store.verify()
    norms = store.norms("mlp_in.2", np.arange(store.manifest["rows"]))
    vectors = store.read("mlp_in.2", np.arange(store.manifest["rows"])).astype(np.float64)
    np.testing.assert_allclose(norms, np.linalg.norm(vectors, axis=1), rtol=1e-6)


@pytest.mark.parametrize("last", [1, 5, 50])
def test_the_last_positions_of_every_text(setup, torch_model, last):
    store, _ = setup.capture(f"last{last}", last=last, sites=("resid_post.1", "mlp_in.0"))
    check_against_plain_forward(store, torch_model, 1e-5)
    texts = {}
    for i, position in rows_by_place(store):
        kind, text, start = (int(store.documents.column(name)[i]) for name in ("kind", "source", "start"))
        texts.setdefault((kind, text), set()).add(start + position)
    lengths = {}
    for i, ids in enumerate(store.documents):
        kind, text, start = (int(store.documents.column(name)[i]) for name in ("kind", "source", "start"))
        lengths[kind, text] = max(lengths.get((kind, text), 0), start + len(ids))
    assert max(lengths.values()) > 64  # a text in three pieces
    assert texts == {key: set(range(max(0, length - last), length)) for key, length in lengths.items()}


def test_batch_size_changes_neither_order_nor_values(setup, captured):
    one, _ = setup.capture("one_by_one", batch_tokens=1, sites=("resid_post.2",))
    store, _ = captured
    rows = np.arange(store.manifest["rows"])
    for a, b in zip(one.tokens(rows), store.tokens(rows), strict=True):
        assert np.array_equal(a, b)
    assert relative_error(one.read("resid_post.2", rows), store.read("resid_post.2", rows)) < 1e-5


def test_bfloat16_on_disk_is_the_rounded_value(setup, captured):
    rounded, _ = setup.capture("rounded", store_dtype="bfloat16", sites=("resid_post.2",))
    rows = np.arange(captured[0].manifest["rows"])
    exact = torch.tensor(captured[0].read("resid_post.2", rows)).to(torch.bfloat16).float().numpy()
    # Batches are the same, so that every bit must be.
    assert np.array_equal(rounded.read("resid_post.2", rows).astype(np.float32), exact)


def test_the_model_can_run_in_bfloat16(setup):
    store, _ = setup.capture("bfloat16", dtype="bfloat16", sites=("resid_post.2", "attn_out.1"))
    model = source.load_torch_model(source.resolve(ModelConfig(path=str(setup.model))), "bfloat16")
    check_against_plain_forward(store, model, 0.03)
    values = store.read("resid_post.2", np.arange(100))
    assert np.array_equal(values, torch.tensor(values).to(torch.bfloat16).float().numpy())  # not run in fp32


@pytest.mark.parametrize(("site", "unused"), [("resid_post.2", "layers.3"), ("mlp_in.2", "layers.2.mlp")])
def test_nothing_after_the_last_site_is_run(setup, captured, tiny_llama, tmp_path, site, unused):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(tiny_llama, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    poisoned = [name for name in weights if any(part in name for part in (unused, "layers.3", "model.norm", "lm_head"))]
    assert len(poisoned) > 3
    for name in poisoned:
        weights[name] = np.full_like(weights[name], np.nan)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata=dict(format="pt"))
    store, _ = setup.capture("poisoned", model=tmp_path / "model", sites=(site,))
    rows = np.arange(store.manifest["rows"])
    assert relative_error(store.read(site, rows), captured[0].read(site, rows)) < 1e-5


def test_layers_after_the_last_site_are_dropped(setup):
    model = source.load_torch_model(source.resolve(ModelConfig(path=str(setup.model))), "float32")
    torch_capture.SiteReader(model, [Site("resid_post", 1), Site("mlp_in", 2)])
    assert len(model.model.layers) == 3


def test_a_nan_is_located_and_nothing_is_stored(setup, tiny_llama, tmp_path):
    from safetensors.numpy import load_file, save_file

    tokenizer = source.load_tokenizer(source.resolve(ModelConfig(path=str(tiny_llama))))
    token = tokenizer.encode("z")[0]  # in no text but the one below
    texts = [*corpus_texts(), "the cat " * 30 + "z the"]
    lines = [json.dumps(dict(text=text, group=f"g{i}")) for i, text in enumerate(texts)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    shutil.copytree(tiny_llama, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].copy()
    weights["model.embed_tokens.weight"][token, 3] = np.nan
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata=dict(format="pt"))
    run = setup.make_run(
        "nan",
        model=tmp_path / "model",
        # Attention multiplies what is masked by zero, which leaves a NaN one: behind it all positions are NaN.
        sites=("resid_pre.0", "mlp_out.1"),
        shard_rows=10_000,
        corpus=dict(path=str(tmp_path / "corpus.jsonl")),
    )
    position = tokenizer.encode(texts[-1]).index(token)
    with pytest.raises(UserError, match=rf"at resid_pre\.0 are NaN .* document 12 of the corpus, position {position},"):
        torch_capture.run_capture(run)
    assert not (run.folder / "manifest.json").exists()
    assert not list(run.folder.rglob("shard-*.npy"))


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


RESUMED = dict(sites=("resid_post.1", "mlp_in.2"), shard_rows=40, batch_tokens=64)


@pytest.fixture(scope="module")
def uninterrupted(setup):
    store, _ = setup.capture("uninterrupted", **RESUMED)
    assert store.manifest["shards"] > 5
    return files(store.folder)


def test_a_capture_killed_at_any_shard_goes_on_to_the_same_files(setup, uninterrupted, monkeypatch):
    """Killed in the middle of every shard in turn: some of the shard's files are there, not its record."""
    finished, write_shard = [], torch_capture.StoreWriter.write_shard

    class Killed(BaseException):
        pass

    def killed_in_the_middle(self, shard, parts):
        if finished and finished[-1] == shard:
            return write_shard(self, shard, parts)
        finished.append(shard)
        (self.folder / "resid_post.1").mkdir(exist_ok=True)
        (self.folder / "resid_post.1" / f"shard-{shard:05d}.npy").write_bytes(b"half a file")
        (self.folder / "resid_post.1" / f".shard-{shard:05d}.npy.writing-1").write_bytes(b"half a file")
        raise Killed

    monkeypatch.setattr(StoreWriter, "write_shard", killed_in_the_middle)
    run = setup.make_run("killed", **RESUMED)
    kills = 0
    while not (run.folder / "manifest.json").exists():
        said = []
        try:
            torch_capture.run_capture(dataclasses.replace(run, say=said.append))
        except Killed:
            kills += 1
            assert f"; {max(kills - 2, 0)} of " in said[0]  # all before the shard that the last kill hit
    assert finished == list(range(kills)) and kills > 5
    assert files(run.folder) == uninterrupted


def test_a_stopped_capture_keeps_its_shards_and_goes_on(setup, uninterrupted):
    asked = 0

    def stopping():
        nonlocal asked
        asked += 1
        return asked % 5 == 0

    run = setup.make_run("stopped", stopping=stopping, **RESUMED)
    stops = 0
    while True:
        try:
            torch_capture.run_capture(run)
            break
        except Interrupted as stop:
            stops += 1
            assert f"{len(list(run.folder.glob('index/record-*')))} of " in str(stop)
            assert not (run.folder / "manifest.json").exists()
    assert stops > 2
    assert files(run.folder) == uninterrupted


def test_a_finished_shard_that_was_damaged_is_made_again(setup, uninterrupted):
    store, _ = setup.capture("damaged", **RESUMED)
    (store.folder / "manifest.json").unlink()
    shard = store.folder / "mlp_in.2" / "shard-00003.npy"
    shard.write_bytes(shard.read_bytes()[:-4] + b"\0\0\0\0")
    setup.capture("damaged", **RESUMED)
    assert files(store.folder) == uninterrupted


def test_shards_of_another_corpus_are_not_taken_over(setup):
    run = setup.make_run("other_text", **RESUMED)
    torch_capture.run_capture(run)
    said = []
    corpus = dataclasses.replace(run.configs["corpus"], max_tokens=150)
    torch_capture.run_capture(dataclasses.replace(run, configs=run.configs | dict(corpus=corpus), say=said.append))
    assert "; 0 of " in said[0]


def test_max_tokens_takes_that_many_tokens_of_the_corpus(setup, captured):
    store, _ = setup.capture("limited", corpus=dict(max_tokens=151), sites=("resid_pre.0",))
    prompt_N = store.documents.column("kind") == DOCUMENT_KINDS.index("prompt")
    assert int(store.documents.lengths_N[~prompt_N].sum()) == 151
    sides = []
    for documents in (captured[0].documents, store.documents):
        columns = (documents.column(name).tolist() for name in ("kind", "source", "split"))
        sides.append(set(zip(*columns, strict=True)))
    assert sides[1] < sides[0]  # every text that was taken is in the split in which it always is


def test_too_many_sinks_are_an_error_that_names_share_and_flag(setup):
    options = dict(sites=("resid_post.1",), sink_factor=1.0)
    store, results = setup.capture("sinks", **options)
    norms = store.norms("resid_post.1", np.arange(store.manifest["rows"]))
    median = np.median(norms[store.documents.split_N[store.tokens(np.arange(len(norms)))[0]] == 0])
    sinks = results["sites"]["resid_post.1"]["sinks"]
    assert sinks["position_0"] + sinks["beyond"] == (norms > median).sum() > 10
    assert (
        len(store.rows("train", "resid_post.1")) + len(store.rows("held_out", "resid_post.1"))
        == (norms <= median).sum()
    )
    share = f"{sinks['share_beyond']:.2%}"
    with pytest.raises(
        UserError, match=rf"at resid_post\.1, {share} of .* at most 30.00%.*--capture.sink_factor.*"
    ) as e:
        setup.capture("sinks_refused", max_sink_share=0.3, **options)
    assert "--capture.max_sink_share" in str(e.value)
    assert not (setup.folder / "sinks_refused" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sites=("resid_last.1",)), "there is no site 'resid_last.1'"),
        (dict(sites=("resid_post.4",)), "4 layers, 0 to 3"),
        (dict(sites=()), "--capture.sites is empty"),
        (dict(sites=("mlp_in.0", "mlp_in.0")), "names mlp_in.0 twice"),
        (dict(corpus=dict(path="nowhere.jsonl")), "nowhere.jsonl does not exist"),
        (dict(corpus=dict(context=129)), "exceeds the model's context of 128"),
        (dict(corpus=dict(max_tokens=1)), "split has no text.*--corpus.max_tokens=1"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(setup, options, message):
    run = setup.make_run("refused", **options)
    with pytest.raises(UserError, match=message):
        torch_capture.run_capture(run)
    assert not list(run.folder.rglob("*"))


def test_a_disk_without_room_is_refused_at_the_start(setup, monkeypatch):
    monkeypatch.setattr(torch_capture.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match=r"disk is full: the store needs .* MiB more"):
        setup.capture("no_room")


def test_a_prompt_longer_than_the_context_is_refused(setup, tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", [Prompt("capital", "train", "cat " * 200, " a", " b", "", "", ())])
    run = dataclasses.replace(setup.make_run("long_prompt"), inputs=dict(baseline=tmp_path))
    with pytest.raises(UserError, match="a prompt of capital has .* tokens, more than the model's context of 128"):
        torch_capture.run_capture(run)


def test_every_piece_begins_with_the_tokenizers_first_token(setup, tmp_path):
    from tokenizers.processors import TemplateProcessing

    shutil.copytree(setup.model, tmp_path / "model")
    tokenizer = source.load_tokenizer(source.resolve(ModelConfig(path=str(setup.model))))
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    tokenizer.save_pretrained(tmp_path / "model")
    assert tokenizer("cat")["input_ids"][0] == 0
    store, _ = setup.capture("with_front", model=tmp_path / "model", sites=("resid_pre.0",))
    assert all(ids[0] == 0 and (ids[1:] != 0).all() and len(ids) <= 32 for ids in store.documents)
    assert len(store.documents[int(np.argmax(store.documents.column("start")))]) > 1


def test_progress_tells_speed_and_time_to_go(setup, monkeypatch):
    monkeypatch.setattr(torch_capture, "_SAY_EVERY", 0.0)
    lines = []
    _, results = setup.capture("progress", say=lines.append, sites=("resid_pre.0",))
    assert sum("tokens/s" in line and "s to go" in line for line in lines) > 3
    assert results["tokens_per_second"] > 0
