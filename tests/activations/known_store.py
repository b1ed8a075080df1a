"""A store of known vectors, made without a model."""

import dataclasses
from pathlib import Path

import numpy as np

from saejax.activations.chunker import SPLITS
from saejax.activations.documents import COLUMNS, Documents
from saejax.activations.manifest import CapturedModel
from saejax.activations.store import DTYPES, Store
from saejax.activations.writer import write_store

SITES = {"resid_post.1": 6, "mlp_out.0": 3}
LENGTHS = (1, 9, 4, 7, 12, 5, 1, 8, 30, 3, 11, 2)
HELD_OUT = 3  # documents, the last ones


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
    table_Nx4 = np.zeros((len(lengths), len(COLUMNS)), np.int32)
    table_Nx4[-HELD_OUT:, COLUMNS.index("split")] = SPLITS.index("held_out")
    table_Nx4[:, COLUMNS.index("source")] = np.arange(len(lengths))
    return Documents.contiguous(rng.integers(0, 1000, sum(lengths)).astype(np.int32), lengths, table_Nx4, ("only",))


def write(folder: Path, dtype: str = "bfloat16", shard_rows: int = 16, lengths=LENGTHS) -> Known:
    """Writes a store into a folder.

    At resid_post.1 the first position of every document is a sink, at mlp_out.0 position 4 of document 3.
    """
    documents = make_documents(lengths)
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
    values = {site: np.stack(list(of_site.values())) for site, of_site in vectors.items()}
    model = CapturedModel("known/model", "abc", "0123456789abcdef", "float32")
    write_store(folder, documents, values, model, dtype=dtype, shard_rows=shard_rows, seed=5)
    return Known(Store.open(folder), documents, vectors, sinks)
