"""GGUF files: values, what transformers leaves out, and the cache."""

import concurrent.futures
import json
import os
import shutil
import time
from unittest.mock import Mock

import gguf as gguf_package
import huggingface_hub
import numpy as np
import pytest
from loaded_models import resolve
from safetensors.numpy import load_file

from saejax.errors import UserError
from saejax.models import gguf, identity, source


def write_gguf(file, tokenizer, architecture="llama", settings=(), drop=(), add=(), rule="smollm"):
    """Writes a one-layer Llama, F32 but for a Q8_0 embedding; returns the tensors it stands for.

    Args:
      tokenizer: a parsed tokenizer.json.
      settings: more settings below the architecture, and "block_count".
      drop, add: tensors to leave out, and sizes of others.
      rule: by which text is cut.
    """
    rng = np.random.default_rng(0)
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer = gguf_package.GGUFWriter(file, architecture)
    sizes = dict(context_length=64, embedding_length=32, block_count=1, feed_forward_length=48)
    sizes |= {"attention.head_count": 2, "attention.head_count_kv": 2, "vocab_size": len(tokens)}
    for key, value in (sizes | dict(settings)).items():
        add_setting = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add_setting[type(value)](f"{architecture}.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    for special in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id):
        special(0)
    shapes = dict(attn_q=(32, 32), attn_k=(32, 32), attn_v=(32, 32), attn_output=(32, 32))
    shapes |= dict(ffn_gate=(48, 32), ffn_up=(48, 32), ffn_down=(32, 48), attn_norm=(32,), ffn_norm=(32,))
    shapes = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()} | {"output_norm.weight": (32,)}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in (shapes | dict(add)).items()}
    for name in set(tensors) - set(drop):
        writer.add_tensor(name, tensors[name])
    kind = gguf_package.GGMLQuantizationType.Q8_0
    packed = gguf_package.quants.quantize(rng.normal(size=(len(tokens), 32)).astype(np.float32), kind)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors | {"token_embd.weight": gguf_package.quants.dequantize(packed, kind)}


def names_in(cache):
    return [path.name for path in cache.iterdir() if not path.name.endswith(".lock")]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return json.loads((tiny_llama / "tokenizer.json").read_text())


@pytest.fixture(scope="module")
def tiny_gguf(tokenizer, tmp_path_factory):
    """A GGUF file, and its tensors."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return file, write_gguf(file, tokenizer)


@pytest.fixture(scope="module")
def converted(tiny_gguf, tmp_path_factory):
    """The model that is made of the file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAEJAX_CACHE", str(tmp_path_factory.mktemp("converted")))
        return resolve(tiny_gguf[0])


@pytest.fixture
def conversions(converted, monkeypatch):
    """A list that grows by one with each conversion that is begun: it copies what one has made."""
    begun = []

    def convert(gguf_file, folder):
        begun.append(gguf_file)
        shutil.copytree(converted.folder, folder, ignore=shutil.ignore_patterns("saejax.json"), dirs_exist_ok=True)

    monkeypatch.setattr(gguf, "_convert", convert)
    return begun


def test_a_gguf_file_is_dequantised(tiny_gguf, converted, cache, monkeypatch):
    _, tensors = tiny_gguf
    weights = load_file(converted.folder / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {np.dtype("float32")}
    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    }.items():
        np.testing.assert_array_equal(weights[ours], tensors[theirs])
    assert "quantization_config" not in json.loads((converted.folder / "config.json").read_text())
    tokenizer = source.load_tokenizer(converted)
    assert tokenizer.decode(tokenizer("The war lasted, 17 years\n")["input_ids"]) == "The war lasted, 17 years\n"
    assert not hasattr(source.load_torch_model(converted), "hf_quantizer")
    parse, name = Mock(wraps=gguf_package.GGUFReader._build_fields), Mock(wraps=gguf_package.get_tensor_name_map)
    monkeypatch.setattr(gguf_package.GGUFReader, "_build_fields", lambda reader, *where: parse(reader, *where))
    monkeypatch.setattr(gguf_package, "get_tensor_name_map", name)
    # What is made does not depend on whether the hub can be reached.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", not huggingface_hub.constants.HF_HUB_OFFLINE)
    found = resolve(tiny_gguf[0])
    assert parse.call_count == name.call_count == 1, "transformers parses a file thrice, and lists names once a module"
    assert gguf_package.get_tensor_name_map is name, "others find the package as it was"
    assert found.fingerprint == converted.fingerprint and found.folder.parent == cache != converted.folder.parent


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
    assert resolve(tiny_gguf[0]) == first and len(conversions) == 1
    (cache / f".{first.folder.name}.writing").mkdir()  # as left behind by a killed process
    (cache / f".{first.folder.name}.writing" / "config.json").write_text("{")
    damage(first.folder)
    assert resolve(tiny_gguf[0]) == first
    assert len(conversions) == 2
    assert names_in(cache) == [first.folder.name]


