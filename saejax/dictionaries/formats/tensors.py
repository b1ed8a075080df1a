"""Safetensors files of dictionaries: checked by name and shape, read into what a ``Dictionary`` takes, written whole.

Arrays of 16 bits are widened to float32, which loses nothing; float32 and float64 are kept. Written is the dtype of the
file that a dictionary came from where that loses nothing, else the arrays' own.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from saejax.dictionaries.formats import origin
from saejax.dictionaries.modules import Dictionary, DictionaryConfig, parameter_table
from saejax.errors import UserError
from saejax.files import WRITING
from saejax.models.checkpoint import Tensor, read_header

Shapes = Mapping[str, tuple[int, ...]]
_STAMP = "saejax_stamp"  # key of a file's metadata
_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32, "float64": np.float64}


def plain_names(config: DictionaryConfig) -> dict[str, str]:
    """A dictionary's names of arrays by the names that other tools give them: "W_enc" for "W_enc_DxF"."""
    return {name.rpartition("_")[0]: name for name in parameter_table(config)}


def find(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, of which nothing is read yet.

    Raises:
      UserError: it is missing, truncated, or holds tensors of another dtype than floats of 16 to 64 bits.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing: fetch the dictionary again")
    return read_header(file)


def check(file: Path, found: Mapping[str, Tensor], shapes: Shapes) -> None:
    """Refuses a file whose tensors are not these, naming all that are missing, unknown or of another shape."""
    problems = [f"{name} is missing" for name in shapes if name not in found]
    problems += [f"{name} is not known" for name in found if name not in shapes]
    problems += [
        f"{name} has the shape {found[name].shape}, expected {shape}"
        for name, shape in shapes.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        raise UserError(f"{file} does not fit its description: {'; '.join(problems)}")


def widened(tensor: Tensor) -> np.ndarray:
    """The values in float32, or float64 if they are that in the file.

    Raises:
      UserError: they are in float64, which JAX is not set to keep.
    """
    dtype = np.float64 if tensor.dtype == np.float64 else np.float32
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise UserError(f"{tensor.file} is in float64, which JAX reads only with JAX_ENABLE_X64=1: set it")
    return np.array(tensor.map(), dtype)


def host_arrays(dictionary: Dictionary) -> tuple[dict[str, np.ndarray], str]:
    """A dictionary's arrays on the host in the dtype in which to write them, and its name."""
    arrays = {name: np.asarray(array) for name, array in dictionary.arrays.items()}
    dtype = arrays["W_enc_DxF"].dtype
    from_file = origin.dtype_of(dictionary.config)
    if from_file in _DTYPES:
        narrow = {name: array.astype(_DTYPES[from_file]) for name, array in arrays.items()}
        if all(np.array_equal(narrow[name].astype(dtype), array) for name, array in arrays.items()):
            return narrow, from_file
    return arrays, dtype.name


def write(file: Path, arrays: Mapping[str, np.ndarray], stamp: str = "") -> None:
    """Writes tensors; what lies in another order in memory is written row by row.

    Args:
      file: where to.
      arrays: by name.
      stamp: says which files belong together; see ``stamp_of``.
    """
    named = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(named, file, metadata={_STAMP: stamp} if stamp else None)


def stamp_of(file: Path) -> str:
    """The stamp of a file that ``find`` has looked at; "": it has none."""
    with safe_open(file, "numpy") as opened:
        return (opened.metadata() or {}).get(_STAMP, "")


@contextlib.contextmanager
def whole_folder(folder: Path, description: str, *others: str) -> Iterator[Path]:
    """Yields a folder to write to; its files appear in ``folder`` if the block succeeds, the description last.

    Args:
      folder: made if missing.
      description: name of the file without which nobody reads the folder.
      others: patterns of further files that must not be there yet.

    Raises:
      UserError: the folder holds such files already.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder")
    present = [path.name for pattern in (description, *others) for path in sorted(folder.glob(pattern))]
    if present:
        raise UserError(f"{folder} already holds {present[0]}: delete it or name another folder")
    beside = folder / f".{WRITING}{os.getpid()}"
    try:
        beside.mkdir(parents=True)
        yield beside
        for path in sorted(beside.iterdir(), key=lambda path: (path.name == description, path.name)):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
