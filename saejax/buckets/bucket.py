"""The objects of a bucket, by the library obstore: Amazon's S3 and what speaks like it, and Google Cloud Storage.

Where credentials and endpoints come from is the library's: variables such as AWS_ACCESS_KEY_ID, AWS_REGION and
AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, or the machine's own account.
"""

import contextlib
import dataclasses
import datetime
import mimetypes
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from saejax.errors import UserError

_SCHEMES = ("s3://", "gs://")
_CHUNK = 16 * 2**20  # bytes of one request of a download, which the library gives 30 s
_XML = re.compile(r"<\?xml.*<Code>(.*?)</Code>.*?<Message>(.*?)</Message>.*", re.DOTALL)  # how S3 says why
_RETRIES = dict(max_retries=6, retry_timeout=datetime.timedelta(seconds=60))


def is_bucket(folder: str | os.PathLike) -> bool:
    """Whether a folder is named as one of a bucket."""
    return str(folder).startswith(_SCHEMES)


class ObjectChanged(Exception):
    """An object is no longer as it was when it was read, or was not."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """An object that was read."""

    content: bytes
    version: dict[str, str]  #: for ``Bucket.replace``
    age: float  #: seconds since it was written, by this machine's clock


class Bucket:
    """The objects under a prefix of a bucket. Whatever goes wrong is a ``UserError`` that names the bucket.

    Args:
      url: such as "s3://bucket/runs/demo".
      store: what holds the objects, of obstore; None: what the url names.
    """

    def __init__(self, url: str, store: Any = None):
        self.url = url.rstrip("/")
        with self._told("named as a bucket"):
            self._store = store or _opened(self.url)

    def read(self, name: str) -> Stored | None:
        """An object; None if there is none."""
        with self._told(f"reading {name}"):
            try:
                found = self._store.get(name)
                meta, content = found.meta, bytes(found.bytes())
            except FileNotFoundError:
                return None
        age = datetime.datetime.now(datetime.UTC) - meta["last_modified"]
        return Stored(content, _version(meta), max(0.0, age.total_seconds()))

    def write(self, name: str, content: bytes) -> None:
        """Writes an object, whole."""
        with self._told(f"writing {name}"):
            self._store.put(name, content)

    def replace(self, name: str, content: bytes, before: Stored | None) -> Stored:
        """Writes an object if it is still as it was read.

        Args:
          name: of the object.
          content: the new one.
          before: as it was; None: there was none.

        Returns:
          The object as it is now.

        Raises:
          ObjectChanged: it is not.
        """
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with self._told(f"writing {name}"):
            try:
                mode: Any = before.version if before else "create"
                return Stored(content, _version(self._store.put(name, content, mode=mode, use_multipart=False)), 0.0)
            except (AlreadyExistsError, PreconditionError) as error:
                raise ObjectChanged(name) from error

    def upload(self, file: Path, name: str) -> None:
        """Writes a file as an object, which appears whole or not at all."""
        kind = mimetypes.guess_type(name)[0]
        with self._told(f"writing {name}"):
            self._store.put(name, file, attributes={"Content-Type": kind} if kind else None)

    def download(self, name: str, file: Path) -> None:
        """Writes an object to a file."""
        with self._told(f"reading {name}"), open(file, "wb") as target:
            size = self._store.head(name)["size"]
            for start in range(0, size, _CHUNK):
                target.write(self._store.get_range(name, start=start, end=min(start + _CHUNK, size)))

    def copy(self, name: str, to: str) -> None:
        """Copies an object inside of the bucket."""
        with self._told(f"copying {name}"):
            self._store.copy(name, to)

    def delete(self, names: Sequence[str]) -> None:
        """Deletes objects."""
        with self._told("deleting"):
            if names:
                self._store.delete(list(names))

    @contextlib.contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        """Says errors of the library in one line."""
        try:
            yield
        except (UserError, ObjectChanged):
            raise
        except ImportError as error:
            raise UserError(
                f"a workdir in a bucket takes the package obstore, which cannot be imported ({error}): "
                "pip install 'saejax[buckets]'"
            ) from None
        except Exception as error:
            what, _, _ = str(error).partition("\n\nDebug source")
            what = _XML.sub(r"\1: \2", what)
            raise UserError(f"{self.url}: {doing}: {_advice(error)}: {what[:600]}") from error


def _version(meta: Any) -> dict[str, str]:
    return {key: meta[key] for key in ("e_tag", "version") if meta.get(key)}


def _opened(url: str) -> Any:
    """The store of a url. An endpoint that is named as http:// is taken at its word."""
    from obstore.store import from_url

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    more: Any = dict(client_options=dict(allow_http=endpoint.startswith("http://")), retry_config=_RETRIES)
    return from_url(url, **more)


def _advice(error: Exception) -> str:
    """What to do about an error of the library."""
    from obstore import exceptions

    if isinstance(error, PermissionError | exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
        return "permission denied, though objects have to be listed, read, written and deleted there"
    if isinstance(error, FileNotFoundError):
        return "there is no such bucket or object"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return "it failed; what was not copied is in the local folder, and the same command goes on"
