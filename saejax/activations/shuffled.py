"""Documents in random order on disk, of which a small part at a time is in memory.

Each document goes to one of many *buckets*, drawn at random. At the end the buckets are read one after the other, and
the documents of each are permuted: together a random order of all.
"""

import contextlib
import hashlib
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from saejax.activations.cutter import SPLITS, TextPiece
from saejax.activations.documents import COLUMNS, FILES, ORDER
from saejax.activations.writer import npy_header
from saejax.files import whole_file

_BUCKETS = 128  # of each split; of a bucket only its table is in memory, some 50 bytes for a document
_IN_MEMORY = 2**22  # tokens that wait to be written to their buckets
_TOKEN_BYTES = np.dtype(np.int32).itemsize
_GROUPS = 2**31 - 1


class ShuffledWriter:
    """Writes the files of ``Documents`` in a seeded random order, those of the train split first.

    Args:
      folder: where; what an earlier writer left half-done there goes.
      groups: names of the groups of prompts; other groups are numbered by a hash of their names.
      seed: of the order.
    """

    def __init__(self, folder: Path, groups: Sequence[str], seed: int):
        self._folder, self._spill, self._seed = folder, folder / "buckets", seed
        shutil.rmtree(self._spill, ignore_errors=True)
        self._groups = {group: number for number, group in enumerate(groups)}
        self._drawn = np.random.default_rng([seed, ORDER])
        self._waiting: dict[int, tuple[list[np.ndarray], list[tuple[int, ...]]]] = {}
        self._in_memory = 0
        self.documents, self.tokens = ([0] * len(SPLITS) for _ in range(2))

    def add(self, piece: TextPiece) -> None:
        """Takes a document."""
        bucket = piece.split * _BUCKETS + int(self._drawn.integers(_BUCKETS))
        ids, rows = self._waiting.setdefault(bucket, ([], []))
        ids.append(piece.ids_T)
        rows.append((len(piece.ids_T), piece.split, piece.kind, self._number(piece.group), piece.source, piece.start))
        self.documents[piece.split] += 1
        self.tokens[piece.split] += len(piece.ids_T)
        self._in_memory += len(piece.ids_T) + len(rows[-1])
        if self._in_memory > _IN_MEMORY:
            self._flush()

    def finish(self) -> dict[str, str]:
        """Writes the files; gives the SHA-256 of each by its name."""
        self._flush()
        shapes = ((sum(self.tokens),), (sum(self.documents) + 1,), (sum(self.documents), len(COLUMNS)))
        with contextlib.ExitStack() as stack:
            files = []
            for name, shape, dtype in zip(FILES, shapes, (np.int32, np.int64, np.int32), strict=True):
                beside = stack.enter_context(whole_file(self._folder / name))
                files.append(_Hashed(stack.enter_context(open(beside, "wb"))))
                files[-1].write(npy_header(shape, np.dtype(dtype)))
            self._write(*files)
        shutil.rmtree(self._spill)
        return {name: file.hash.hexdigest() for name, file in zip(FILES, files, strict=True)}

    def _write(self, ids: "_Hashed", offsets: "_Hashed", table: "_Hashed") -> None:
        """The buckets, one after the other, in a random order of the documents of each."""
        end = np.int64(0)
        offsets.write(end)
        for bucket in range(len(SPLITS) * _BUCKETS):
            if not self._rows_of(bucket).exists():
                continue
            rows_Nx6 = np.fromfile(self._rows_of(bucket), np.int32).reshape(-1, 1 + len(COLUMNS))
            ends_N = np.cumsum(rows_Nx6[:, 0], dtype=np.int64)
            order_N = np.random.default_rng([self._seed, ORDER, bucket]).permutation(len(rows_Nx6))
            starts_N = ends_N - rows_Nx6[:, 0]
            with open(self._ids_of(bucket), "rb") as file:
                for document in order_N:
                    file.seek(starts_N[document] * _TOKEN_BYTES)
                    ids.write(file.read((ends_N[document] - starts_N[document]) * _TOKEN_BYTES))
            offsets.write(end + np.cumsum(rows_Nx6[order_N, 0], dtype=np.int64))
            table.write(rows_Nx6[order_N, 1:])
            end += ends_N[-1]

    def _flush(self) -> None:
        self._spill.mkdir(parents=True, exist_ok=True)
        for bucket, (ids, rows) in self._waiting.items():
            for path, array in ((self._ids_of(bucket), np.concatenate(ids)), (self._rows_of(bucket), np.array(rows))):
                with open(path, "ab") as file:
                    file.write(array.astype(np.int32).data)
        self._waiting, self._in_memory = {}, 0

    def _ids_of(self, bucket: int) -> Path:
        return self._spill / f"{bucket}.ids"

    def _rows_of(self, bucket: int) -> Path:
        return self._spill / f"{bucket}.rows"

    def _number(self, group: str) -> int:
        if group in self._groups:
            return self._groups[group]
        # Groups are compared with one another, never named: two that share a number count as one, which does no harm.
        return len(self._groups) + zlib.crc32(group.encode()) % (_GROUPS - len(self._groups))


class _Hashed:
    """A file that is written, and its hash."""

    def __init__(self, file: IO[bytes]):
        self._file, self.hash = file, hashlib.sha256()

    def write(self, data: bytes | np.ndarray | np.generic) -> None:
        content = data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()
        self._file.write(content)
        self.hash.update(content)
