"""Reading safetensors: values, shards, shardings, and checkpoints that do not fit."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from safetensors.numpy import load_file, save_file
from tiny_models import save_tiny_llama

from saejax.errors import UserError
from saejax.models.decoder import parameter_table
from saejax.models.families import read_config
from saejax.models.weights import load_params, read_header, safetensors_files
from saejax.parallel import AXES
from saejax.workspace import read_json


def config_of(folder):
    return read_config(read_json(folder / "config.json"), "config.json")


def mesh_of(*shape) -> Mesh:
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


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
    config, mesh = config_of(tiny), mesh_of(1, 2, 4)
    params = load_params(tiny, config, mesh, "float32")
    hf = load_file(tiny / "model.safetensors")
    assert {name: value.shape for name, value in params.items()} == {
        name: shape for name, (shape, _) in parameter_table(config).items()
    }
    # 4 heads of 16, 2 key-value heads: head h of layer l is rows 16h to 16h+15 of the torch matrix.
    q, k = params["layers.q_DxHxK"], params["layers.k_DxNxK"]
    np.testing.assert_array_equal(q[2, :, 3], hf["model.layers.2.self_attn.q_proj.weight"][48:64].T)
    np.testing.assert_array_equal(k[3, :, 1], hf["model.layers.3.self_attn.k_proj.weight"][16:32].T)
    np.testing.assert_array_equal(
        params["layers.o_HxKxD"][1, 2], hf["model.layers.1.self_attn.o_proj.weight"][:, 32:48].T
    )
    np.testing.assert_array_equal(params["unembed_DxV"], hf["lm_head.weight"].T)
    np.testing.assert_array_equal(params["layers.up_bias_F"][3], hf["model.layers.3.mlp.up_proj.bias"])
    # "model" has 4 devices: 4 heads and 384 ids are split, 2 key-value heads are not divided by it.
    assert q.addressable_shards[0].data.shape == (4, 64, 1, 16)
    assert params["embed_VxD"].addressable_shards[0].data.shape == (96, 64)
    assert k.addressable_shards[0].data.shape == k.shape


def test_sharded_checkpoint_and_dtypes(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(safetensors_files(tmp_path)) > 3
    config, mesh = config_of(tiny), mesh_of(1, 1, 1)
    whole, parts = (load_params(folder, config, mesh, "float32") for folder in (tiny, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    half = load_params(tmp_path, config, mesh, "bfloat16")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a).astype(ml_dtypes.bfloat16), b), whole, half)

    safetensors_files(tmp_path)[1].unlink()
    with pytest.raises(UserError, match=r"has no model-00002-of-000\d\d.safetensors"):
        load_params(tmp_path, config, mesh, "float32")


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files(copy, kind):
    wanted = load_file(copy / "model.safetensors")["model.norm.weight"].astype(kind)
    change(copy, lambda tensors: tensors.update({name: value.astype(kind) for name, value in tensors.items()}))
    params = load_params(copy, config_of(copy), mesh_of(1, 1, 1), "float32")
    np.testing.assert_array_equal(params["final_norm_D"], wanted.astype(np.float32))


def test_all_mismatches_are_listed_in_one_error(copy):
    def damage(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = np.zeros(63, np.float32)
        tensors["model.layers.4.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)  # harmless

    change(copy, damage)
    with pytest.raises(UserError) as error:
        load_params(copy, config_of(copy), mesh_of(1, 1, 1), "float32")
    assert str(error.value).endswith(
        "do not fit its config.json: model.norm.weight has shape [63], expected [64]; "
        "model.layers.1.mlp.up_proj.weight is missing; model.layers.4.mlp.up_proj.weight is left over"
    )


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("lm_head.weight", "[384, 64]"),
        ("model.layers.3.self_attn.k_proj.weight", "[32, 64]"),
        ("model.layers.3.mlp.down_proj.weight", "[64, 96]"),
        ("model.embed_tokens.weight", "[384, 64]"),
    ],
)
def test_a_transposed_weight_is_a_mismatch(copy, name, wanted):
    change(copy, lambda tensors: tensors.update({name: np.ascontiguousarray(tensors[name].T)}))
    with pytest.raises(UserError) as error:
        load_params(copy, config_of(copy), mesh_of(1, 1, 1), "float32")
    assert f"{name} has shape " in str(error.value) and str(error.value).endswith(f"expected {wanted}")


def test_tied_models_may_repeat_the_embedding_but_not_contradict_it(copy):
    config = json.loads((copy / "config.json").read_text()) | dict(tie_word_embeddings=True)
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_params(copy, config_of(copy), mesh_of(1, 1, 1), "float32")
    change(copy, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}))
    assert "unembed_DxV" not in load_params(copy, config_of(copy), mesh_of(1, 1, 1), "float32")


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_truncated_files(copy, cut):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(UserError, match="truncated or not a safetensors file"):
        load_params(copy, config_of(copy), mesh_of(1, 1, 1), "float32")


def test_not_safetensors(tmp_path):
    for content in (b"\x10" + bytes(7) + b"not json at all.", b"\x02" + bytes(7) + b"[]", b"\xff" * 64):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="truncated or not a safetensors file"):
            read_header(tmp_path / "model.safetensors")
    header = json.dumps({"x": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match="dtype I8"):
        read_header(tmp_path / "model.safetensors")
