"""Weight tables: names of old and new files, tensors that hold several parameters."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import save_tiny

from saejax.errors import UserError
from saejax.files import read_json
from saejax.models.families import read_config
from saejax.models.weights import load_params


def _bare(tensors):
    """As the hub's GPT-2 files are: the model without its head, with the masks that attention kept as a buffer."""
    tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    masks = {f"h.{layer}.attn.{name}": np.ones(1, np.uint8) for layer in range(3) for name in ("bias", "masked_bias")}
    return tensors | masks


def _with_buffers(tensors):
    """As the hub's Pythia files are."""
    names = ("bias", "masked_bias", "rotary_emb.inv_freq")
    buffers = {f"gpt_neox.layers.{i}.attention.{name}": np.ones(1, np.bool_) for i in range(3) for name in names}
    return tensors | buffers


def _renamed(tensors):
    """As later versions of transformers name the parts of Gemma 3."""
    names = {"language_model.model.": "model.language_model.", "vision_tower.": "model.vision_tower."}
    for old, new in names.items():
        tensors = {new + name.removeprefix(old) if name.startswith(old) else name: v for name, v in tensors.items()}
    return tensors


@pytest.mark.parametrize("family, change", [("gpt2", _bare), ("gpt_neox", _with_buffers), ("gemma3", _renamed)])
def test_weights_under_other_names_and_buffers_of_old_files(family, change, tmp_path, one_device):
    save_tiny(tmp_path, family)
    config = read_config(read_json(tmp_path / "config.json"), "config.json")
    file = tmp_path / "model.safetensors"
    before = load_params(tmp_path, config, one_device, "float32")
    save_file(change(load_file(file)), file)
    after = load_params(tmp_path, config, one_device, "float32")
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


def test_parts_of_one_tensor_are_named_once(tmp_path, one_device):
    save_tiny(tmp_path, "gpt2")
    config = read_config(read_json(tmp_path / "config.json"), "config.json")
    file, name = tmp_path / "model.safetensors", "transformer.h.1.attn.c_attn.weight"
    tensors = load_file(file)
    cut = np.ascontiguousarray(tensors[name][:, 1:])
    for change, message in (({name: cut}, r"has shape \[40, 119\], expected \[40, 120\]"), ({}, "is missing")):
        save_file({key: value for key, value in tensors.items() if key != name} | change, file)
        with pytest.raises(UserError, match=message) as caught:
            load_params(tmp_path, config, one_device, "float32")
        assert str(caught.value).count(name) == 1
