"""Reading safetensors: values, shardings, checkpoints that do not fit, and how much is read at once."""

import functools
import math
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import ml_dtypes
import numpy as np
import pytest
from loaded_models import change_config, config_of, load, mesh_of
from safetensors.numpy import load_file, save_file
from tiny_models import save_tiny, save_tiny_llama
from transformers import AutoModelForCausalLM

from saejax.errors import UserError
from saejax.models import weights
from saejax.models.parameters import parameter_table
from saejax.models.source import ModelSource, load_torch_model
from saejax.models.weights import load_params, untie_stored_head

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(folder, attention_bias=True, mlp_bias=True)
    return folder


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of the tiny folder, to be damaged."""
    return shutil.copytree(tiny, tmp_path / "copy")


def change(folder, edit) -> None:
    """Applies ``edit`` to the dict of tensors in a folder."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_every_parameter_has_its_values_and_its_sharding(tiny):
    config, params = load(tiny, mesh=mesh_of(1, 2, 4))
    hf = load_file(tiny / "model.safetensors")
    shapes = {name: shape for name, (shape, _) in parameter_table(config).items()}
    assert {name: value.shape for name, value in params.items()} == shapes
    # 4 heads of 16, 2 key-value heads: head h of layer l is rows 16h to 16h+15 of the torch matrix.
    q, k = params["layers.q_DxHxK"], params["layers.k_DxNxK"]
    np.testing.assert_array_equal(q[2, :, 3], hf["model.layers.2.self_attn.q_proj.weight"][48:64].T)
    np.testing.assert_array_equal(k[3, :, 1], hf["model.layers.3.self_attn.k_proj.weight"][16:32].T)
    o = params["layers.o_HxKxD"]
    np.testing.assert_array_equal(o[1, 2], hf["model.layers.1.self_attn.o_proj.weight"][:, 32:48].T)
    np.testing.assert_array_equal(params["unembed_DxV"], hf["lm_head.weight"].T)
    np.testing.assert_array_equal(params["layers.up_bias_F"][3], hf["model.layers.3.mlp.up_proj.bias"])
    # "model" has 4 devices: 4 heads and 384 ids are split, 2 key-value heads are not divided by it.
    assert q.addressable_shards[0].data.shape == (4, 64, 1, 16)
    assert params["embed_VxD"].addressable_shards[0].data.shape == (96, 64)
    assert k.addressable_shards[0].data.shape == k.shape


