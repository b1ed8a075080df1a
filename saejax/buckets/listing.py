"""The list of a workdir's files in a bucket, and copies of them on this machine."""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from saejax.buckets.bucket import Bucket
from saejax.errors import UserError
from saejax.files import whole_file

FILES = ".files.json"  # in the bucket
_AT_ONCE = 8  # files


def fetch(bucket: Bucket, folder: Path, wanted: Callable[[str], bool]) -> None:
    """Copies of a workdir's files, to be read; a run may hold it meanwhile.

    Args:
      bucket: of the workdir.
      folder: where they are written, under their names.
      wanted: which of them.

    Raises:
      UserError: no workdir is there, or it cannot be read.
    """
    found = listed(bucket)
    if found is None:
        raise UserError(f"{bucket.url} is no workdir of saejax: it has no {FILES}")
    for_each(lambda name: download(bucket, name, folder / name), filter(wanted, found["files"]))


def for_each(work: Callable[[str], object], names: Iterable[str]) -> None:
    """Does some work for each name, several at once."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            for _ in pool.map(work, names):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def listed(bucket: Bucket) -> dict[str, Any] | None:
    """The list of a workdir's files; None if there is none.

    Raises:
      UserError: it is damaged, or names a file outside of the workdir.
    """
    written = bucket.read(FILES)
    found = parsed(written.content, f"{bucket.url}/{FILES}") if written else None
    for name in found["files"] if found else ():
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise UserError(f"{bucket.url}/{FILES} names {name}, which is outside of the workdir")
    return found


def download(bucket: Bucket, name: str, path: Path) -> None:
    """Copies a file of a bucket to a path, where it is whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as beside:
        bucket.download(name, beside)


def parsed(content: bytes, name: str) -> Any:
    """What some JSON says; a ``UserError`` with the file's name if it is not valid."""
    try:
        return json.loads(content)
    except ValueError:
        raise UserError(f"{name} is not valid JSON: it is damaged") from None
