"""Files of ``torch.save``, read without running what they hold."""

import collections
import pathlib

import ml_dtypes
import numpy as np
import pytest
import torch

from saejax.errors import UserError
from saejax.models.checkpoint import read_pickled_tensors


@pytest.mark.parametrize("zipped", [True, False])
def test_a_nest_of_tensors_keeps_names_values_and_dtypes(tmp_path, zipped):
    file = tmp_path / "ae.pt"
    weight = torch.arange(6.0).reshape(2, 3)
    nest = collections.OrderedDict(
        a=weight.T, half=weight.half(), brain=weight.bfloat16(), b=[torch.nn.Parameter(weight)], mask=weight > 2, k=5
    )
    torch.save(nest, file, _use_new_zipfile_serialization=zipped)
    read = read_pickled_tensors(file)
    assert type(read) is dict and read["k"] == 5 and list(read) == list(nest)
    assert read["brain"].dtype == ml_dtypes.bfloat16 and read["half"].dtype == np.float16
    np.testing.assert_array_equal(read["brain"].astype(np.float32), weight)
    np.testing.assert_array_equal(read["a"], weight.T)
    np.testing.assert_array_equal(read["b"][0], weight)
    np.testing.assert_array_equal(read["mask"], weight > 2)


def test_tied_tensors_share_memory(tmp_path):
    weight = torch.ones(4, 4)
    torch.save({"embed": weight, "head": weight}, tmp_path / "model.bin")
    read = read_pickled_tensors(tmp_path / "model.bin")
    assert np.shares_memory(read["embed"], read["head"])


class Dangerous:
    """An object whose unpickling makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_objects_are_refused_and_not_run(tmp_path):
    torch.save({"x": Dangerous(tmp_path / "run")}, tmp_path / "ae.pt")
    with pytest.raises(UserError, match=r"ae\.pt holds objects other than tensors"):
        read_pickled_tensors(tmp_path / "ae.pt")
    assert not (tmp_path / "run").exists()


def test_damaged_files_are_named(tmp_path):
    file = tmp_path / "ae.pt"
    torch.save({"x": torch.ones(100)}, file)
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(UserError, match=r"ae\.pt is truncated"):
        read_pickled_tensors(file)
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"ae\.pt is truncated"):
        read_pickled_tensors(file)
    with pytest.raises(UserError, match=r"none\.pt is missing"):
        read_pickled_tensors(tmp_path / "none.pt")
