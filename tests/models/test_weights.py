"""Reading safetensors: values, shards, shardings, and checkpoints that do not fit."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from safetensors.numpy import load_file, save_file
from tiny_models import save_tiny, save_tiny_llama

from saejax.errors import UserError
from saejax.files import read_json
from saejax.models.checkpoint import weight_files
from saejax.models.families import read_config
from saejax.models.parameters import parameter_table
from saejax.models.source import ModelSource, load_torch_model
from saejax.models.weights import load_params, untie_stored_head
from saejax.parallel.mesh import AXES


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
    assert len(weight_files(tmp_path)) > 3
    config, mesh = config_of(tiny), mesh_of(1, 1, 1)
    whole, parts = (load_params(folder, config, mesh, "float32") for folder in (tiny, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    half = load_params(tmp_path, config, mesh, "bfloat16")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a).astype(ml_dtypes.bfloat16), b), whole, half)

    weight_files(tmp_path)[1].unlink()
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
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((96, 64), np.uint8)
        tensors["model.layers.4.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)  # not used
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.int64)

    change(copy, damage)
    with pytest.raises(UserError) as error:
        load_params(copy, config_of(copy), mesh_of(1, 1, 1), "float32")
    assert str(error.value).endswith(
        "do not fit its config.json: model.norm.weight has shape [63], expected [64]; "
        "model.layers.1.mlp.up_proj.weight is missing; model.layers.2.mlp.up_proj.weight has dtype U8, expected one of "
        "F64, F32, F16, BF16: use unquantised weights"
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


def test_a_tied_head_that_is_stored_with_other_values_is_used_as_it_is_stored(copy):
    from transformers import AutoModelForCausalLM

    config = json.loads((copy / "config.json").read_text()) | dict(tie_word_embeddings=True)
    (copy / "config.json").write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_pretrained(copy)
    config = untie_stored_head(copy, config_of(copy))
    params = load_params(copy, config, mesh_of(1, 1, 1), "float32")
    assert not config.tied
    np.testing.assert_array_equal(params["unembed_DxV"], theirs.lm_head.weight.detach().T)
    change(copy, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}))
    assert untie_stored_head(copy, config_of(copy)).tied
    change(copy, lambda tensors: tensors.pop("lm_head.weight"))
    assert untie_stored_head(copy, config_of(copy)).tied


def test_a_tied_embedding_may_be_stored_as_the_head(copy):
    from transformers import AutoModelForCausalLM

    config = json.loads((copy / "config.json").read_text()) | dict(tie_word_embeddings=True)
    (copy / "config.json").write_text(json.dumps(config))
    change(copy, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    params = load_params(copy, untie_stored_head(copy, config_of(copy)), mesh_of(1, 1, 1), "float32")
    theirs = AutoModelForCausalLM.from_pretrained(copy).get_input_embeddings().weight.detach()
    np.testing.assert_array_equal(params["embed_VxD"], theirs)


def test_the_first_layers_alone(tiny):
    config, mesh = config_of(tiny), mesh_of(1, 1, 2)
    whole, part = (load_params(tiny, config, mesh, "float32", layers) for layers in (None, 3))
    assert whole.keys() == part.keys()
    for name, value in part.items():
        np.testing.assert_array_equal(value, whole[name][:3] if name.startswith("layers.") else whole[name])
        assert value.sharding == whole[name].sharding


def test_the_first_layers_of_a_checkpoint_that_lacks_a_later_one(copy):
    change(copy, lambda tensors: tensors.pop("model.layers.3.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"model.layers.3.mlp.up_proj.weight is missing"):
        load_params(copy, config_of(copy), mesh_of(1, 1, 1), "float32", layers=2)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_checkpoint_saved_without_the_head_leaves_its_prefix_away(tmp_path, family):
    from transformers import AutoModelForCausalLM

    save_tiny(tmp_path / "whole", family, tie_word_embeddings=True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole").base_model.save_pretrained(tmp_path / "body")
    assert not set(load_file(tmp_path / "body/model.safetensors")) & set(
        load_file(tmp_path / "whole/model.safetensors")
    )
    whole, body = (
        load_params(folder, config_of(folder), mesh_of(1, 1, 1), "float32")
        for folder in (tmp_path / "whole", tmp_path / "body")
    )
    jax.tree.map(np.testing.assert_array_equal, whole, body)


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 4, 2)])
def test_every_device_holds_its_shard_only(tiny, shape):
    params = load_params(tiny, config_of(tiny), mesh_of(*shape), "bfloat16")
    on_one = load_params(tiny, config_of(tiny), mesh_of(1, 1, 1), "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, params, on_one)
    model = shape[2]
    for name, split in {"embed_VxD": 384, "layers.gate_DxF": 96, "layers.down_FxD": 96, "layers.q_DxHxK": 4}.items():
        part = model if split % model == 0 else 1
        shards = params[name].addressable_shards
        assert len(shards) == np.prod(shape)
        assert {shard.data.size for shard in shards} == {params[name].size // part}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(copy, value):
    def spoil(tensors):
        for name in ("model.layers.2.mlp.up_proj.weight", "model.norm.weight"):
            tensors[name].flat[-1] = value

    change(copy, spoil)
    message = "hold NaN or infinity in float32: model.layers.2.mlp.up_proj.weight, model.norm.weight;"
    with pytest.raises(UserError, match=message):
        load_params(copy, config_of(copy), mesh_of(1, 2, 4), "float32")
    with pytest.raises(UserError, match=message):
        load_torch_model(ModelSource("copy", "", copy, ""))


def test_values_beyond_the_range_of_a_dtype_are_refused(copy):
    change(copy, lambda tensors: tensors["model.norm.weight"].fill(3.4e38))
    load_params(copy, config_of(copy), mesh_of(1, 1, 1), "float32")
    with pytest.raises(UserError, match="hold NaN or infinity in bfloat16: final_norm_D"):
        load_params(copy, config_of(copy), mesh_of(1, 1, 1), "bfloat16")
