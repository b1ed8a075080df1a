"""The safetensors files of a checkpoint: which tensors there are, and where each lies. No values are read here."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from saejax.errors import UserError

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_INDEX = "model.safetensors.index.json"
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a safetensors file: ``offset`` bytes from its start, row-major."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)

    def map(self) -> np.ndarray:
        """The values, mapped from the file: only what is used is read, and all memory goes with the array."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)

    def equals(self, other: "Tensor") -> bool:
        """Whether the other has the same dtype, shape and bits; compared piece by piece."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        with open(self.file, "rb") as a, open(other.file, "rb") as b:
            a.seek(self.offset)
            b.seek(other.offset)
            sizes = (min(_CHUNK, self.nbytes - start) for start in range(0, self.nbytes, _CHUNK))
            return all(a.read(size) == b.read(size) for size in sizes)


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint in a folder, in one file or in several that an index names.

    Raises:
      UserError: a file is missing, truncated or in another format; a tensor is in two files; or the index names a file
        that does not hold the tensor. All such tensors are listed.
    """
    index = _read_index(folder)
    headers = {file.name: read_header(file) for file in safetensors_files(folder)}
    tensors: dict[str, Tensor] = {}
    problems = []
    for file, found in headers.items():
        problems += [f"{name} is both in {tensors[name].file.name} and {file}" for name in found if name in tensors]
        tensors |= found
    problems += [
        f"{name} is not in {file}, where {_INDEX} puts it" for name, file in index.items() if name not in headers[file]
    ]
    if problems:
        raise UserError(f"the checkpoint in {folder} is inconsistent: {'; '.join(problems)}: fetch the model again")
    return tensors


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: 8 bytes of header length, a JSON header, the values, without gaps.

    Raises:
      UserError: the file is truncated or not in that format.
    """
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, 100_000_000):
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        tensors = {name: _tensor(file, 8 + length, name, entry) for name, entry in header.items()}
        end = 8 + length
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
            if tensor.offset != end:
                raise ValueError(f"tensors overlap or leave a gap at byte {end}")
            end += tensor.nbytes
        if end != size:
            raise ValueError(f"it should have {end} bytes and has {size}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is truncated or not a safetensors file ({error}): fetch the model again") from None
    return tensors


def _tensor(file: Path, start: int, name: str, entry: Mapping) -> Tensor:
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] not in _DTYPES:
        raise UserError(
            f"{file}: tensor {name} has dtype {entry['dtype']}, expected one of {', '.join(_DTYPES)}: "
            "use an unquantised model"
        )
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    if min(shape, default=0) < 0 or last - first != dtype.itemsize * math.prod(shape):
        raise ValueError(f"tensor {name} has {last - first} bytes for the shape {list(shape)}")
    return Tensor(file, start + first, dtype, shape)


def safetensors_files(folder: Path) -> list[Path]:
    """The files of a checkpoint: those that its index names, or ``model.safetensors``.

    Raises:
      UserError: there are none, or one is missing.
    """
    names = sorted(set(_read_index(folder).values())) or ["model.safetensors"]
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise UserError(
            f"{folder} has no {', '.join(missing)}: expected a folder with config.json and safetensors weights"
        )
    return [folder / name for name in names]


def _read_index(folder: Path) -> dict[str, str]:
    """The file of every tensor; {} where there is no index."""
    file = folder / _INDEX
    if not file.exists():
        return {}
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)["weight_map"]
        if not weight_map or any(Path(name).name != name for name in weight_map.values()):
            raise ValueError("its weight_map has to name files beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged or not an index of safetensors files ({error}): fetch it again") from None
    return weight_map


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names may not repeat."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is listed twice")
        found[name] = value
    return found
