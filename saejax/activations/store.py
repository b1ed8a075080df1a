"""The activation store: vectors of several sites, row by row, and what each row is.

    manifest.json               written last: a folder without it is not a store
    <site>/shard-00000.npy      [rows, d] float32, bfloat16 kept as uint16 (npy has no bfloat16), or float8 as uint8
    <site>/norms-00000.npy      [rows] float32, Euclidean norms of those vectors
    index/shard-00000.npy       [rows, 3] int32: document, position in it, token id
    index/record-00000.json     checksums of the shard's files, written after them: the shard is done
    documents/                  the token ids of every document and where it comes from

A *row* is one token: row r of every site is the same token, in shard ``r // shard_rows``. Rows stand in random
order within a shard. Attention *sinks* are rows whose norm exceeds ``sink_factor`` times the median norm of the
site's training rows; every site has its own, and ``rows`` leaves them out.
"""

import collections
import resource
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import ml_dtypes
import numpy as np

from saejax.activations import float8
from saejax.activations.cutter import SPLITS
from saejax.activations.documents import Documents
from saejax.activations.manifest import CapturedModel, Manifest, StoredSite
from saejax.activations.results import SinkCounts
from saejax.errors import UserError, one_of
from saejax.files import file_sha256
from saejax.models.source import ModelSource

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES: dict[str, np.dtype] = {"float32": np.dtype(np.float32), "bfloat16": _BFLOAT16, "float8": _BFLOAT16}  # as read
ON_DISK: dict[str, np.dtype] = {
    name: np.dtype(kept) for name, kept in (("float32", np.float32), ("bfloat16", np.uint16), ("float8", np.uint8))
}
_DOCUMENTS = ("ids.npy", "offsets.npy", "table.npy")
_MOST_MAPS = 4096  # maps held open at once; each takes a file descriptor


def shard_files(sites: Sequence[str], shard: int) -> dict[str, str]:
    """Files of a shard by their part: "index", and "SITE" and "SITE norms" of every site."""
    vectors = {site: f"{site}/shard-{shard:05d}.npy" for site in sites}
    norms = {f"{site} norms": f"{site}/norms-{shard:05d}.npy" for site in sites}
    return dict(index=f"index/shard-{shard:05d}.npy", **vectors, **norms)


def on_disk(values_NxD: np.ndarray, norms_N: np.ndarray, dtype: str) -> np.ndarray:
    """Vectors as a shard keeps them; a view, but of float8.

    Args:
      values_NxD: of ``DTYPES[dtype]``.
      norms_N: their norms, float32.
      dtype: "float32", "bfloat16" or "float8".
    """
    return float8.encoded(values_NxD, norms_N) if dtype == "float8" else values_NxD.view(ON_DISK[dtype])


