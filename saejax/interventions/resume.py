"""Resuming: finished batches are kept on disk every few seconds, and read when a killed call is made again.

The batches of a call follow from its edits and prompts alone, so a resumed call runs the programs that it would have
run without the interruption: its figures are the same to the bit.
"""

import hashlib
import io
import math
import time
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from saejax.files import whole_file
from saejax.parallel.collectives import from_first_process, is_first_process

_EVERY = 5.0  # seconds between writes: the work that a kill may cost


class Chunks:
    """The values of a call's batches, in order; a chunk is a file of consecutive ones.

    The first process reads and writes the files and broadcasts what it has read, so that all processes run the same
    batches. Batches behind a missing or damaged file are run again. As a context manager it writes what has been
    measured when it is left, by an exception too.

    Args:
      folder: for the files; None: nothing is kept. All calls in a folder must have the same model, dictionary, prompts
        and replacement.
      shapes: shapes of each batch's values.
      plan: what each batch computes: files of a call with another plan are not read.

    Attributes:
      values: float32, of the measured batches; at first those of an earlier call.
    """

    def __init__(self, folder: Path | None, shapes: Sequence[tuple[int, ...]], plan: Iterable[np.ndarray]):
        self.values: list[np.ndarray] = []
        self._folder, self._shapes, self._mark = folder, shapes, digest(plan) if folder else ""
        if folder:
            kept = self._read() if is_first_process() else []
            shapes = shapes[: int(from_first_process(np.int32(len(kept))))]
            flat = _flat(kept) if is_first_process() else np.zeros(sum(map(math.prod, shapes)), np.float32)
            if shapes:
                self.values = _unflat(from_first_process(flat.view(np.int32)).view(np.float32), shapes)
        self._kept, self._since = len(self.values), time.monotonic()

    def add(self, values: np.ndarray) -> None:
        """Add the next batch's values, and write a chunk if the last one is some seconds old."""
        self.values.append(values)
        if time.monotonic() - self._since >= _EVERY:
            self._write()

    def __enter__(self) -> "Chunks":
        return self

    def __exit__(self, *_: object) -> None:
        self._write()

    def _write(self) -> None:
        if self._folder and len(self.values) > self._kept and is_first_process():
            self._folder.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()  # numpy writing to a file itself loses the error number of a full disk
            np.savez(buffer, values=_flat(self.values[self._kept :]))
            with whole_file(self._file(self._kept)) as unfinished:
                unfinished.write_bytes(buffer.getbuffer())
        self._kept, self._since = len(self.values), time.monotonic()

    def _read(self) -> list[np.ndarray]:
        values: list[np.ndarray] = []
        while len(values) < len(self._shapes):
            flat = _load(self._file(len(values)))
            left = self._shapes[len(values) :]
            count = int(np.searchsorted(np.cumsum([math.prod(shape) for shape in left]), len(flat))) + 1
            if not len(flat) or sum(map(math.prod, left[:count])) != len(flat):
                break
            values += _unflat(flat, left[:count])
        return values

    def _file(self, first: int) -> Path:
        assert self._folder
        return self._folder / f"{self._mark}-{first}.npz"


def digest(arrays: Iterable[np.ndarray]) -> str:
    """Return a hash, 16 hexadecimal digits, of arrays with their types and shapes."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.dtype.str}{array.shape}".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()[:16]


def _load(path: Path) -> np.ndarray:
    """Return the values in a file; none if it is missing or damaged (a zip file holds checksums)."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return np.asarray(arrays["values"], np.float32)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return np.zeros(0, np.float32)


def _flat(values: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.float32), *(array.reshape(-1) for array in values)])


def _unflat(flat: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    parts = np.split(flat, np.cumsum([math.prod(shape) for shape in shapes])[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
