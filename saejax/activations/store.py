"""The activation store: vectors of several sites, row by row, and the token of each row.

    manifest.json               written last: a folder without it is not a store
    <site>/shard-00000.npy      [rows, d] float32, bfloat16 kept as uint16 (npy has no bfloat16), or int8
    <site>/scales-00000.npy     of int8, [rows] float32: a value is its number times the row's scale plus the centre
    <site>/centre-00000.npy     of int8, [d] float32
    <site>/norms-00000.npy      [rows] float32, Euclidean norms of those vectors
    <site>/record-00000.json    checksums of the blocks of both, written after them: the shard is done
    <site>/sinks.npy            int64 rows, ascending, that are attention sinks
    <site>/train_sum.npy        [d] float64, sum of the training rows that are no sinks
    index/shard-00000.npy       [rows, 3] int32: document, position in it, token id; with a record, too
    documents/                  the token ids of every document and where it comes from

A *row* is one token: row r of every site is the same token, in shard ``r // shard_rows``. Rows of the train split come
first. Rows stand in random order within a shard. Attention *sinks* are rows whose norm exceeds ``sink_factor`` times
the median norm of the site's training rows; every site has its own, and ``rows`` leaves them out. A site's files depend
on no other site.
"""

import collections
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

import ml_dtypes
import numpy as np

from saejax.activations.batches import RowRange
from saejax.activations.checksums import CheckedArray, check_size
from saejax.activations.chunker import SPLITS
from saejax.activations.documents import FILES, Documents
from saejax.activations.manifest import CapturedModel, Manifest, StoredSite
from saejax.activations.results import SinkCounts
from saejax.errors import UserError, one_of
from saejax.files import file_sha256, read_object
from saejax.models.identity import content_sha256
from saejax.models.source import ModelSource

#: dtype of values that are read; the same as bits, in which they are copied; and as they are on disk.
DTYPES: dict[str, np.dtype] = {"float32": np.dtype(np.float32)} | dict.fromkeys(
    ("bfloat16", "int8"), np.dtype(ml_dtypes.bfloat16)
)
BITS = {name: np.dtype(np.uint16 if dtype.itemsize == 2 else np.float32) for name, dtype in DTYPES.items()}
ON_DISK: dict[str, np.dtype] = BITS | {"int8": np.dtype(np.int8)}
INDEX = "index"  # the folder of documents, positions and token ids, beside the sites' folders
_MAX_MAPS = 4096  # open at once; each takes a file descriptor
_SUMMED_ROWS = 8192  # that are read together


def shard_file(part: str, kind: str, shard: int) -> str:
    """Return the path of a shard's file of a kind, "shard", "norms" or "record", and a part: a site or ``INDEX``."""
    return f"{part}/{kind}-{shard:05d}.{'json' if kind == 'record' else 'npy'}"


