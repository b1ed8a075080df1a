"""Which weight files of a checkpoint are read, files of ``torch.save``, and files that are damaged."""

import collections
import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from saejax.errors import UserError
from saejax.models.checkpoint import read_checkpoint, read_header, read_pickled_tensors, weight_files

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
    """A whole file before an index, safetensors before pickled ones; an index decides between files of one tensor."""
    save_file(dict(a=A, b=0 * B), folder / "one.safetensors")
    np.testing.assert_array_equal(values(folder)["b"], B)
    write_index(folder, dict(a="one.safetensors", b="one.safetensors", c="two.safetensors"))
    np.testing.assert_array_equal(values(folder)["b"], 0 * B)
    state = dict(d=torch.ones(2), mask=torch.ones(2, dtype=torch.bool))
    torch.save(state, folder / "part-1.bin")
    write_index(folder, dict(d="part-1.bin"), "pytorch_model.bin.index.json")
    tensors = read_checkpoint(folder)
    assert sorted(tensors) == ["a", "b", "c"]
    assert tensors["a"].nbytes == 24 and tensors["a"].file.name == "one.safetensors"
    (folder / INDEX).unlink()
    assert weight_files(folder) == [folder / "part-1.bin"] and sorted(values(folder)) == ["d"]
    nested = dict(model=state | dict(e=torch.ones(3, dtype=torch.bfloat16)), step=3)  # as training saves it
    torch.save(nested, folder / "pytorch_model.bin")
    assert sorted(values(folder)) == ["d", "e"] and values(folder)["e"].dtype == ml_dtypes.bfloat16
    assert sorted(read_checkpoint(folder)) == ["d", "e", "mask"]
    save_file(dict(a=A), folder / "model.safetensors")
    write_index(folder, dict(a="shard-that-is-gone.safetensors"))
    assert weight_files(folder) == [folder / "model.safetensors"] and sorted(values(folder)) == ["a"]


def test_what_a_folder_without_weights_holds_is_said(folder):
    """A shard that was not fetched, an index that was not, and nothing at all."""
    (folder / "one.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no one.safetensors, which model.safetensors.index.json names: fetch"):
        weight_files(folder)
    for name in (INDEX, "two.safetensors"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="has no weights: expected model.safetensors, or its shards with an index"):
        weight_files(folder)
    save_file(dict(a=A), folder / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="model-00001-of-00002.safetensors is a shard, and model.safetensors.index"):
        weight_files(folder)


def test_rows_columns_and_numbers_of_a_tensor(tmp_path):
    """Reading gives a copy in float32, whatever the file's dtype; the file itself stays mapped."""
    wide = np.arange(12, dtype=ml_dtypes.bfloat16).reshape(2, 3, 2)
    save_file(dict(wide=wide, count=np.array([3, 4])), tmp_path / "model.safetensors")
    tensors = read_checkpoint(tmp_path)
    assert tensors["wide"].read().dtype == np.float32 and tensors["wide"].read().flags.writeable
    np.testing.assert_array_equal(tensors["wide"].rows(np.array([1, 0])), wide[::-1])
    np.testing.assert_array_equal(tensors["wide"].column(2).read(), wide[:, 2])
    assert tensors["wide"].column(2).shape == (2, 2) and tensors["count"].numbers() == [3, 4]


def test_weights_with_an_adapter_beside_them_are_refused(folder):
    """Older files of adapters have the base model's own matrices under their own names."""
    save_file({"a": A, "q_proj.lora_A.default.weight": B}, folder / "one.safetensors")
    with pytest.raises(UserError, match=r"with an adapter beside them \(q_proj.lora_A.default.weight\): merge it"):
        read_checkpoint(folder)


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


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 548105171\n"


def test_truncated_files_and_other_bytes(folder):
    file = folder / "two.safetensors"
    whole = file.read_bytes()
    for content in (b"", whole[:5], whole[:60], whole[:-1], b"\xff" * 64):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"two.safetensors is truncated or not a safetensors file .*: fetch it"):
            read_checkpoint(folder)
    file.write_bytes(LFS)
    with pytest.raises(UserError, match=r"is a pointer of Git LFS, not the weights: run `git lfs pull`"):
        read_header(file)
    torch.save([torch.ones(2)], folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin holds a list: expected tensors by name"):
        read_header(folder / "pytorch_model.bin")


# --- files of torch.save, read without running what they hold


@pytest.mark.parametrize("zipped", [True, False])
def test_a_nest_of_tensors_keeps_names_values_and_dtypes(tmp_path, zipped):
    file = tmp_path / "ae.pt"
    weight = torch.arange(6.0).reshape(2, 3)
    nest = collections.OrderedDict(a=weight.T, half=weight.half(), brain=weight.bfloat16(), mask=weight > 2, k=5)
    nest |= dict(b=[torch.nn.Parameter(weight)], tied=weight)
    torch.save(nest, file, _use_new_zipfile_serialization=zipped)
    read = read_pickled_tensors(file)
    assert type(read) is dict and read["k"] == 5 and list(read) == list(nest)
    assert read["brain"].dtype == ml_dtypes.bfloat16 and read["half"].dtype == np.float16
    np.testing.assert_array_equal(read["brain"].astype(np.float32), weight)
    np.testing.assert_array_equal(read["a"], weight.T)
    np.testing.assert_array_equal(read["b"][0], weight)
    np.testing.assert_array_equal(read["mask"], weight > 2)
    assert np.shares_memory(read["b"][0], read["tied"])


class Dangerous:
    """An object whose unpickling makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_objects_are_refused_and_not_run_and_damaged_files_are_named(tmp_path):
    file = tmp_path / "ae.pt"
    torch.save({"x": Dangerous(tmp_path / "run")}, file)
    with pytest.raises(UserError, match=r"ae\.pt holds objects other than tensors"):
        read_pickled_tensors(file)
    assert not (tmp_path / "run").exists()
    torch.save({"x": torch.ones(100)}, file)
    for content in (file.read_bytes()[:300], b""):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"ae\.pt is truncated"):
            read_pickled_tensors(file)
    with pytest.raises(UserError, match=r"none\.pt is missing"):
        read_pickled_tensors(tmp_path / "none.pt")
