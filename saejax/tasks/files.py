"""Reading text files that a user names: whole, uncompressed, and JSON line by line."""

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


def shown(value: object) -> str:
    """A value as JSON, cut to 40 characters, for messages."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
