"""A store of known vectors, made without a model."""

import dataclasses
from pathlib import Path

import numpy as np

from saejax.activations.cutter import SPLITS
from saejax.activations.documents import COLUMNS, Documents
from saejax.activations.manifest import CapturedModel, Manifest, StoredDocuments, StoredSite
from saejax.activations.plan import Plan
from saejax.activations.store import DTYPES, Store
from saejax.activations.writer import StoreWriter

SITES = {"resid_post.1": 6, "mlp_out.0": 3}
LENGTHS = (1, 9, 4, 7, 12, 5, 1, 8, 30, 3, 11, 2)
HELD_OUT = (2, 6, 10)


@dataclasses.dataclass
class Known:
    """A store and what is in it, by (document, position)."""

    store: Store
    documents: Documents
    vectors: dict[str, dict[tuple[int, int], np.ndarray]]
    sinks: dict[str, set[tuple[int, int]]]

    def places(self, rows) -> list[tuple[int, int]]:
        """Document and position of rows."""
        document_N, position_N, _ = self.store.tokens(rows)
        return list(zip(document_N.tolist(), position_N.tolist(), strict=True))


def make_documents(lengths=LENGTHS) -> Documents:
    """Documents of so many tokens."""
    rng = np.random.default_rng(1)
    table_Nx5 = np.zeros((len(lengths), len(COLUMNS)), np.int32)
    table_Nx5[list(HELD_OUT), COLUMNS.index("split")] = SPLITS.index("held_out")
    table_Nx5[:, COLUMNS.index("source")] = np.arange(len(lengths))
    offsets_N = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Documents(rng.integers(0, 1000, offsets_N[-1]).astype(np.int32), offsets_N, table_Nx5, ("only",))


def write(folder: Path, dtype: str = "bfloat16", shard_rows: int = 16, lengths=LENGTHS) -> Known:
    """Writes a store into a folder.

    At resid_post.1 the first position of every document is a sink, at mlp_out.0 position 4 of document 3.
    """
    documents = make_documents(lengths)
    plan = Plan(documents, shard_rows, batch_tokens=32, last=0, seed=5)
    writer = StoreWriter(folder, tuple(SITES), "known")
    writer.write_documents(documents)
    sinks = {"resid_post.1": {(i, 0) for i in range(len(lengths))}, "mlp_out.0": {(3, 4)}}
    rng = np.random.default_rng(2)
    vectors = {
        site: {
            (i, position): (rng.standard_normal(d) * (100 if (i, position) in sinks[site] else 1)).astype(DTYPES[dtype])
            for i, length in enumerate(lengths)
            for position in range(length)
        }
        for site, d in SITES.items()
    }
    for shard in range(plan.shards):
        index_Rx3 = plan.index(shard)
        parts = {"index": index_Rx3}
        for site in SITES:
            values_RxD = np.stack([vectors[site][i, position] for i, position, _ in index_Rx3.tolist()])
            parts[f"{site} norms"] = np.linalg.norm(values_RxD.astype(np.float32), axis=1)
            parts[site] = values_RxD.view(np.uint16) if dtype == "bfloat16" else values_RxD
        writer.write_shard(shard, parts)
    statistics = writer.site_statistics(plan.shards, documents, sink_factor=10.0)
    writer.finish(
        Manifest(
            sites={site: StoredSite(**vars(statistics[site]), d=d) for site, d in SITES.items()},
            dtype=dtype,
            rows=plan.rows,
            shards=plan.shards,
            shard_rows=shard_rows,
            model=CapturedModel("known/model", "abc", "0123456789abcdef", "float32"),
            sink_factor=10.0,
            documents=StoredDocuments(COLUMNS, documents.groups),
            files={},
        )
    )
    return Known(Store.open(folder), documents, vectors, sinks)
