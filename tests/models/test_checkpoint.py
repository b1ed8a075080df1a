"""Headers and indices of safetensors checkpoints, damaged in every way."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from saejax.errors import UserError
from saejax.models.checkpoint import read_checkpoint, read_header, safetensors_files

INDEX = "model.safetensors.index.json"
A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(4, dtype=np.float32)


@pytest.fixture
def folder(tmp_path):
    """Two files: a in the first; b and c in the second."""
    save_file(dict(a=A), tmp_path / "one.safetensors")
    save_file(dict(b=B, c=B), tmp_path / "two.safetensors")
    write_index(tmp_path, dict(a="one.safetensors", b="two.safetensors", c="two.safetensors"))
    return tmp_path


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps(dict(metadata={}, weight_map=weight_map)))


def write(file, header, values=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + values)


def entry(first, last, shape, dtype="F32"):
    return dict(dtype=dtype, shape=shape, data_offsets=[first, last])


def test_tensors_of_several_files(folder):
    tensors = read_checkpoint(folder)
    assert sorted(tensors) == ["a", "b", "c"]
    np.testing.assert_array_equal(tensors["a"].map(), A)
    assert tensors["a"].nbytes == 24 and tensors["a"].file.name == "one.safetensors"
    assert tensors["b"].equals(tensors["c"]) and not tensors["a"].equals(tensors["b"])


def test_equal_tensors_are_compared_to_their_last_byte(tmp_path):
    values = np.zeros(700_000, np.float32)  # more than two pieces
    other = values.copy()
    other[-1] = 1
    save_file(dict(a=values, b=values.copy(), c=other), tmp_path / "model.safetensors")
    tensors = read_checkpoint(tmp_path)
    assert tensors["a"].equals(tensors["b"]) and not tensors["a"].equals(tensors["c"])


def test_what_the_index_says_has_to_be_there(folder):
    save_file(dict(b=B), folder / "two.safetensors")
    save_file(dict(a=A, b=B), folder / "one.safetensors")
    with pytest.raises(UserError) as error:
        read_checkpoint(folder)
    assert str(error.value) == (
        f"the checkpoint in {folder} is inconsistent: b is both in one.safetensors and two.safetensors; "
        f"c is not in two.safetensors, where {INDEX} puts it: fetch the model again"
    )


def test_a_file_of_the_index_is_missing(folder):
    (folder / "one.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no one.safetensors: expected a folder with"):
        safetensors_files(folder)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "has to name files"),
        ('{"weight_map": {"a": 3}}', "is damaged"),
        ('{"weight_map": {"a": "../one.safetensors"}}', "has to name files beside it"),
        ('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "a is listed twice"),
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
    with pytest.raises(UserError, match=r"two.safetensors is truncated or not a safetensors file .*: fetch the model"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "header, values, message",
    [
        (b"not json at all.", b"", "Expecting value"),
        (b"[]", b"", "truncated or not"),
        (b'{"x": 1}', b"", "truncated or not"),
        (dict(x=dict(dtype="F32", shape=[2])), bytes(8), "data_offsets"),
        (dict(x=entry(0, 8, [3])), bytes(8), r"x has 8 bytes for the shape \[3\]"),
        (dict(x=entry(0, 8, [-1, -2])), bytes(8), "x has 8 bytes"),
        (dict(x=entry(0, 8, [2]), y=entry(4, 12, [2])), bytes(12), "overlap"),
        (dict(x=entry(0, 8, [2]), y=entry(12, 20, [2])), bytes(20), "leave a gap at byte"),
        (dict(x=entry(-8, 0, [2])), bytes(8), "overlap"),
        (dict(x=entry(0, 8, [2])), bytes(9), "should have .* bytes and has"),
        (b'{"x": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "x": {}}', bytes(4), "x is listed twice"),
        (dict(x=entry(0, 4, [4], "I8")), bytes(4), "dtype I8, expected one of F64.*: use an unquantised model"),
    ],
)
def test_damaged_headers(tmp_path, header, values, message):
    write(tmp_path / "model.safetensors", header, values)
    with pytest.raises(UserError, match=message):
        read_header(tmp_path / "model.safetensors")


def test_other_bytes(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match="the header is longer than the file"):
        read_checkpoint(tmp_path)


def test_an_empty_tensor_and_metadata(tmp_path):
    write(tmp_path / "model.safetensors", {"__metadata__": dict(format="pt"), "x": entry(0, 0, [0, 3])})
    assert read_checkpoint(tmp_path)["x"].map().shape == (0, 3)