class Store:
    """A finished store, read through memory maps. Made by ``Store.open``.

    Attributes:
      folder: where it is.
      manifest: its description.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self._maps: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()  # least recently used first
        self._most_maps, self._lock, self._checked = _map_limit(), threading.Lock(), set[str]()
        self._rows: dict[tuple[str, ...], np.ndarray] = {}
        self._documents: Documents | None = None

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Opens the store in a folder.

        Raises:
          UserError: there is none, it was not finished, its manifest is damaged, or a file is missing or of the wrong
            size.
        """
        folder = Path(folder)
        store = cls(folder, Manifest.read(folder))
        for name in store.manifest.files:
            store._check_size(name)
        return store

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, such as "resid_post.15"."""
        return tuple(self.manifest.sites)

    @property
    def model(self) -> CapturedModel:
        """The model it was captured from."""
        return self.manifest.model

    @property
    def dtype(self) -> np.dtype:
        """What ``read`` returns: float32 or ml_dtypes.bfloat16."""
        return DTYPES[self.manifest.dtype]

    def d(self, site: str) -> int:
        """Width of a site's vectors."""
        return self._site(site).d

    def median_norm(self, site: str) -> float:
        """Median norm of the site's training rows, sinks included."""
        return self._site(site).median_norm

    def max_norm(self, site: str) -> float:
        """The sink rule: rows with a larger norm are attention sinks."""
        return self._site(site).max_norm

    def sinks(self, site: str) -> SinkCounts:
        """What the sink rule drops, both splits together."""
        return self._site(site).sinks

    @property
    def documents(self) -> Documents:
        """The documents: ``documents[i]`` is the token ids of document i, ``documents.of(split)`` those of a split."""
        if self._documents is None:
            for name in _DOCUMENTS:
                self._check_content(f"documents/{name}")
            self._documents = Documents.read(self.folder / "documents", self.manifest.documents.groups)
        return self._documents

    def rows(self, split: str, *sites: str) -> np.ndarray:
        """Ids, int64, ascending, of a split's rows that are sinks at none of the sites. Takes 8 bytes a row.

        Args:
          split: "train" or "held_out".
          sites: at least one of ``sites``.
        """
        one_of(split, SPLITS, "split")
        key = (split, *map(self._known, sites))
        if key not in self._rows:
            parts = []
            for shard in range(self.manifest.shards):
                document_R = self._part(shard, "index")[:, 0]
                wanted_R = self.documents.split_N[document_R] == SPLITS.index(split)
                for site in sites:
                    wanted_R &= self._part(shard, f"{site} norms") <= np.float32(self.max_norm(site))
                parts.append(np.flatnonzero(wanted_R) + shard * self.manifest.shard_rows)
            self._rows[key] = np.concatenate(parts).astype(np.int64)
            self._rows[key].setflags(write=False)
        return self._rows[key]

    def read(self, site: str, rows: np.ndarray) -> np.ndarray:
        """The vectors [n, d] of rows at a site, in the order asked for, in ``dtype``.

        Safe to call from several threads. Each shard is checked against its checksum when it is first used.
        """
        found_NxD = self._gather(self._known(site), rows)
        if self.manifest.dtype == "float8":
            return float8.decoded(found_NxD, self.norms(site, rows))
        return found_NxD.view(self.dtype)

    def tokens(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Document, position in it and token id of rows; int32 each."""
        index_Nx3 = self._gather("index", rows)
        return index_Nx3[:, 0], index_Nx3[:, 1], index_Nx3[:, 2]

    def norms(self, site: str, rows: np.ndarray) -> np.ndarray:
        """Euclidean norms of the vectors of rows at a site, float32."""
        return self._gather(f"{self._known(site)} norms", rows)

    def check_model(self, source: ModelSource) -> None:
        """A ``UserError`` if the store was captured from another model."""
        if self.model.fingerprint != source.fingerprint:
            raise UserError(
                f"{self.folder} was captured from the model {self.model}, not from {source.name} "
                f"({source.fingerprint}): give that model by --model.path, or capture again"
            )

    def verify(self) -> None:
        """Checks every file against its checksum; a ``UserError`` names the first that differs."""
        for name in self.manifest.files:
            self._check_content(name)

    def _site(self, site: str) -> StoredSite:
        return self.manifest.sites[self._known(site)]

    def _known(self, site: str) -> str:
        return one_of(site, self.sites, "site in this store")

    def _gather(self, part: str, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.manifest.rows:
            raise IndexError(f"rows are 0 to {self.manifest.rows - 1}; asked for {rows.min()} to {rows.max()}")
        shard_N, local_N = np.divmod(rows, self.manifest.shard_rows)
        order_N = np.argsort(shard_N, kind="stable")
        shards, starts = np.unique(shard_N[order_N], return_index=True)
        first = self._part(0, part)
        out = np.empty((len(rows), *first.shape[1:]), first.dtype)
        for shard, start, stop in zip(shards.tolist(), starts, [*starts[1:], len(rows)], strict=False):
            wanted = order_N[start:stop]
            out[wanted] = self._part(shard, part)[local_N[wanted]]
        return out

    def _part(self, shard: int, part: str) -> np.ndarray:
        name = shard_files(self.sites, shard)[part]
        with self._lock:
            if name in self._maps:
                self._maps.move_to_end(name)
                return self._maps[name]
        if name not in self._checked:
            self._check_content(name)
            self._checked.add(name)
        array = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        shape, dtype = self._expected(shard, part)
        if (array.shape, array.dtype) != (shape, dtype):
            raise UserError(f"{self.folder / name} is {array.dtype} {array.shape}, expected {dtype} {shape}")
        with self._lock:
            self._maps[name] = array
            while len(self._maps) > self._most_maps:  # who still reads an older map keeps it alive
                self._maps.popitem(last=False)
        return array

    def _expected(self, shard: int, part: str) -> tuple[tuple[int, ...], np.dtype]:
        rows = min(self.manifest.shard_rows, self.manifest.rows - shard * self.manifest.shard_rows)
        if part == "index":
            return (rows, 3), np.dtype(np.int32)
        if part in self.sites:
            return (rows, self.d(part)), ON_DISK[self.manifest.dtype]
        return (rows,), np.dtype(np.float32)

    def _check_size(self, name: str) -> None:
        path, size = self.folder / name, self.manifest.files[name].bytes
        found = path.stat().st_size if path.exists() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, expected {size}"
            raise UserError(f"{path} {state}: delete {self.folder} and run capture again")

    def _check_content(self, name: str) -> None:
        self._check_size(name)
        if file_sha256(self.folder / name) != self.manifest.files[name].sha256:
            raise UserError(
                f"{self.folder / name} is damaged (its checksum differs from the manifest's): delete {self.folder} and "
                "run capture again"
            )


def _map_limit() -> int:
    """How many shards may be mapped at once, once the process has as many file descriptors as it is allowed.

    A map keeps its file open. Many systems give a process 1,024 descriptors unless it asks for more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return _MOST_MAPS if hard == resource.RLIM_INFINITY else max(16, min(_MOST_MAPS, hard // 2))
