"""Writing a store: shards that appear whole, the sink rule, and the manifest that ends the work."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from saejax.activations.checksums import block_checksums, npy_header
from saejax.activations.documents import COLUMNS, Documents
from saejax.activations.manifest import MANIFEST, CapturedModel, FileFacts, Manifest, StoredDocuments, StoredSite
from saejax.activations.plan import Plan
from saejax.activations.results import SinkCounts, SiteNorms
from saejax.activations.store import BITS, DTYPES, INDEX, dequantize, quantize, shard_arrays, shard_file
from saejax.errors import UserError, out_of_room
from saejax.files import remove_unfinished, whole_file, write_json
from saejax.results import to_json

_BLOCK = 4096  # documents, or rows, that are copied together


@dataclasses.dataclass(frozen=True)
class SiteShard:
    """The rows of a shard at a site."""

    vectors_RxD: np.ndarray  #: of ``BITS[dtype]``
    norms_R: np.ndarray  #: float32 Euclidean norms
    train_sum_D: np.ndarray  #: float64 sum of the rows of the train split, sinks included

    @classmethod
    def of(cls, values_RxD: np.ndarray, train_rows: int, dtype: str) -> "SiteShard":
        """Return the shard of values of ``DTYPES[dtype]`` whose first ``train_rows`` rows are of the train split."""
        wide_RxD = values_RxD.astype(np.float64)
        norms_R = np.linalg.norm(wide_RxD, axis=1).astype(np.float32)
        return cls(values_RxD.view(BITS[dtype]), norms_R, wide_RxD[:train_rows].sum(0))


class StoreWriter:
    """Writer of a store, shard by shard; finished shards of the same work are kept.

    A site's shards are finished one by one and independently of other sites.

    Args:
      folder: the store's folder.
      plan: the plan of shards.
      widths: width of every site.
      dtype: dtype on disk, a key of ``DTYPES``.
      work: identifies what the shards of every site, and of ``INDEX``, depend on: shards that were written for other
        work do not count as finished.
    """

    def __init__(self, folder: Path, plan: Plan, widths: Mapping[str, int], dtype: str, work: Mapping[str, str]):
        self.folder, self.plan, self.widths, self.dtype, self.work = Path(folder), plan, dict(widths), dtype, work
        self._files: dict[str, FileFacts] = {}
        self._sinks: dict[str, np.ndarray] = {}

    @property
    def parts(self) -> tuple[str, ...]:
        """``INDEX`` and the sites."""
        return (INDEX, *self.widths)

    def adopt(self, folder: Path) -> None:
        """Take shards of the same work from another store, finished or not, as hard links: files are never changed.

        Where the file system of its folder has no hard links, nothing is taken.
        """
        for part in self.parts:
            for shard in range(self.plan.shards):
                record = shard_file(part, "record", shard)
                if (self.folder / record).exists():
                    continue
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    if json.loads((folder / record).read_text(encoding="utf-8"))["work"] != self.work[part]:
                        continue
                    (self.folder / part).mkdir(parents=True, exist_ok=True)
                    # The record last: without it a shard does not count as finished, whatever stops this in between.
                    for name in (*(shard_file(part, kind, shard) for kind in self._arrays(part, shard)), record):
                        (self.folder / name).unlink(missing_ok=True)
                        os.link(folder / name, self.folder / name)

    def begin(self, missing: Iterable[tuple[str, int]] = ()) -> None:
        """Prepare the folder: it is no store until ``finish``, and half-written files are removed.

        Records of damaged shards, among those to make, are removed, so that no process trusts them.
        """
        (self.folder / MANIFEST).unlink(missing_ok=True)  # first: readers take a folder with one for finished
        for part, shard in missing:
            (self.folder / shard_file(part, "record", shard)).unlink(missing_ok=True)
        remove_unfinished(self.folder)

    def has(self, part: str, shard: int, read: bool = True) -> bool:
        """Return whether the shard of a part, a site or ``INDEX``, is there and of this work.

        Its files are read and compared with their checksums unless ``read`` is False: then its record is trusted.
        """
        try:
            record = json.loads((self.folder / shard_file(part, "record", shard)).read_text(encoding="utf-8"))
            if record["work"] != self.work[part]:
                return False
            return not read or all(
                self._checksums(part, kind, shard) == record["checksums"][kind] for kind in self._arrays(part, shard)
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def write_index(self, shard: int) -> None:
        """Write which token each row of a shard is, if it is not there.

        Raises:
          UserError: the disk is full; finished shards are kept.
        """
        if not self.has(INDEX, shard, read=False):
            self._write_shard(INDEX, shard, dict(shard=self.plan.index(shard)), {})

    def write_site(self, site: str, shard: int, rows: SiteShard) -> None:
        """Write a shard of a site, then its record. See ``write_index`` for errors."""
        arrays, train_sum_D = dict(shard=rows.vectors_RxD, norms=rows.norms_R), rows.train_sum_D
        if self.dtype == "int8":
            arrays, train_sum_D = _in_8_bits(rows, self.plan.train_size(shard))
        self._write_shard(site, shard, arrays, dict(train_sum=train_sum_D.tolist()))

    def write_documents(self) -> None:
        """Write the documents, one after the other. See ``write_index`` for errors."""
        documents = self.plan.documents
        lengths_N = np.asarray(documents.lengths_N)
        blocks = (
            np.concatenate([documents[i] for i in range(first, min(first + _BLOCK, len(documents)))])
            for first in range(0, len(documents), _BLOCK)
        )
        self._write("documents/ids.npy", (int(lengths_N.sum(dtype=np.int64)),), np.dtype(np.int32), blocks)
        # The ids were written in the order of documents, so that starts are counted anew.
        arrays = Documents.contiguous(documents.ids_T, lengths_N, documents.table_Nx4, documents.groups).arrays()
        for name in ("starts.npy", "lengths.npy", "table.npy"):
            self._write_array(f"documents/{name}", arrays[name])

    def site_norms(self, sink_factor: float) -> dict[str, SiteNorms]:
        """Return the norms of all sites, whose shards are there, and what the sink rule drops.

        A row is a sink where its norm exceeds ``sink_factor`` times the median norm of all training rows.
        """
        plan = self.plan
        is_beyond_R = np.concatenate([self._load(INDEX, "shard", s)[:, 1] > 0 for s in range(plan.shards)])
        norms = {}
        for site in self.widths:
            norms_R = np.concatenate([self._load(site, "norms", shard) for shard in range(plan.shards)])
            # The median of all rows: the few sinks, however large, do not move it.
            median = float(np.median(norms_R[: plan.train_rows]))
            max_norm = np.float32(sink_factor * median)
            # Compared in float32, as the store's readers compare: a threshold in float64 would decide ties otherwise.
            sink_rows = self._sinks[site] = np.flatnonzero(norms_R > max_norm).astype(np.int64)
            beyond = int(is_beyond_R[sink_rows].sum())
            counts = SinkCounts(len(sink_rows) - beyond, beyond, float(beyond / max(is_beyond_R.sum(), 1)))
            norms[site] = SiteNorms(median, float(norms_R.max()), float(max_norm), counts)
        return norms

    def finish(
        self,
        norms: Mapping[str, SiteNorms],
        sink_factor: float,
        model: CapturedModel,
        bos: bool,
        corpus: str | None = None,
        last: int = 0,
        second: CapturedModel | None = None,
    ) -> None:
        """Write each site's sinks and sum and then, last, the manifest: now the folder is a store.

        Args:
          norms: from ``site_norms``.
          sink_factor: norms above this multiple of the median are sinks.
          model: the captured model.
          bos: whether texts begin with a BOS token.
          corpus: the hash of the text; see ``Manifest``.
          last: only so many last positions of each text are stored; 0: all.
          second: the second captured model, if any.
        """
        documents, plan = self.plan.documents, self.plan
        train = documents.train_count
        for site, sink_rows in self._sinks.items():
            self._write_array(f"{site}/sinks.npy", sink_rows)
            self._write_array(f"{site}/train_sum.npy", self._train_sum(site, sink_rows[sink_rows < plan.train_rows]))
        manifest = Manifest(
            sites={site: StoredSite(**vars(norms[site]), d=width) for site, width in self.widths.items()},
            dtype=self.dtype,
            tokens=plan.tokens,
            shard_rows=plan.shard_rows,
            model=model,
            bos=bos,
            sink_factor=sink_factor,
            documents=StoredDocuments(COLUMNS, documents.groups, train, len(documents) - train),
            files=dict(sorted(self._files.items())),
            corpus=corpus,
            last=last,
            other=second,
        )
        with _explain_full_disk(self.folder / MANIFEST):
            write_json(self.folder / MANIFEST, to_json(manifest))

    def _train_sum(self, site: str, sink_rows: np.ndarray) -> np.ndarray:
        """Return the float64 sum over the train rows of a site that are no sinks."""
        total_D = np.zeros(self.widths[site])
        for shard in range(self.plan.shards):
            record = json.loads((self.folder / shard_file(site, "record", shard)).read_text(encoding="utf-8"))
            # The shards' sums are in their records; only sinks are read again and taken out.
            total_D += np.array(record["train_sum"])
            first = shard * self.plan.shard_rows
            local_sinks = sink_rows[slice(*np.searchsorted(sink_rows, [first, first + self.plan.shard_rows]))] - first
            if len(local_sinks):
                vectors_RxD = self._load(site, "shard", shard, "r")
                for start in range(0, len(local_sinks), _BLOCK):
                    chosen = local_sinks[start : start + _BLOCK]
                    if self.dtype == "int8":
                        scale_R, centre_D = (self._load(site, kind, shard) for kind in ("scales", "centre"))
                        values_NxD = dequantize(vectors_RxD[chosen], scale_R[chosen], centre_D)
                    else:
                        values_NxD = vectors_RxD[chosen].view(DTYPES[self.dtype])
                    total_D -= values_NxD.astype(np.float64).sum(0)
        return total_D

    def _arrays(self, part: str, shard: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Return shape and dtype of a shard's arrays; see ``shard_arrays``."""
        return shard_arrays(part, self.plan.size(shard), self.widths.get(part, 0), self.dtype)

    def _load(self, part: str, kind: str, shard: int, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
        """Return the array of a shard's file."""
        return np.load(self.folder / shard_file(part, kind, shard), mmap_mode=mmap_mode, allow_pickle=False)

    def _checksums(self, part: str, kind: str, shard: int) -> list[int]:
        """Return the checksums of a file's blocks as they are on disk; a ``ValueError`` if it is another array."""
        array = self._load(part, kind, shard)
        if (array.shape, array.dtype) != self._arrays(part, shard)[kind]:
            raise ValueError(f"{array.dtype} {array.shape}")
        return block_checksums(array.data.cast("B"))

    def _write_shard(self, part: str, shard: int, arrays: Mapping[str, np.ndarray], record: Mapping) -> None:
        """Write a shard's arrays, then the record that says that it is done."""
        checksums = {}
        for kind, array in arrays.items():
            array = np.ascontiguousarray(array)
            checksums[kind] = block_checksums(array.data.cast("B"))
            self._write_file(shard_file(part, kind, shard), (npy_header(array.shape, array.dtype), array.data))
        path = self.folder / shard_file(part, "record", shard)
        with _explain_full_disk(path):
            write_json(path, dict(work=self.work[part], checksums=checksums, **record))

    def _write_array(self, name: str, array: np.ndarray) -> None:
        """Write an array and note its hash for the manifest."""
        self._write(name, array.shape, array.dtype, [array])

    def _write(self, name: str, shape: tuple[int, ...], dtype: np.dtype, blocks: Iterable[np.ndarray]) -> None:
        # Hashed on the way to the disk: the ids of a large store would not fit into memory.
        """Write an array that comes in blocks and note its hash for the manifest."""
        digest, size = hashlib.sha256(), 0

        def hashed() -> Iterator[Any]:
            nonlocal size
            contents: Iterator[Any] = (np.ascontiguousarray(block).data.cast("B") for block in blocks)
            for content in itertools.chain((npy_header(shape, dtype),), contents):
                digest.update(content)
                size += len(content)
                yield content

        self._write_file(name, hashed())
        self._files[name] = FileFacts(size, digest.hexdigest())

    def _write_file(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a file that appears whole or not at all."""
        # Written by hand: numpy's own writer loses the error number, so that a full disk looks like a bug.
        path = self.folder / name
        with _explain_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as unfinished, open(unfinished, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)


def _in_8_bits(shard: SiteShard, train_rows: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the arrays of a shard in 8 bits by their kinds, and the sum of its train rows, both as they are read."""
    values_RxD = shard.vectors_RxD.view(DTYPES["int8"])
    # Of usual rows: the few attention sinks are so long that they would move it.
    usual_R = shard.norms_R <= 10 * np.median(shard.norms_R)
    starts, width = range(0, len(values_RxD), _BLOCK), values_RxD.shape[1]
    total_D = sum(values_RxD[i : i + _BLOCK][usual_R[i : i + _BLOCK]].sum(0, dtype=np.float32) for i in starts)
    centre_D = (total_D / usual_R.sum()).astype(np.float32)
    numbers_RxD, scale_R = np.empty(values_RxD.shape, np.int8), np.empty(len(values_RxD), np.float32)
    norms_R, train_sum_D = np.empty(len(values_RxD), np.float32), np.zeros(width)
    for i in starts:
        block = slice(i, i + _BLOCK)
        numbers_RxD[block], scale_R[block] = quantize(values_RxD[block], centre_D)
        read_RxD = dequantize(numbers_RxD[block], scale_R[block], centre_D)
        part = SiteShard.of(read_RxD, max(min(train_rows - i, _BLOCK), 0), "int8")
        norms_R[block] = part.norms_R
        train_sum_D += part.train_sum_D
    return dict(shard=numbers_RxD, scales=scale_R, centre=centre_D, norms=norms_R), train_sum_D


def write_store(
    folder: Path,
    documents: Documents,
    values: Mapping[str, np.ndarray],
    model: CapturedModel,
    *,
    bos: bool = False,
    dtype: str = "float32",
    shard_rows: int = 65_536,
    sink_factor: float = 10.0,
    seed: int = 0,
) -> None:
    """Write a store of values in memory, in place of a store that is there.

    Args:
      folder: made if missing.
      documents: contiguous documents.
      values: values at every site, [T, D] of ``DTYPES[dtype]``; row t is the token ``documents.ids_T[t]``.
      model: the values' model.
      bos: whether every document begins with a BOS token.
      dtype: dtype on disk.
      shard_rows: rows of a shard.
      sink_factor: rows with norms above so many times the median of their site are attention sinks.
      seed: seed of the order of rows within a shard.
    """
    # No model is run: the size of batches is without effect.
    plan = Plan(documents, shard_rows, batch_tokens=1, last=0, seed=seed)
    widths = {site: value_TxD.shape[1] for site, value_TxD in values.items()}
    writer = StoreWriter(folder, plan, widths, dtype, dict.fromkeys((INDEX, *values), "memory"))
    writer.begin((part, shard) for part in writer.parts for shard in range(plan.shards))
    writer.write_documents()
    for shard in range(plan.shards):
        document_R, position_R, _ = plan.index(shard).T
        writer.write_index(shard)
        for site, value_TxD in values.items():
            values_RxD = np.ascontiguousarray(value_TxD[documents.starts_N[document_R] + position_R])
            writer.write_site(site, shard, SiteShard.of(values_RxD, plan.train_size(shard), dtype))
    writer.finish(writer.site_norms(sink_factor), sink_factor, model, bos)


@contextlib.contextmanager
def _explain_full_disk(path: Path) -> Iterator[None]:
    """Turn a full disk into a ``UserError`` that names the file."""
    try:
        yield
    except OSError as error:
        if not (reason := out_of_room(error)):
            raise
        raise UserError(
            f"{reason}: {path} could not be written; finished shards are kept: free space, then run the same "
            "command to go on"
        ) from None
