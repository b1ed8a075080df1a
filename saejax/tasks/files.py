"""Reading files that a user names: whole, uncompressed, JSON line by line, and tables row by row."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saejax.errors import UserError


def read_bytes(path: Path, flag: str, advice: str) -> bytes:
    """The file's bytes; of a ``.gz`` file, uncompressed.

    Args:
      path: the file.
      flag: by which the user named it, for messages, such as "--corpus.path".
      advice: what to do if it does not exist.

    Raises:
      UserError: the file is missing, cannot be read, or is not whole.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{flag}={path} does not exist: {advice}") from None
    except OSError as error:
        raise UserError(f"{flag}={path} cannot be read ({error.strerror}): name a readable file") from None
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error):
        raise UserError(f"{path} is not a whole gzip file: it is damaged; copy or compress it again") from None


def decode(content: bytes, path: Path) -> str:
    """The text of a UTF-8 file; a ``UserError`` says where it is none."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}: expected text in UTF-8; convert it") from None


def json_lines(text: str, path: Path, example: str) -> Iterator[tuple[int, Any]]:
    """The JSON values of a text's lines that are not blank, each with the line's number, from 1.

    Args:
      text: one JSON value a line.
      path: where it comes from, for messages.
      example: what a line should look like.

    Raises:
      UserError: a line is not JSON.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path}, line {number} is not JSON: expected an object such as {example}") from None


def table_rows(path: Path, content: bytes) -> list[dict[str, Any]]:
    """The rows of a Parquet file, or of an Arrow file in either of its two layouts.

    Args:
      path: where it comes from; its ending tells the format.
      content: of the file.

    Raises:
      UserError: it is damaged.
    """
    import pyarrow

    buffer = pyarrow.BufferReader(content)
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(buffer).to_pylist()
        try:
            return pyarrow.ipc.open_stream(buffer).read_all().to_pylist()
        except pyarrow.ArrowInvalid:
            buffer.seek(0)
            return pyarrow.ipc.open_file(buffer).read_all().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a whole {path.suffix[1:]} file ({error}): copy or make it again") from None


def shown(value: object) -> str:
    """A value as JSON, cut to 40 characters, for messages."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
