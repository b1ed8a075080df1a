"""Speed of reading training batches: a store of random vectors, its gathers, and the Grain pipeline over them.

Run: python -m benchmarks.bench_input [--rows 300000] [--d 576] [--batch 1024] [--dtype bfloat16]
Prints a table of milliseconds per batch and, last, one line of JSON. Every figure is over a page cache that holds
the store ("warm"), except "first epoch", in which each page is mapped, and each block checked, for the first time.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from saejax.activations.batches import READ_OPTIONS, BatchOrder, make_batches
from saejax.activations.documents import COLUMNS, SPLITS, Documents
from saejax.activations.manifest import CapturedModel
from saejax.activations.store import DTYPES, Store
from saejax.activations.writer import write_store

SITE = "resid_post.15"
PARTS = ((SITE,),)
WINDOW_ROWS = 262_144  # the default of --train.buffer_rows


def random_store(folder: Path, rows: int, d: int, dtype: str, shard_rows: int) -> Store:
    """Return a store of normal vectors in documents of 100 tokens, the last tenth held out."""
    count = -(-rows // 100)
    lengths_N = np.full(count, 100)
    lengths_N[-1] = rows - 100 * (count - 1)
    table_Nx4 = np.zeros((count, len(COLUMNS)), np.int32)
    table_Nx4[-(count // 10) :, COLUMNS.index("split")] = SPLITS.index("held_out")
    documents = Documents.contiguous(np.zeros(rows, np.int32), lengths_N, table_Nx4, ("random",))
    values_RxD = np.random.default_rng(0).standard_normal((rows, d), np.float32).astype(DTYPES[dtype])
    model = CapturedModel("none", "", "0" * 16, "float32")
    write_store(folder, documents, {SITE: values_RxD}, model, dtype=dtype, shard_rows=shard_rows)
    return Store.open(folder)


def median_ms(work: Callable[[int], object], repeats: int) -> float:
    """Return the median wall-clock time of ``work(i)``, in milliseconds."""
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        work(i)
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def epoch_ms(store: Store, batch: int, seed: int) -> float:
    """Return the mean milliseconds per batch of one epoch through the pipeline, its start included."""
    start = time.perf_counter()
    batches = make_batches(store, PARTS, batch, seed, 1, WINDOW_ROWS)
    count = sum(1 for _ in batches.to_iter_dataset(READ_OPTIONS))
    return 1e3 * (time.perf_counter() - start) / count


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--d", type=int, default=576)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--shard_rows", type=int, default=65_536)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = random_store(Path(folder), args.rows, args.d, args.dtype, args.shard_rows)
        results = measure(store, args.batch)
    print(f"{args.rows:,} rows of {args.d} {args.dtype}, shards of {args.shard_rows:,}, batches of {args.batch}")
    for name, value in results.items():
        print(f"{name:40s} {value:9.3f} ms per batch {1e3 / value:12,.0f} batches/s")
    print(json.dumps(dict(vars(args), **{f"{name} (ms)": round(value, 4) for name, value in results.items()})))


def measure(store: Store, batch: int) -> dict[str, float]:
    """Return the milliseconds per batch of each way to read one."""
    start = time.perf_counter()
    make_batches(Store.open(store.folder), PARTS, batch, 0, 1, WINDOW_ROWS)[0]
    results = {"first batch of a process": 1e3 * (time.perf_counter() - start)}
    results["pipeline, first epoch"] = epoch_ms(Store.open(store.folder), batch, 0)
    results["pipeline, later epochs"] = epoch_ms(store, batch, 1)
    order = BatchOrder(store.usable("train", SITE), batch, 2, 1, WINDOW_ROWS)
    rows = [order.rows(step) for step in range(len(order))]
    results["gather alone"] = median_ms(lambda i: store.read(SITE, rows[i]), len(rows))
    in_memory_RxD = store.read(SITE, np.arange(store.manifest.rows))
    results["gather from an array in memory (floor)"] = median_ms(lambda i: in_memory_RxD[rows[i]], len(rows))
    return results


if __name__ == "__main__":
    main()
