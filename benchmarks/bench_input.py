"""How fast training batches are read: a store of random vectors, its gathers, and the Grain pipeline over them.

Run: python -m benchmarks.bench_input [--rows 300000] [--d 576] [--batch 1024] [--dtype bfloat16]
     python -m benchmarks.bench_input --store WORKDIR/capture      what float8 would lose of that store's vectors
Prints a table of milliseconds per batch and, last, one line of JSON. Every figure is over a page cache that holds
the store ("warm"), except "first epoch", in which each page is mapped for the first time.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from saejax.activations import float8
from saejax.activations.batches import steps_per_epoch, training_batches
from saejax.activations.documents import COLUMNS, SPLITS, Documents
from saejax.activations.manifest import CapturedModel, Manifest, StoredDocuments, StoredSite
from saejax.activations.plan import Plan
from saejax.activations.store import DTYPES, Store, on_disk
from saejax.activations.writer import StoreWriter

SITE = "resid_post.15"
PARTS = ((SITE,),)


def random_store(folder: Path, rows: int, d: int, dtype: str, shard_rows: int) -> Store:
    """A store of normal vectors in documents of 100 tokens, every tenth held out."""
    count = -(-rows // 100)
    offsets_N = np.minimum(np.arange(count + 1, dtype=np.int64) * 100, rows)
    table_Nx5 = np.zeros((count, len(COLUMNS)), np.int32)
    table_Nx5[::10, COLUMNS.index("split")] = SPLITS.index("held_out")
    documents = Documents(np.zeros(rows, np.int32), offsets_N, table_Nx5, ("random",))
    plan = Plan(documents, shard_rows, batch_tokens=4096, last=0, seed=0)
    writer = StoreWriter(folder, [SITE], "benchmark")
    writer.write_documents(documents)
    rng = np.random.default_rng(0)
    for shard in range(plan.shards):
        vectors_RxD = rng.standard_normal((plan.size(shard), d), np.float32)
        norms_R = np.linalg.norm(vectors_RxD, axis=1)
        on_disk_RxD = on_disk(vectors_RxD.astype(DTYPES[dtype]), norms_R, dtype)
        writer.write_shard(shard, {"index": plan.index(shard), SITE: on_disk_RxD, f"{SITE} norms": norms_R})
    statistics = writer.site_statistics(plan.shards, documents, sink_factor=10.0)
    writer.finish(
        Manifest(
            sites={SITE: StoredSite(**vars(statistics[SITE]), d=d)},
            dtype=dtype,
            rows=plan.rows,
            shards=plan.shards,
            shard_rows=shard_rows,
            model=CapturedModel("none", "", "0" * 16, "float32"),
            sink_factor=10.0,
            documents=StoredDocuments(COLUMNS, documents.groups),
            files={},
        )
    )
    return Store.open(folder)


def median_ms(work: Callable[[int], object], repeats: int) -> float:
    """Median wall-clock time of ``work(i)``, in milliseconds."""
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        work(i)
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def epoch_ms(store: Store, batch: int, epoch_seed: int) -> float:
    """Mean time per batch of one epoch through the pipeline, its start included."""
    start = time.perf_counter()
    count = sum(1 for _ in training_batches(store, PARTS, batch, epoch_seed, epochs=1))
    return 1e3 * (time.perf_counter() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--d", type=int, default=576)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--shard_rows", type=int, default=65_536)
    parser.add_argument("--store", help="folder of a finished store; nothing else is measured then")
    args = parser.parse_args()
    if args.store:
        store = Store.open(args.store)
        return print(json.dumps({site: float8_loss(store, site) for site in store.sites}))
    with tempfile.TemporaryDirectory() as folder:
        store = random_store(Path(folder), args.rows, args.d, args.dtype, args.shard_rows)
        results = measure(store, args.batch)
    print(f"{args.rows:,} rows of {args.d} {args.dtype}, shards of {args.shard_rows:,}, batches of {args.batch}")
    for name, value in results.items():
        print(f"{name:40s} {value:9.3f} ms per batch {1e3 / value:12,.0f} batches/s")
    print(json.dumps(dict(vars(args), **{f"{name} (ms)": round(value, 4) for name, value in results.items()})))


def float8_loss(store: Store, site: str, most: int = 8000) -> float:
    """Share of the variance of a site's held-out rows, a random sample of them, that float8 loses."""
    rows_N = np.random.default_rng(0).permutation(store.rows("held_out", site))[:most]
    values_NxD, norms_N = store.read(site, rows_N), store.norms(site, rows_N)
    exact_NxD = values_NxD.astype(np.float64)
    error_NxD = float8.decoded(float8.encoded(values_NxD, norms_N), norms_N) - exact_NxD
    return float((error_NxD**2).sum() / ((exact_NxD - exact_NxD.mean(axis=0)) ** 2).sum())


def measure(store: Store, batch: int) -> dict[str, float]:
    """Milliseconds per batch of every way to read one."""
    results = {"pipeline, first epoch": epoch_ms(store, batch, 0), "pipeline, later epochs": epoch_ms(store, batch, 1)}
    rows_R = np.random.default_rng(2).permutation(store.rows("train", SITE))
    steps = steps_per_epoch(store, PARTS, batch)

    def batch_rows(i: int) -> np.ndarray:
        return rows_R[i * batch : (i + 1) * batch]

    results["gather alone"] = median_ms(lambda i: store.read(SITE, batch_rows(i)), steps)
    in_memory_RxD = store.read(SITE, np.arange(store.manifest.rows))
    results["gather from an array in memory (floor)"] = median_ms(lambda i: in_memory_RxD[batch_rows(i)], steps)
    return results


if __name__ == "__main__":
    main()
