"""Which weight files of a checkpoint are read, and files that are damaged."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from saejax.errors import UserError
from saejax.models.checkpoint import read_checkpoint, read_header, weight_files

INDEX = "model.safetensors.index.json"
A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(4, dtype=np.float32)


@pytest.fixture
def folder(tmp_path):
    """Two files: a in the first; b and c in the second."""
    save_file(dict(a=A), tmp_path / "one.safetensors")
    save_file(dict(b=B, c=B), tmp_path / "two.safetensors")
    write_index(tmp_path, dict(a="one.safetensors", b="two.safetensors", c="two.safetensors"))
    return tmp_path


def write_index(folder, weight_map, name=INDEX):
    (folder / name).write_text(json.dumps(dict(metadata={}, weight_map=weight_map)))


def values(folder):
    return {name: tensor.map() for name, tensor in read_checkpoint(folder).items() if not tensor.dtype_problem}


def test_tensors_of_several_files(folder):
    tensors = read_checkpoint(folder)
    assert sorted(tensors) == ["a", "b", "c"]
    np.testing.assert_array_equal(tensors["a"].map(), A)
    assert tensors["a"].nbytes == 24 and tensors["a"].file.name == "one.safetensors"


def test_every_dtype_is_found_at_its_place(tmp_path):
    """Values lie in the file without their names; one offset that is wrong would give others."""
    rng = np.random.default_rng(0)
    kinds = ["float64", "float32", "float16", "bfloat16", "uint8", "bool", "int64", "float8_e4m3fn"]
    arrays = {kind: rng.integers(0, 2, (3, 5)).astype(kind) for kind in kinds}
    arrays |= {"none": np.zeros((0, 3), np.float32), "scalar": np.full((), 7, np.float32)}
    save_file(arrays, tmp_path / "model.safetensors", metadata=dict(format="pt"))
    tensors = read_checkpoint(tmp_path)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {n: a.shape for n, a in arrays.items()}
    unusable = {"uint8", "bool", "int64", "float8_e4m3fn"}
    assert {name for name, tensor in tensors.items() if tensor.dtype_problem} == unusable
    for name, array in values(tmp_path).items():
        assert array.dtype == arrays[name].dtype
        np.testing.assert_array_equal(array, arrays[name])
    with pytest.raises(UserError, match=r"tensor uint8 has dtype U8, expected one of F64.*: use unquantised weights"):
        tensors["uint8"].map()


def test_the_order_of_transformers(folder):
    """A whole file before an index, safetensors before pickled ones; an old index is no obstacle."""
    state = dict(d=torch.ones(2), mask=torch.ones(2, dtype=torch.bool))
    torch.save(state, folder / "part-1.bin")
    write_index(folder, dict(d="part-1.bin"), "pytorch_model.bin.index.json")
    assert sorted(values(folder)) == ["a", "b", "c"]
    (folder / INDEX).unlink()
    assert weight_files(folder) == [folder / "part-1.bin"] and sorted(values(folder)) == ["d"]
    torch.save(state | dict(e=torch.ones(3, dtype=torch.bfloat16)), folder / "pytorch_model.bin")
    assert sorted(values(folder)) == ["d", "e"] and values(folder)["e"].dtype == ml_dtypes.bfloat16
    assert sorted(read_checkpoint(folder)) == ["d", "e", "mask"]
    save_file(dict(a=A), folder / "model.safetensors")
    write_index(folder, dict(a="shard-that-is-gone.safetensors"))
    assert weight_files(folder) == [folder / "model.safetensors"] and sorted(values(folder)) == ["a"]


def test_the_index_decides_between_two_files_of_one_tensor(folder):
    save_file(dict(a=A, b=0 * B), folder / "one.safetensors")
    np.testing.assert_array_equal(values(folder)["b"], B)
    write_index(folder, dict(a="one.safetensors", b="one.safetensors", c="two.safetensors"))
    np.testing.assert_array_equal(values(folder)["b"], 0 * B)


def test_what_a_folder_without_weights_holds_is_said(folder):
    """Shards whose index was not fetched, an adapter, and nothing at all."""
    for name in (INDEX, "one.safetensors", "two.safetensors"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="has no weights: expected model.safetensors, or its shards with an index"):
        weight_files(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="has no weights of its own, but an adapter: merge it into its base model"):
        weight_files(folder)
    save_file(dict(a=A), folder / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="model-00001-of-00002.safetensors is a shard, and model.safetensors.index"):
        weight_files(folder)


def test_tensors_that_a_training_checkpoint_nests(tmp_path):
    torch.save(dict(model=dict(a=torch.ones(2)), step=3), tmp_path / "pytorch_model.bin")
    assert sorted(values(tmp_path)) == ["a"]


def test_rows_columns_and_numbers_of_a_tensor(tmp_path):
    """Reading gives a copy in float32, whatever the file's dtype; the file itself stays mapped."""
    wide = np.arange(12, dtype=ml_dtypes.bfloat16).reshape(2, 3, 2)
    save_file(dict(wide=wide, count=np.array([3, 4])), tmp_path / "model.safetensors")
    tensors = read_checkpoint(tmp_path)
    assert tensors["wide"].read().dtype == np.float32 and tensors["wide"].read().flags.writeable
    np.testing.assert_array_equal(tensors["wide"].rows(np.array([1, 0])), wide[::-1])
    np.testing.assert_array_equal(tensors["wide"].column(2).read(), wide[:, 2])
    assert tensors["wide"].column(2).shape == (2, 2) and tensors["count"].numbers() == [3, 4]


def test_a_file_of_the_index_is_missing(folder):
    (folder / "one.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no one.safetensors, which model.safetensors.index.json names: fetch"):
        weight_files(folder)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "has to name files"),
        ('{"weight_map": {"a": 3}}', "is damaged"),
        ('{"weight_map": {"a": "../one.safetensors"}}', "has to name files of the same folder"),
    ],
)
def test_damaged_indices(folder, text, message):
    (folder / INDEX).write_text(text)
    with pytest.raises(UserError, match=f"{INDEX} is damaged or not an index.*: fetch it again") as error:
        read_checkpoint(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [0, 5, 60, -1])
def test_truncated_files(folder, cut):
    file = folder / "two.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"two.safetensors is truncated or not a safetensors file .*: fetch it again"):
        read_checkpoint(folder)


def test_other_bytes(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match=r"model.safetensors is truncated or not"):
        read_header(file)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 548105171\n")
    with pytest.raises(UserError, match=r"is a pointer of Git LFS, not the weights: run `git lfs pull`"):
        read_header(file)
    torch.save([torch.ones(2)], tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin holds a list: expected tensors by name"):
        read_header(tmp_path / "pytorch_model.bin")
