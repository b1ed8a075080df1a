"""What a killed ablation had measured: kept on disk a few seconds' work at a time, and read when it goes on.

The batches of a call follow from its sets and prompts alone, so that what is run after an interruption are the programs
that would have been run without it: the figures are the same to the bit, wherever it was killed.
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

_EVERY = 5.0  # seconds of work that a kill may cost


class Chunks:
    """The values of a call's batches, in their order; a chunk is a file of some that follow each other.

    The first process reads and writes the files and tells the others what it found, so that all of them run the same
    batches. A file that is missing or damaged ends what is found: what follows is measured anew.

    Used as a context, it keeps what has been measured when it is left, by an exception too.

    Args:
      folder: where; None: nothing is kept. All calls in a folder must be on the same model, dictionary, prompts and
        replacement.
      shapes: of each batch's values.
      plan: says what each batch computes: files of a call with another one are not read.

    Attributes:
      values: fp32, of the batches that are measured; at first of those that were before.
    """

    def __init__(self, folder: Path | None, shapes: Sequence[tuple[int, ...]], plan: Iterable[np.ndarray]):
        self.values: list[np.ndarray] = []
        self._folder, self._shapes, self._mark = folder, shapes, digest(plan) if folder else ""
        if folder:
            found = self._read() if is_first_process() else []
            shapes = shapes[: int(from_first_process(np.int32(len(found))))]
            flat = _flat(found) if is_first_process() else np.zeros(sum(map(math.prod, shapes)), np.float32)
            if shapes:
                self.values = _unflat(from_first_process(flat.view(np.int32)).view(np.float32), shapes)
        self._kept, self._since = len(self.values), time.monotonic()

    def add(self, values: np.ndarray) -> None:
        """Takes the next batch's values, and writes a chunk if the last one is some time ago."""
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
            with whole_file(self._file(self._kept)) as beside:
                beside.write_bytes(buffer.getbuffer())
        self._kept, self._since = len(self.values), time.monotonic()

    def _read(self) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        while len(found) < len(self._shapes):
            flat = _load(self._file(len(found)))
            left = self._shapes[len(found) :]
            count = int(np.searchsorted(np.cumsum([math.prod(shape) for shape in left]), len(flat))) + 1
            if not len(flat) or sum(map(math.prod, left[:count])) != len(flat):
                break
            found += _unflat(flat, left[:count])
        return found

    def _file(self, first: int) -> Path:
        assert self._folder
        return self._folder / f"{self._mark}-{first}.npz"


def digest(arrays: Iterable[np.ndarray]) -> str:
    """A hash, 16 hexadecimal digits, of arrays with their types and shapes."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.dtype.str}{array.shape}".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()[:16]


def _load(path: Path) -> np.ndarray:
    """The values in a file, [0] if it is missing or damaged: a zip file holds checksums."""
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