def test_all_mismatches_are_listed_in_one_error(copy):
    """A transposed weight among them."""

    def damage(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = np.zeros(63, np.float32)
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((96, 64), np.uint8)  # quantised without a word
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((48, 32), np.int8)  # two values in one
        tensors["model.layers.4.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)  # not used
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.int64)
        last = "model.layers.3"
        for part in ("lm_head", "model.embed_tokens", f"{last}.self_attn.k_proj", f"{last}.mlp.down_proj"):
            tensors[f"{part}.weight"] = np.ascontiguousarray(tensors[f"{part}.weight"].T)

    change(copy, damage)
    with pytest.raises(UserError) as error:
        load(copy)
    assert sorted(str(error.value).partition(" do not fit its config.json: ")[2].split("; ")) == [
        "lm_head.weight has shape [64, 384], expected [384, 64]",
        "model.embed_tokens.weight has shape [64, 384], expected [384, 64]",
        "model.layers.0.mlp.up_proj.weight has dtype I8, expected one of F64, F32, F16, BF16: use unquantised weights",
        "model.layers.1.mlp.up_proj.weight is missing",
        "model.layers.2.mlp.up_proj.weight has dtype U8, expected one of F64, F32, F16, BF16: use unquantised weights",
        "model.layers.3.mlp.down_proj.weight has shape [96, 64], expected [64, 96]",
        "model.layers.3.self_attn.k_proj.weight has shape [64, 32], expected [32, 64]",
        "model.norm.weight has shape [63], expected [64]",
    ]


def test_weights_that_are_not_read(tiny, copy, caplog):
    """Layers beyond those of the configuration; tensors that no parameter has; biases that it leaves out."""
    beyond = "2 layers beyond the 2 that config.json says (num_hidden_layers): they are not read"
    logged = [f"{copy} holds weights of {beyond}"]
    change_config(copy, num_hidden_layers=2)
    for prefix in ("", "language_model."):
        tensors = {prefix + name: value for name, value in load_file(tiny / "model.safetensors").items()}
        save_file(tensors, copy / "model.safetensors")
        assert load(copy)[1]["layers.up_DxF"].shape[0] == 2
        assert caplog.messages == logged
        caplog.clear()
    change_config(copy, num_hidden_layers=4)
    silent = ("rotary_emb.inv_freq", "layers.0.self_attn.rotary_emb.inv_freq", "mtp_layers.0.mlp.up_proj.weight")
    silent += ("layers.4.eh_proj.weight", "layers.4.enorm.weight", "layers.4.mlp.up_proj.weight")  # DeepSeek-V3's
    silent += ("vision_tower.layers.9.mlp.up_proj.weight",)
    added = [f"model.{name}" for name in silent] + ["score.weight"]
    save_file(load_file(tiny / "model.safetensors") | dict.fromkeys(added, np.ones(2)), copy / "model.safetensors")
    load(copy)
    assert caplog.messages == []
    named = ["model.layers.3.self_attn.sinks", "model.per_layer.weight"]
    change(copy, lambda tensors: tensors.update(dict.fromkeys(named, np.ones(2))))
    load(copy)
    assert caplog.messages == [f"{copy} holds weights that are not read: {', '.join(named)}"]


def test_parameters_that_the_configuration_leaves_out_are_refused(tiny, copy):
    bias = "model.layers.2.self_attn.q_proj.bias"
    change_config(copy, attention_bias=False)
    with pytest.raises(UserError, match=rf"do not fit its config.json: .*; {bias} is there, and config.json says that"):
        load(copy)
    zeros = {name: 0 * value for name, value in load_file(tiny / "model.safetensors").items() if name.endswith("bias")}
    change(copy, lambda tensors: tensors.update({name: value for name, value in zeros.items() if "attn" in name}))
    assert "layers.q_bias_HxK" not in load(copy)[1]  # zeros change nothing
    norm = "model.layers.1.self_attn.q_norm.weight"  # of Qwen 3
    change(copy, lambda tensors: tensors.update({norm: np.ones(16)}))
    with pytest.raises(UserError, match=f"{norm} is there"):
        load(copy)


def test_parts_of_one_tensor_are_named_once(tmp_path):
    save_tiny(tmp_path, "gpt2")
    name = "transformer.h.1.attn.c_attn.weight"
    for edit, message in (
        (lambda tensors: tensors.update({name: tensors[name][:, 1:].copy()}), r"has shape \[40, 119\], expected \[40"),
        (lambda tensors: tensors.pop(name), "is missing"),
    ):
        change(tmp_path, edit)
        with pytest.raises(UserError, match=message) as error:
            load(tmp_path)
        assert str(error.value).count(name) == 1


def test_a_tied_head_is_used_as_it_is_stored(copy):
    """With other values, with those of the embedding, not at all, and in place of the embedding."""
    change_config(copy, tie_word_embeddings=True)
    body = load_file(copy / "model.safetensors")
    embed_VxD, head_VxD = body.pop(EMBED), body.pop(HEAD)
    for stored, tied in (
        ({EMBED: embed_VxD, HEAD: head_VxD}, False),
        ({EMBED: embed_VxD, HEAD: embed_VxD.copy()}, True),
        ({EMBED: embed_VxD}, True),
        ({HEAD: head_VxD}, True),
    ):
        save_file(body | stored, copy / "model.safetensors", metadata=dict(format="pt"))
        config, theirs = untie_stored_head(copy, config_of(copy)), AutoModelForCausalLM.from_pretrained(copy)
        assert config.tied == tied
        params = load_params(copy, config, mesh_of(1, 1, 1), "float32")
        np.testing.assert_array_equal(params["embed_VxD"], theirs.get_input_embeddings().weight.detach())
        if not tied:
            np.testing.assert_array_equal(params["unembed_DxV"], theirs.lm_head.weight.detach().T)


def test_the_first_layers_alone(copy):
    config, mesh = config_of(copy), mesh_of(1, 1, 2)
    whole, part = (load_params(copy, config, mesh, "float32", layers) for layers in (None, 3))
    assert whole.keys() == part.keys()
    for name, value in part.items():
        np.testing.assert_array_equal(value, whole[name][:3] if name.startswith("layers.") else whole[name])
        assert value.sharding == whole[name].sharding
    change(copy, lambda tensors: tensors.pop("model.layers.3.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"model.layers.3.mlp.up_proj.weight is missing"):
        load_params(copy, config, mesh, "float32", layers=2)


def test_a_checkpoint_saved_without_the_head_leaves_its_prefix_away(tmp_path):
    save_tiny(tmp_path / "whole", "llama", tie_word_embeddings=True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole").base_model.save_pretrained(tmp_path / "body")
    assert not {*load_file(tmp_path / "body/model.safetensors")} & {*load_file(tmp_path / "whole/model.safetensors")}
    jax.tree.map(np.testing.assert_array_equal, *(load(tmp_path / name)[1] for name in ("whole", "body")))


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 4, 2)])
def test_every_device_holds_its_shard_only(tiny, shape):
    """In bfloat16, which are the file's values rounded."""
    params, exact = load(tiny, "bfloat16", mesh_of(*shape))[1], load(tiny)[1]
    for name, value in params.items():
        np.testing.assert_array_equal(value, np.asarray(exact[name]).astype(ml_dtypes.bfloat16))
    for name, split in {"embed_VxD": 384, "layers.gate_DxF": 96, "layers.down_FxD": 96, "layers.q_DxHxK": 4}.items():
        part = shape[2] if split % shape[2] == 0 else 1
        shards = params[name].addressable_shards
        assert len(shards) == np.prod(shape)
        assert {shard.data.size for shard in shards} == {params[name].size // part}


def test_shards_are_read_layer_by_layer(tiny, monkeypatch):
    """So the host holds no more than a shard of one layer for each thread that reads; the values are the same."""
    config, exact = load(tiny)
    sizes = []
    make = weights._aligned
    monkeypatch.setattr(weights, "_aligned", lambda shape, dtype: sizes.append(math.prod(shape)) or make(shape, dtype))
    monkeypatch.setattr(weights, "_PART_BYTES", 1)
    for axes in ((1, 1, 8), (1, 2, 4)):
        sizes.clear()
        largest = []
        for name, value in load(tiny, mesh=mesh_of(*axes))[1].items():
            np.testing.assert_array_equal(value, exact[name])
            shard = value.addressable_shards[0].data.size
            largest.append(shard // config.n_layers if name.startswith("layers.") else shard)
        assert max(sizes) == max(largest) and len(sizes) > 100


def test_few_parts_wait_to_be_taken():
    started = []
    with ThreadPoolExecutor(2) as pool:
        reads = (functools.partial(lambda i: started.append(i) or i, i) for i in range(100))
        for taken, part in enumerate(weights._run_ahead(pool, reads)):
            assert part == taken and len(started) <= taken + 1 + weights._READERS


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(copy, value):
    def spoil(tensors):
        for name in ("model.layers.2.mlp.up_proj.weight", "model.norm.weight"):
            tensors[name].flat[-1] = value

    change(copy, lambda tensors: tensors["model.norm.weight"].fill(3.4e38))
    load(copy)
    with pytest.raises(UserError, match="hold NaN or infinity in bfloat16: final_norm_D"):  # beyond its range
        load(copy, "bfloat16")
    change(copy, spoil)
    message = "hold NaN or infinity in float32: model.layers.2.mlp.up_proj.weight, model.norm.weight;"
    with pytest.raises(UserError, match=message):
        load(copy, mesh=mesh_of(1, 2, 4))
    with pytest.raises(UserError, match=message):
        load_torch_model(ModelSource("copy", "", copy, ""))