def shard_arrays(part: str, rows: int, d: int, dtype: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return shape and dtype on disk of a shard's arrays, by the kind of file.

    The part is a site of width d, or ``INDEX``; the shard has so many ``rows``; ``dtype`` is the store's.
    """
    if part == INDEX:
        return dict(shard=((rows, 3), np.dtype(np.int32)))
    arrays = dict(shard=((rows, d), ON_DISK[dtype]), norms=((rows,), np.dtype(np.float32)))
    if dtype == "int8":
        arrays |= dict(scales=((rows,), np.dtype(np.float32)), centre=((d,), np.dtype(np.float32)))
    return arrays


def quantize(values_RxD: np.ndarray, centre_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return values in 8 bits: int8 numbers [R, D] and the scale of each row, float32 [R]; see ``dequantize``."""
    # Less a centre: coordinates that are large in all rows would set the scale, and the others be rounded to nothing.
    centred_RxD = values_RxD.astype(np.float32) - centre_D
    scale_R = np.abs(centred_RxD).max(axis=1, initial=0) / 127
    return np.rint(centred_RxD / np.where(scale_R > 0, scale_R, 1)[:, None]).astype(np.int8), scale_R


def dequantize(numbers_RxD: np.ndarray, scale_R: np.ndarray, centre_D: np.ndarray) -> np.ndarray:
    """Return ``numbers * scale + centre`` in bfloat16, [R, D]."""
    return (numbers_RxD * scale_R[:, None] + centre_D).astype(ml_dtypes.bfloat16)


class Store:
    """A finished store, read through memory maps. Made by ``Store.open``.

    Blocks are checked against their checksums when they are first read. Reading is safe from several threads.

    Attributes:
      folder: the store's folder.
      manifest: its description.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self._maps: collections.OrderedDict[str, CheckedArray] = collections.OrderedDict()  # least recently used first
        self._verified: dict[str, np.ndarray] = {}
        self._max_maps, self._lock = _map_limit(), threading.Lock()
        self._sinks: dict[str, np.ndarray] = {}
        self._documents: Documents | None = None

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Open the store in a folder.

        Raises:
          UserError: there is none, it was not finished, its manifest is damaged, or a file is missing or of the wrong
            size.
        """
        folder = Path(folder)
        store = cls(folder, Manifest.read(folder))
        one_of(store.manifest.dtype, DTYPES, f"dtype of the store {folder}")
        # Their sizes alone: the content is compared with its checksums when it is read.
        for part in (INDEX, *store.sites):
            for shard in range(store.manifest.shards):
                for kind, (shape, dtype) in store._arrays(part, shard).items():
                    check_size(folder / shard_file(part, kind, shard), shape, dtype)
        for name, facts in store.manifest.files.items():
            path = folder / name
            if not path.exists() or path.stat().st_size != facts.bytes:
                state = f"has {path.stat().st_size} bytes, expected {facts.bytes}" if path.exists() else "is missing"
                raise UserError(f"{path} {state}: delete {folder} and run capture again")
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
    def bos(self) -> str:
        """BOS convention of the documents, as dictionaries record it: "always" or "never"."""
        return "always" if self.manifest.bos else "never"

    @property
    def dtype(self) -> np.dtype:
        """The dtype of ``read``: float32 or ml_dtypes.bfloat16."""
        return DTYPES[self.manifest.dtype]

    def d(self, site: str) -> int:
        """Return the width of a site's vectors."""
        return self._site(site).d

    def median_norm(self, site: str) -> float:
        """Return the median norm of the site's training rows, sinks included."""
        return self._site(site).median_norm

    def max_norm(self, site: str) -> float:
        """Return the largest norm of a row that is no attention sink."""
        return self._site(site).max_norm

    def sinks(self, site: str) -> SinkCounts:
        """Return the number of rows that the sink rule drops, both splits together."""
        return self._site(site).sinks

    @property
    def documents(self) -> Documents:
        """The documents: ``documents[i]`` holds the token ids of document i, ``documents.of(split)`` a split's."""
        if self._documents is None:
            for name in FILES:
                self._check_content(f"documents/{name}")
            self._documents = Documents.read(self.folder / "documents", self.manifest.documents.groups)
        return self._documents

    def usable(self, split: str, *sites: str) -> RowRange:
        """Return the rows of a split, "train" or "held_out", that are sinks at none of the sites."""
        one_of(split, SPLITS, "split")
        train_rows = self.manifest.tokens["train"]
        first, stop = (0, train_rows) if split == "train" else (train_rows, self.manifest.rows)
        sink_rows = np.unique(np.concatenate([np.zeros(0, np.int64), *map(self._sink_rows, sites)]))
        excluded = sink_rows[slice(*np.searchsorted(sink_rows, [first, stop]))]
        return RowRange(first, stop, excluded, self.manifest.shard_rows)

    def rows(self, split: str, *sites: str) -> np.ndarray:
        """Return the rows of ``usable`` as an array, int64, ascending; 8 bytes a row."""
        return self.usable(split, *sites).rows()

    def read(self, site: str, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Return the vectors [n, d] of rows at a site, in the order of ``rows``, in ``dtype``.

        Args:
          site: a site of this store.
          rows: int [n], fastest if they ascend.
          out: an array to write them to; None: a new one.

        Raises:
          UserError: the store is damaged where it was read; the line names shard and block.
        """
        if out is not None:
            out = out.view(BITS[self.manifest.dtype])
        if self.manifest.dtype == "int8":
            return self._read_int8(self._check_site(site), np.asarray(rows, np.int64), out).view(self.dtype)
        return self._gather(self._check_site(site), "shard", rows, out).view(self.dtype)

    def _read_int8(self, site: str, rows: np.ndarray, out: np.ndarray | None) -> np.ndarray:
        """Return the bits of what ``read`` does, of values in 8 bits."""
        numbers_NxD, scale_N = (self._gather(site, kind, rows) for kind in ("shard", "scales"))
        out = np.empty(numbers_NxD.shape, np.uint16) if out is None else out
        shard_N, centre_D = rows // self.manifest.shard_rows, np.empty(self.d(site), np.float32)
        for shard in np.unique(shard_N).tolist():
            here_N = shard_N == shard
            self._map(site, "centre", shard).take(np.arange(len(centre_D)), centre_D)
            out[here_N] = dequantize(numbers_NxD[here_N], scale_N[here_N], centre_D).view(np.uint16)
        return out

    def held_out(self, count: int, *sites: str) -> dict[str, np.ndarray]:
        """Return the vectors [n, d] of at most ``count`` held-out rows, spread over all, that are sinks at no site."""
        rows_N = self.rows("held_out", *sites)
        # Spread over all: the first rows are of few documents.
        rows_N = rows_N[np.linspace(0, len(rows_N) - 1, min(len(rows_N), count)).astype(np.int64)]
        return {site: self.read(site, rows_N) for site in sites}

    def tokens(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return document, position in it and token id of rows; int32 each."""
        index_Nx3 = self._gather(INDEX, "shard", rows)
        return index_Nx3[:, 0], index_Nx3[:, 1], index_Nx3[:, 2]

    def norms(self, site: str, rows: np.ndarray) -> np.ndarray:
        """Return the Euclidean norms of the vectors of rows at a site, float32."""
        return self._gather(self._check_site(site), "norms", rows)

    def mean(self, site: str, *sites: str) -> np.ndarray:
        """Return the mean vector at a site, float64 [d], of training rows that are sinks at none of the sites.

        The sum was taken when the store was made: only rows that are sinks elsewhere, and not at ``site``, are read.
        """
        self._check_content(f"{self._check_site(site)}/train_sum.npy")
        total_D = np.load(self.folder / site / "train_sum.npy", allow_pickle=False)
        usable = self.usable("train", site, *sites)
        # Sinks at ``site`` are not in its sum; those at the other sites are, and have to be taken out.
        sinks_elsewhere = np.setdiff1d(usable.excluded, self._sink_rows(site), assume_unique=True)
        for start in range(0, len(sinks_elsewhere), _SUMMED_ROWS):
            values_NxD = self.read(site, sinks_elsewhere[start : start + _SUMMED_ROWS])
            total_D = total_D - values_NxD.astype(np.float64).sum(0)
        return total_D / max(len(usable), 1)

    def check_model(self, source: ModelSource) -> None:
        """Raise a ``UserError`` if the store was captured from another model."""
        if self.model.fingerprint != source.fingerprint:
            raise UserError(
                f"{self.folder} was captured from the model {self.model}, not from {source.name} "
                f"({source.fingerprint}): give that model by --model.path, or capture again"
            )

    def verify(self) -> None:
        """Check every file; a ``UserError`` names the first that is damaged."""
        for name in self.manifest.files:
            self._check_content(name, file_sha256)
        for part in (INDEX, *self.sites):
            for shard in range(self.manifest.shards):
                for kind in self._arrays(part, shard):
                    self._map(part, kind, shard).verify()

    def _site(self, site: str) -> StoredSite:
        """Return the description of a site."""
        return self.manifest.sites[self._check_site(site)]

    def _check_site(self, site: str) -> str:
        """Return the site's name; raise a ``UserError`` unless the store has it."""
        return one_of(site, self.sites, "site in this store")

    def _sink_rows(self, site: str) -> np.ndarray:
        """Return the rows that are attention sinks at a site, ascending."""
        if self._check_site(site) not in self._sinks:
            self._check_content(f"{site}/sinks.npy")
            self._sinks[site] = np.load(self.folder / site / "sinks.npy", allow_pickle=False)
        return self._sinks[site]

    def _arrays(self, part: str, shard: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Return shape and dtype of a shard's arrays; see ``shard_arrays``."""
        d = 0 if part == INDEX else self.d(part)
        return shard_arrays(part, self.manifest.shard_size(shard), d, self.manifest.dtype)

    def _gather(self, part: str, kind: str, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Return rows of the files of one kind, in the order of ``rows``, written to ``out`` if there is one."""
        rows = np.asarray(rows, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.manifest.rows:
            raise IndexError(f"rows are 0 to {self.manifest.rows - 1}; asked for {rows.min()} to {rows.max()}")
        if out is None:
            (_, *width), dtype = self._arrays(part, 0)[kind]
            out = np.empty((len(rows), *width), dtype)
        # In the order of the files, so that each is read once, from front to back.
        if (np.diff(rows) < 0).any():
            order_N = np.argsort(rows, kind="stable")
            out[order_N] = self._gather(part, kind, rows[order_N])
            return out
        shard_N, local_N = np.divmod(rows, self.manifest.shard_rows)
        shards, starts = np.unique(shard_N, return_index=True)
        for shard, start, stop in zip(shards.tolist(), starts, [*starts[1:], len(rows)], strict=False):
            self._map(part, kind, shard).take(local_N[start:stop], out[start:stop])
        return out

    def _map(self, part: str, kind: str, shard: int) -> CheckedArray:
        """Return the map of a shard's file, opened if need be; the least recently used one is closed."""
        name = shard_file(part, kind, shard)
        with self._lock:
            if name in self._maps:
                self._maps.move_to_end(name)
                return self._maps[name]
        # Read outside of the lock, so that other threads go on reading meanwhile.
        record = self.folder / shard_file(part, "record", shard)
        checksums = read_object(record, "checksums")["checksums"].get(kind, [])
        shape, dtype = self._arrays(part, shard)[kind]
        with self._lock:
            # Kept when the map is closed: a block is checked once, however often its file is opened again.
            is_verified = self._verified.setdefault(name, np.zeros(len(checksums), bool))
            mapped = CheckedArray(self.folder / name, shape, dtype, checksums, is_verified)
            self._maps[name] = mapped
            while len(self._maps) > self._max_maps:  # a thread that still reads an older map keeps it alive
                self._maps.popitem(last=False)
        return mapped

    def _check_content(self, name: str, hash_file: Callable[[Path], str] = content_sha256) -> None:
        """Raise a ``UserError`` if a file's hash differs from the manifest's; a large one was perhaps read before."""
        if hash_file(self.folder / name) != self.manifest.files[name].sha256:
            raise UserError(
                f"{self.folder / name} is damaged (its checksum differs from the manifest's): delete {self.folder} and "
                "run capture again"
            )


def _map_limit() -> int:
    """Return the number of shards to map at once, after raising the limit of open files as far as is allowed.

    A map keeps its file open. Many systems give a process 1,024 descriptors unless it asks for more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Half of what is allowed: everything else that opens files needs the rest.
    return _MAX_MAPS if hard == resource.RLIM_INFINITY else max(16, min(_MAX_MAPS, hard // 2))
