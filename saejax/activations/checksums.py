"""Arrays in ``.npy`` files with a checksum for each block of 1 MiB, which is compared when the block is first read.

A store may hold terabytes: to hash all of it before the first training step would take half an hour.
"""

import io
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from saejax.errors import UserError

BLOCK_BYTES = 2**20


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Return what precedes an array's content in a ``.npy`` file; 128 bytes for the arrays of a store."""
    header = io.BytesIO()
    description = dict(descr=np.lib.format.dtype_to_descr(dtype), fortran_order=False, shape=shape)
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def block_checksums(content: memoryview) -> list[int]:
    """Return the CRC-32 of each block of an array's content, given as bytes."""
    return [zlib.crc32(content[i : i + BLOCK_BYTES]) for i in range(0, len(content), BLOCK_BYTES)]


class CheckedArray:
    """An array in a ``.npy`` file, mapped into memory, whose blocks are checked when they are first read.

    Args:
      path: path of the file.
      shape: expected shape of the array, [R] or [R, D].
      dtype: its expected dtype.
      checksums: checksums of its blocks.
      is_verified: bool, for each block whether it was checked; shared by all maps of the file, and updated.

    Raises:
      UserError: the file is missing, or of another size, shape or dtype.
    """

    def __init__(
        self, path: Path, shape: tuple[int, ...], dtype: np.dtype, checksums: Sequence[int], is_verified: np.ndarray
    ):
        self._path, self._checksums, self._is_verified = path, checksums, is_verified
        check_size(path, shape, dtype)
        header = npy_header(shape, dtype)
        # A plain array on the map: slices of a memmap take ten times as long.
        mapped = np.asarray(np.memmap(path, np.uint8, "r"))
        if mapped[: len(header)].tobytes() != header:
            raise UserError(f"{path} does not hold {dtype} {list(shape)}: {_REMEDY.format(path.parent.parent)}")
        self._bytes = mapped[len(header) :]
        self._array = self._bytes.view(dtype).reshape(shape)
        self._row_bytes = self._array.strides[0]
        if len(checksums) != -(-len(self._bytes) // BLOCK_BYTES):
            raise UserError(f"the record of {path} lacks checksums: {_REMEDY.format(path.parent.parent)}")

    def take(self, rows_N: np.ndarray, out: np.ndarray) -> None:
        """Copy rows into ``out``, in the order of ``rows_N``, which are within the array.

        Raises:
          UserError: a block that holds one of the rows is damaged.
        """
        if not self._is_verified.all():
            first_N = rows_N * self._row_bytes
            last_N = first_N + (self._row_bytes - 1)  # a row may lie in two blocks
            self._verify(np.unique(np.concatenate([first_N, last_N]) // BLOCK_BYTES))
        np.take(self._array, rows_N, axis=0, out=out, mode="clip")  # "raise" would copy once more

    def verify(self) -> None:
        """Check every block, as ``take`` does."""
        self._is_verified[:] = False
        self._verify(np.arange(len(self._checksums)))

    def _verify(self, blocks: np.ndarray) -> None:
        """Compare blocks that were not checked yet with their checksums."""
        for block in blocks[~self._is_verified[blocks]].tolist():
            start = block * BLOCK_BYTES
            content = self._bytes[start : start + BLOCK_BYTES]
            if zlib.crc32(content.data) != self._checksums[block]:
                first, last = start // self._row_bytes, (start + len(content) - 1) // self._row_bytes
                raise UserError(
                    f"{self._path} is damaged: block {block} (rows {first:,} to {last:,} of the shard) differs from "
                    f"its checksum: {_REMEDY.format(self._path.parent.parent)}"
                )
            self._is_verified[block] = True


_REMEDY = "delete {} and run capture again"


def check_size(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raise a ``UserError`` unless a file exists and is as long as the file of an array of this shape and dtype."""
    size = len(npy_header(shape, dtype)) + int(np.prod(shape)) * dtype.itemsize
    actual = path.stat().st_size if path.exists() else None
    if actual != size:
        state = "is missing" if actual is None else f"has {actual} bytes, expected {size}"
        raise UserError(f"{path} {state}: {_REMEDY.format(path.parent.parent)}")
