"""Writing a store: shards that appear whole, the sink rule, and the manifest that ends the work."""

import contextlib
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from saejax.activations.cutter import SPLITS
from saejax.activations.documents import Documents
from saejax.activations.manifest import MANIFEST, FileFacts, Manifest
from saejax.activations.results import SinkCounts, SiteNorms
from saejax.activations.store import shard_files
from saejax.errors import UserError, out_of_room
from saejax.files import file_sha256, remove_unfinished, whole_file, write_json
from saejax.results import to_json


class StoreWriter:
    """Writes a store, shard by shard; finished shards of the same work are found again.

    Args:
      folder: where.
      sites: names of the sites.
      work: identifies the work: shards that were written for other work are not taken for finished.
    """

    def __init__(self, folder: Path, sites: Sequence[str], work: str):
        self.folder, self.sites, self.work = Path(folder), tuple(sites), work
        self._files: dict[str, FileFacts] = {}

    def begin(self, missing: Sequence[int] = ()) -> None:
        """Before anything is written: the folder is no store yet, and half-written files go.

        Args:
          missing: shards that are to be made; if there are records of damaged ones, no process may trust them.
        """
        (self.folder / MANIFEST).unlink(missing_ok=True)
        for shard in missing:
            (self.folder / _record(shard)).unlink(missing_ok=True)
        remove_unfinished(self.folder)

    def has(self, shard: int, read: bool = True) -> bool:
        """Whether the shard is there, whole and of this work; unless all is to be ``read``, its record is trusted."""
        try:
            record = json.loads((self.folder / _record(shard)).read_text(encoding="utf-8"))
            files = {name: FileFacts(**record["files"][name]) for name in shard_files(self.sites, shard).values()}
            whole = not read or all(file_sha256(self.folder / name) == facts.sha256 for name, facts in files.items())
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if not whole or record["work"] != self.work:
            return False
        self._files |= files
        return True

    def write_shard(self, shard: int, parts: Mapping[str, np.ndarray]) -> None:
        """Writes the parts of a shard (keys as in ``shard_files``), then its record.

        Raises:
          UserError: the disk is full; what was finished is kept.
        """
        names = shard_files(self.sites, shard)
        record = self.folder / _record(shard)
        files = {name: self._write(name, parts[part]) for part, name in names.items()}
        with _disk_room(record):
            write_json(record, to_json(dict(work=self.work, files=files)))
        self._files |= files

    def write_documents(self, documents: Documents) -> None:
        """Writes the documents. See ``write_shard`` for errors."""
        for name, array in documents.arrays().items():
            self._files[f"documents/{name}"] = self._write(f"documents/{name}", array)

    def site_statistics(self, shards: int, documents: Documents, sink_factor: float) -> dict[str, SiteNorms]:
        """The norms of every site and what the sink rule drops there.

        A row is a sink where its norm exceeds ``sink_factor`` times the median norm of all training rows.
        """
        train_N, trains, beyonds = documents.split_N == SPLITS.index("train"), [], []
        for shard in range(shards):  # two bytes of a row are kept, not all of its index: rows may be a billion
            index_Rx3 = self._read(shard, "index")
            trains.append(train_N[index_Rx3[:, 0]])
            beyonds.append(index_Rx3[:, 1] > 0)
        train_R, beyond_R = np.concatenate(trains), np.concatenate(beyonds)
        statistics = {}
        for site in self.sites:
            norm_R = np.concatenate([self._read(shard, f"{site} norms") for shard in range(shards)])
            median = np.median(norm_R[train_R])
            max_norm = np.float32(sink_factor * float(median))
            sink_R = norm_R > max_norm
            sinks = SinkCounts(
                position_0=int((sink_R & ~beyond_R).sum()),
                beyond=int((sink_R & beyond_R).sum()),
                share_beyond=float((sink_R & beyond_R).sum() / max(beyond_R.sum(), 1)),
            )
            statistics[site] = SiteNorms(float(median), float(norm_R.max()), float(max_norm), sinks)
        return statistics

    def finish(self, manifest: Manifest) -> None:
        """Writes the manifest with the files that were written, last: now the folder is a store."""
        whole = dataclasses.replace(manifest, files=dict(sorted(self._files.items())))
        with _disk_room(self.folder / MANIFEST):
            write_json(self.folder / MANIFEST, to_json(whole))

    def _read(self, shard: int, part: str) -> np.ndarray:
        return np.load(self.folder / shard_files(self.sites, shard)[part], allow_pickle=False)

    def _write(self, name: str, data: np.ndarray) -> FileFacts:
        path = self.folder / name
        # Written by hand: numpy's own writer loses the error number, so that a full disk looks like a bug.
        chunks = (npy_header(data.shape, data.dtype), np.ascontiguousarray(data).data.cast("B"))
        digest = hashlib.sha256()
        with _disk_room(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as beside, open(beside, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                    digest.update(chunk)
        return FileFacts(bytes=sum(map(len, chunks)), sha256=digest.hexdigest())


@contextlib.contextmanager
def _disk_room(path: Path) -> Iterator[None]:
    """Turns a full disk into a ``UserError`` that names the file."""
    try:
        yield
    except OSError as error:
        if not (told := out_of_room(error)):
            raise
        raise UserError(
            f"{told}: {path} could not be written; finished shards are kept: free space, then run the same "
            "command to go on"
        ) from None


def _record(shard: int) -> str:
    return f"index/record-{shard:05d}.json"


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """What stands in front of an array's content in a ``.npy`` file."""
    header = io.BytesIO()
    described = dict(descr=np.lib.format.dtype_to_descr(dtype), fortran_order=False, shape=shape)
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()
