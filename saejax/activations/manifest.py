"""``manifest.json`` of an activation store: frozen dataclasses, written last and read when the store is opened."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from saejax.activations.results import SiteNorms
from saejax.errors import UserError
from saejax.files import read_json
from saejax.models.source import ModelSource
from saejax.results import from_json

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class FileFacts:
    """A file's size and hash."""

    bytes: int  #: its size
    sha256: str  #: hexadecimal


@dataclasses.dataclass(frozen=True)
class StoredSite(SiteNorms):
    """A site of a store."""

    d: int  #: width of its vectors


@dataclasses.dataclass(frozen=True)
class CapturedModel:
    """A model that activations come from."""

    name: str  #: of the hub, or its folder
    revision: str  #: of the hub; "" of a folder
    fingerprint: str  #: of its files
    dtype: str | None = None  #: in which it ran; None of a second model, which ran in the first model's

    @classmethod
    def of(cls, source: ModelSource, dtype: str | None = None) -> Self:
        """Return the description of a model that ran in this dtype."""
        return cls(source.name, source.revision, source.fingerprint, dtype)

    def __str__(self) -> str:
        return f"{self.name}{f' at {self.revision}' if self.revision else ''} ({self.fingerprint})"


@dataclasses.dataclass(frozen=True)
class StoredDocuments:
    """The documents of a store."""

    columns: tuple[str, ...]  #: of their table
    groups: tuple[str, ...]  #: names of the groups that the table counts
    train: int  #: number of documents in this split, which are the first ones
    held_out: int  #: number of documents in this split


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A store. It holds no times, so that it is the same for every run of the same work."""

    sites: Mapping[str, StoredSite]  #: by name
    dtype: str  #: of the vectors on disk: float32, bfloat16 or int8
    tokens: Mapping[str, int]  #: rows of each split: the train rows are the first ones
    shard_rows: int  #: rows of each shard, but for the last
    model: CapturedModel  #: the model
    bos: bool  #: whether every document begins with a BOS token, or a special token of its own
    sink_factor: float  #: rows with norms above so many times the median of their site are attention sinks
    documents: StoredDocuments  #: their number, and the meaning of their table
    files: Mapping[str, FileFacts]  #: files that are not of a shard, by their paths in the folder
    corpus: str | None = None  #: a hash of the text; None if it was in memory
    last: int = 0  #: last positions of a document that were recorded, 0 for all
    other: CapturedModel | None = None  #: the second model, if there is one
    schema_version: int = SCHEMA_VERSION  #: of the file

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(self.tokens.values())

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    def shard_size(self, shard: int) -> int:
        """Return the number of rows of a shard."""
        return min(self.shard_rows, self.rows - shard * self.shard_rows)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the manifest of the store in a folder.

        Raises:
          UserError: there is no store, it is not finished, or the manifest is damaged or of another version.
        """
        path = folder / MANIFEST
        if not path.exists():
            raise UserError(f"{folder} holds no finished activation store ({MANIFEST} is missing): run capture first")
        data = read_json(path)
        if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
            raise UserError(f"{path} is not of schema version {SCHEMA_VERSION}: run capture again")
        return from_json(cls, data, path)
