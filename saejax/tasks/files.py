"""Reading files that a user names: uncompressed, line by line, JSON line by line, and tables row by row."""

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from saejax.errors import Faults, UserError
from saejax.unicode import replace_surrogates

_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_ROWS = 1024  # of a table, in memory at once


@contextlib.contextmanager
def opened(path: Path, flag: str, advice: str) -> Iterator[IO[bytes]]:
    """Open a file to read from; a ``.gz`` or ``.zst`` file uncompressed, as far as it is read.

    Args:
      path: the file.
      flag: the flag that named it, for messages, such as "--corpus.path".
      advice: what to do if it does not exist.

    Raises:
      UserError: the file is missing, cannot be read, or is not whole; also while it is read in the block.
    """
    try:
        if path.is_fifo():  # what several stages read, and what is hashed first
            raise UserError(f"{flag}={path} is a pipe, which can be read only once: name a file")
        with open(path, "rb") as file:
            if file.peek(64).startswith(b"version https://git-lfs"):
                raise UserError(f"{path} is a pointer of Git LFS, not the file itself: run git lfs pull where it is")
            with _uncompressed(path, file) as content:
                yield content
    except FileNotFoundError:
        raise UserError(f"{flag}={path} does not exist: {advice}") from None
    except (EOFError, OSError, zlib.error) as error:
        # A damaged archive raises an OSError without a number of the system, unlike a file that cannot be read.
        if path.suffix in _COMPRESSED and not getattr(error, "errno", None):
            kind = _COMPRESSED[path.suffix]
            raise UserError(f"{path} is not a whole {kind} file: it is damaged; copy or compress it again") from None
        raise UserError(
            f"{flag}={path} cannot be read ({getattr(error, 'strerror', error)}): name a readable file"
        ) from None


def _uncompressed(path: Path, file: IO[bytes]) -> contextlib.AbstractContextManager[Any]:
    if path.suffix == ".gz":
        return gzip.open(file)
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
    return contextlib.nullcontext(file)


def read_bytes(path: Path, flag: str, advice: str) -> bytes:
    """All bytes of a file, as ``opened`` gives them."""
    with opened(path, flag, advice) as file:
        return file.read()


def decode(content: bytes, path: Path) -> str:
    """Return the text of a UTF-8 file; a ``UserError`` says where it is none."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error.start) from None


def text_lines(file: IO[bytes], path: Path) -> Iterator[str]:
    """Return the lines of a UTF-8 file, one after the other; a ``UserError`` says where it is none."""
    read = 0
    for line in file:
        try:
            # A mark of byte order can only be in the first line.
            yield line.removesuffix(b"\n").decode("utf-8" if read else "utf-8-sig")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, read + error.start) from None
        read += len(line)


def _not_utf8(path: Path, byte: int) -> UserError:
    return UserError(f"{path} is not UTF-8 at byte {byte}: expected text in UTF-8; convert it")


def json_lines(lines: str | Iterable[str], path: Path, example: str, first: int = 1) -> Iterator[tuple[int, Any]]:
    """Return the JSON values of lines that are not blank, each with the line's number.

    Args:
      lines: one JSON value each; or a text of such lines.
      path: where it comes from, for messages.
      example: what a line should look like.
      first: number of the first line.

    Raises:
      UserError: a line is not JSON, or the first one begins an array.
    """
    for number, line in enumerate(lines.split("\n") if isinstance(lines, str) else lines, first):
        if not line.strip():
            continue
        if number == 1:
            refuse_array(line, path, example)
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path}, line {number} is not JSON: expected an object such as {example}") from None


def refuse_array(line: str, path: Path, example: str) -> None:
    """Raise a ``UserError`` if a file's first line begins a JSON array, as ``json.dump`` writes a list of rows.

    Args:
      line: the line.
      path: the file.
      example: what a line should look like.
    """
    if line.lstrip().startswith("["):
        raise UserError(
            f"{path}, line 1 is not JSON Lines, but begins an array: expected an object in each line, such as {example}"
        )


def read_lines(
    lines: str | Iterable[str],
    path: Path,
    example: str,
    read: Callable[[Any, str], None],
    wrong: str = "are no prompts",
) -> None:
    """Read lines that are not blank; one message names all bad ones.

    Args:
      lines: one JSON value each; or a text of such lines.
      path: where it comes from, for messages.
      example: what a line should look like.
      read: takes a line's value and where it stands; raises a ``UserError`` that begins with the latter.
      wrong: what is wrong with refused lines, for messages.

    Raises:
      UserError: lines are not JSON, or refused.
    """
    faults = Faults(path, wrong)
    for number, line in enumerate(lines.split("\n") if isinstance(lines, str) else lines, start=1):
        if number == 1:  # at once: no other line of such a file is right, either
            refuse_array(line, path, example)
        with faults.collect(number):
            for _, value in json_lines([line], path, example, number):
                read(value, f"{path}, line {number}")
    faults.refuse()


def table_rows(path: Path, file: IO[bytes], columns: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Return the rows of a Parquet file, or of an Arrow file in either of its two layouts, some at a time.

    Args:
      path: where it comes from; its ending tells the format.
      file: its content.
      columns: the columns that rows are to have; all, where the first of these is missing or none is named.

    Raises:
      UserError: it is damaged.
    """
    import pyarrow

    try:
        for batch in _record_batches(path, file, columns):
            chosen = set(_chosen(batch.schema.names, columns))
            batch = batch.select([i for i, name in enumerate(batch.schema.names) if name in chosen])
            for start in range(0, batch.num_rows, _ROWS):
                yield from batch.slice(start, _ROWS).to_pylist()
    # The values of a damaged file raise errors of Python's: texts that are not UTF-8, dates beyond its calendar.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not a whole {path.suffix[1:]} file ({error}): copy or make it again") from None


def _chosen(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Return the names of the columns to read; see ``table_rows``."""
    return [name for name in names if name in columns] if set(columns[:1]) & set(names) else list(names)


def _record_batches(path: Path, file: IO[bytes], columns: Sequence[str]) -> Iterator[Any]:
    import pyarrow

    if path.suffix == ".parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(file)
        yield from table.iter_batches(_ROWS, columns=_chosen(table.schema_arrow.names, columns))
        return
    try:
        # ``datasets`` writes streams; others write files: the ending does not tell.
        stream = pyarrow.ipc.open_stream(file)
    except pyarrow.ArrowInvalid:
        file.seek(0)
        whole = pyarrow.ipc.open_file(file)
        yield from map(whole.get_batch, range(whole.num_record_batches))
        return
    yield from stream


def shown(value: object) -> str:
    """Return a value as JSON, cut to 40 characters, for messages."""
    text = replace_surrogates(json.dumps(value, default=str, ensure_ascii=False))
    return text if len(text) <= 40 else text[:37] + "..."
