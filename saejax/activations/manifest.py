"""What ``manifest.json`` says of an activation store: frozen dataclasses, written last and read when it is opened."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from saejax.activations.results import SiteNorms
from saejax.errors import UserError
from saejax.files import read_json
from saejax.models.source import ModelSource
from saejax.results import from_json

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class FileFacts:
    """What identifies a file's content."""

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
    dtype: str | None = None  #: in which it ran; None of a second model, which ran in that of the first

    @classmethod
    def of(cls, source: ModelSource, dtype: str | None = None) -> Self:
        """What a store says of a model that ran in this dtype."""
        return cls(source.name, source.revision, source.fingerprint, dtype)

    def __str__(self) -> str:
        return f"{self.name}{f' at {self.revision}' if self.revision else ''} ({self.fingerprint})"


@dataclasses.dataclass(frozen=True)
class StoredDocuments:
    """The documents of a store."""

    columns: tuple[str, ...]  #: of their table
    groups: tuple[str, ...]  #: names of the groups that the table counts
    train: int | None = None  #: how many there are in this split; None if it was not written down
    held_out: int | None = None  #: likewise


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A store. It holds no times, so that it is the same for every run of the same work."""

    sites: Mapping[str, StoredSite]  #: by name
    dtype: str  #: of the vectors on disk: float32, bfloat16 or float8
    rows: int  #: tokens
    shards: int  #: how many
    shard_rows: int  #: rows of each, but for the last
    model: CapturedModel  #: what it was captured from
    sink_factor: float  #: rows with norms above so many times the median of their site are attention sinks
    documents: StoredDocuments  #: how many, and what their table means
    files: Mapping[str, FileFacts]  #: every other file, by its path in the folder
    corpus: str | None = None  #: a hash of the text; None if it was in memory
    last: int | None = None  #: last positions of a document that were recorded, 0 for all; None likewise
    tokens: Mapping[str, int] | None = None  #: recorded ones, by split; None likewise
    other: CapturedModel | None = None  #: the second model, if there is one
    schema_version: int = SCHEMA_VERSION  #: of the file

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest of the store in a folder.

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