def test_a_folder_is_whole_for_versions_that_hash_models_otherwise(tiny_gguf, cache, conversions, monkeypatch):
    """Two versions of saejax may read one cache at the same time: neither replaces the folder under the other."""
    first = resolve(tiny_gguf[0])
    monkeypatch.setattr(identity, "SETTINGS", ("config.json",))
    second = resolve(tiny_gguf[0])
    assert second.fingerprint != first.fingerprint and second.folder == first.folder and len(conversions) == 1


def test_two_at_once_convert_once(tiny_gguf, cache, conversions):
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = list(pool.map(resolve, 3 * [tiny_gguf[0]]))
    assert len(conversions) == 1 and len(set(found)) == 1


def test_files_that_two_threads_convert_leave_the_package_as_it_was():
    before = gguf_package.GGUFReader, gguf_package.get_tensor_name_map

    def convert(number):
        with gguf._parse_once():
            time.sleep(0.1 * number)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(convert, (1, 2)))
    assert (gguf_package.GGUFReader, gguf_package.get_tensor_name_map) == before


def test_a_cache_that_cannot_be_written(tiny_gguf, tmp_path, cache, monkeypatch):
    """A conversion that fails leaves nothing behind."""

    def full(gguf_file, folder):
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "_convert", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): set SAEJAX_CACHE"):
        resolve(tiny_gguf[0])
    assert names_in(cache) == []
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


SCALED = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "some.new_switch": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(architecture="gptneox"), "architecture 'gptneox', which transformers cannot read .* gemma2, .*: use"),
        (dict(settings=SCALED), "type = linear, rope.scaling.factor = 4.0, some.new_switch = True: use the model's"),
        (dict(settings={"attention.sliding_window": 16}), "attention.sliding_window = 16"),
        (dict(settings={"attention.key_length": 8}), "attention.key_length = 8"),
        (dict(add={"rope_freqs.weight": (8,)}), "of which transformers reads .* left out: rope_freqs.weight"),
        (dict(add={"blk.0.attn_q.bias": (32,)}), "possibly left out: blk.0.attn_q.bias"),
        (dict(rule="falcon"), "by a rule that transformers does not know .tokenizer.ggml.pre is 'falcon'.: use the"),
        (dict(drop=["blk.0.ffn_up.weight"]), "lacks the weights model.layers.0.mlp.up_proj.weight"),
        (dict(architecture="gemma2", settings=dict(block_count=46)), "how attention scores are scaled"),
    ],
)
def test_what_transformers_would_leave_out_is_refused(tokenizer, cache, tmp_path, options, message):
    write_gguf(tmp_path / "model.gguf", tokenizer, **options)
    with pytest.raises(UserError, match=message):
        resolve(tmp_path / "model.gguf")
    assert names_in(cache) == []


def test_text_for_qwen_is_composed_first(tokenizer, cache, tmp_path):
    """As in Qwen's own tokenizer, with which the models were trained: an "e" and its accent are "é", one character."""
    for rule, composes in (("qwen2", True), ("smollm", False)):
        write_gguf(tmp_path / f"{rule}.gguf", tokenizer, rule=rule)
        read = source.load_tokenizer(resolve(tmp_path / f"{rule}.gguf"))
        one, two = (read(text, add_special_tokens=False)["input_ids"] for text in ("caf\u00e9", "cafe\u0301"))
        assert (one == two) == composes, rule


def test_settings_that_agree_are_accepted_and_text_is_cut_by_the_files_rule(tokenizer, cache, tmp_path):
    """SmolLM2's rule sets digits apart first: what stands before one is cut as at a text's end."""
    settings = {"attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 16}
    settings |= {"rope.scaling.type": "none"}
    write_gguf(tmp_path / "model.gguf", tokenizer, settings=settings)
    found = resolve(tmp_path / "model.gguf")
    assert json.loads((found.folder / "config.json").read_text())["head_dim"] == 16
    cut = source.load_tokenizer(found).backend_tokenizer.pre_tokenizer.pre_tokenize_str
    assert [piece for piece, _ in cut("a\n\n12  3")] == ["a", "ĊĊ", "1", "2", "ĠĠ", "3"]
