"""Speed of interpreting features, compared with the encoder alone, at the demo's size (d 576, F 4,608, random store).

Run: python -m benchmarks.bench_interpret [--rows 65536] [--features 4608] [--k 64]
     python -m benchmarks.bench_interpret --growth
Prints tokens/s of the encoder alone, of the pass that writes all firings, and of all that is said of the features,
labels searched included (without the model's part), their ratios, the peak of memory and, last, one line of JSON.
With --growth, of a narrow dictionary: the peak of memory of a process that interprets it on 131,072 tokens, and of one
that does on ten times as many, their ratio, and the bytes that a further token takes.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.bench_input import SITE, random_store
from saejax.activations.store import Store
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.evaluation.member_data import MemberData
from saejax.interpret.detectors import best_detectors
from saejax.interpret.firings import blocks, record
from saejax.interpret.neighbours import nearest_rows
from saejax.interpret.records import Describer
from saejax.interpret.text import FAMILIES, CodeCounts, CodedText
from saejax.parallel.mesh import make_mesh

VOCABULARY, BATCH = 49_152, 4096
GROWN, NARROW = (131_072, 1_310_720), ("--d=32", "--features=512", "--k=8")


def encoder_seconds(store: Store, dictionary: Dictionary) -> float:
    """Return the seconds of reading and encoding all training rows."""
    (member,), rows = MemberData.of([dictionary], make_mesh()), store.rows("train", SITE)
    encode = jax.jit(lambda member, x_BxD: member.encode(x_BxD))
    jax.block_until_ready(encode(member, store.read(SITE, rows[:BATCH])))
    start = time.perf_counter()
    for first in range(0, len(rows) - BATCH + 1, BATCH):
        jax.block_until_ready(encode(member, store.read(SITE, rows[first : first + BATCH])))
    return (time.perf_counter() - start) * len(rows) / (len(rows) // BATCH * BATCH)


def interpret_seconds(store: Store, dictionary: Dictionary, text: CodedText, folder: Path) -> tuple[float, float]:
    """Return the seconds of the pass that records firings, and of describing all features from them."""
    features, mesh = dictionary.config.n_features, make_mesh()
    record(store, "held_out", {folder / "warm": dictionary}, mesh, BATCH)  # compiles
    start = time.perf_counter()
    place = record(store, "train", {folder / "own": dictionary}, mesh, BATCH)
    middle = time.perf_counter()
    bases = {family: CodeCounts(text.code(family, place)) for family in FAMILIES}
    nearest = nearest_rows(dictionary.W_dec_FxD[...], 6)
    describer = Describer(text, place, bases["token"], 8, 2, None, nearest)
    for block in blocks(folder / "own", features):
        describer.records(block)
        best_detectors(block, text, bases, ())
    return middle - start, time.perf_counter() - middle


def growth() -> None:
    """Run this benchmark on two lengths of text, each in a process of its own."""
    measured = []
    for rows in GROWN:
        command = [sys.executable, "-m", "benchmarks.bench_interpret", f"--rows={rows}", *NARROW]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        measured.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{measured[-1]['tokens']:12,} tokens: peak of memory {measured[-1]['peak_gb']:.2f} GB", flush=True)
    (small, large), tokens = (run["peak_gb"] for run in measured), measured[1]["tokens"] - measured[0]["tokens"]
    results = dict(
        peak_gb=[small, large], ratio=round(large / small, 2), bytes_per_token=round(1e9 * (large - small) / tokens)
    )
    print(f"{results['ratio']} x, {results['bytes_per_token']} bytes for a further token")
    print(json.dumps(results))


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=65_536)
    parser.add_argument("--d", type=int, default=576)
    parser.add_argument("--features", type=int, default=4608)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--growth", action="store_true")
    args = parser.parse_args()
    if args.growth:
        return growth()
    with tempfile.TemporaryDirectory() as folder:
        store = random_store(Path(folder) / "store", args.rows, args.d, "bfloat16", 65_536)
        ids = (np.random.default_rng(1).zipf(1.3, args.rows) % VOCABULARY).astype(np.int32)
        object.__setattr__(store.documents, "ids_T", ids)
        config = DictionaryConfig(kind="topk", site=SITE, d_in=args.d, n_features=args.features, k=args.k)
        dictionary = Dictionary.initial(config, jax.random.key(0))
        tokens = len(store.rows("train", SITE))
        encoder = encoder_seconds(store, dictionary)
        text = CodedText(store.documents, [f" {i}" for i in range(VOCABULARY)])
        recording, describing = interpret_seconds(store, dictionary, text, Path(folder) / "firings")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    results = {"encoder": encoder, "pass": recording, "all": recording + describing}
    for name, seconds in results.items():
        print(f"{name:10s} {tokens / seconds:12,.0f} tokens/s, {seconds / encoder:5.2f} x the encoder alone")
    print(f"peak of memory {peak:.2f} GB")
    print(json.dumps(dict(vars(args), tokens=tokens, peak_gb=round(peak, 3), **results)))


if __name__ == "__main__":
    main()
