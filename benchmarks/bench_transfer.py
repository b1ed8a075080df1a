"""Speed of matching the dictionaries of all layers with each other: random stacks of the size of one of SmolLM2.

Half of each dictionary's directions are those of the one before, turned a little, as features drift through layers; the
others are new.

Run: python -m benchmarks.bench_transfer [--dictionaries 30] [--features 4608] [--d 576] [--pairs 0]
Prints the seconds of the products alone, of the assignments of all pairs, found and null, and their share of the ten
minutes that they may take on two cores, the largest gap, scipy's dense solver on one pair (its time, and its sum beside
ours), the peak of memory and, last, one line of JSON. Processor seconds, of all threads, are told beside the clock's,
which others on the machine make longer.
"""

import argparse
import itertools
import json
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from saejax.matching.match import match
from saejax.matching.rows import independent_rows, unit
from saejax.parallel.mesh import make_mesh


def stack(count: int, features: int, width: int) -> list[np.ndarray]:
    """Return unit rows [F, D] of each dictionary; most directions lie in few dimensions, as in a residual stream."""
    rng = np.random.default_rng(0)
    scale = np.arange(1, width + 1, dtype=np.float32) ** -0.5
    dictionaries = [unit(rng.standard_normal((features, width), np.float32) * scale)]
    for _ in range(count - 1):
        new = unit(rng.standard_normal((features, width), np.float32) * scale)
        kept = np.arange(features)[:, None] < features // 2
        dictionaries.append(unit(np.where(kept, 0.9 * dictionaries[-1] + 0.44 * new, new))[rng.permutation(features)])
    return dictionaries


BOUND = 600  # seconds that all pairs of 30 layers may take on two cores


def product_seconds(rows: list[np.ndarray]) -> float:
    """Return the seconds of the product of all rows of two dictionaries."""
    multiply = jax.jit(lambda first, second: jnp.matmul(first, second.T, precision="highest").max(axis=0))
    placed = jax.device_put(rows[:2])
    jax.block_until_ready(multiply(*placed))
    start = time.perf_counter()
    for _ in range(5):
        jax.block_until_ready(multiply(*placed))
    return (time.perf_counter() - start) / 5


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dictionaries", type=int, default=30)
    parser.add_argument("--features", type=int, default=4608)
    parser.add_argument("--d", type=int, default=576)
    parser.add_argument("--pairs", type=int, default=0, help="pairs that are matched, drawn evenly; 0: all")
    args = parser.parse_args()
    rows, mesh = stack(args.dictionaries, args.features, args.d), make_mesh()
    pairs = list(itertools.combinations(range(args.dictionaries), 2))
    chosen = pairs[:: max(1, len(pairs) // args.pairs)] if args.pairs else pairs
    product_s = product_seconds(rows)
    start = time.perf_counter()
    nulls = [independent_rows(rows_FxD, [1, place]) for place, rows_FxD in enumerate(rows)]
    drawn = time.perf_counter() - start
    list(match([(0, rows[0], rows[1])], mesh))  # compiles
    list(match([(0, rows[0], nulls[1])], mesh))
    start, begun, shared, gap = time.perf_counter(), time.process_time(), dict[tuple[int, int], float](), 0.0
    problems = (
        ((*pair, null), rows[pair[0]], (nulls if null else rows)[pair[1]]) for pair in chosen for null in (0, 1)
    )
    for (first, second, null), matched in match(problems, mesh):
        gap = max(gap, matched.gap)
        if not null:
            shared[first, second] = float((matched.value_F >= 0.7).mean())
    seconds, busy = time.perf_counter() - start, time.process_time() - begun
    table = rows[0] @ rows[1].T
    start = time.process_time()
    best = linear_sum_assignment(table, maximize=True)
    dense = time.process_time() - start
    (_, ours), *_ = match([(0, rows[0], rows[1])], mesh)
    short = float(table[best].mean() - np.nansum(ours.value_F) / len(ours.value_F))
    scale = len(pairs) / len(chosen)
    whole, processor = seconds * scale + drawn, busy * scale + drawn
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"one product {product_s:.3f} s: the floor of all {len(pairs)} pairs, with nulls, is "
        f"{2 * product_s * len(pairs):.0f} s"
    )
    print(
        f"{len(chosen)} pairs, with nulls: {seconds:.1f} s, {busy:.1f} processor seconds, "
        f"{busy / len(chosen):.2f} a pair; largest gap {gap:.1e}"
    )
    print(
        f"all {len(pairs)}: {whole:.0f} s, {whole / BOUND:.2f} of the {BOUND} s that they may take; {processor:.0f} "
        f"processor seconds, {processor / BOUND / 2:.2f} of two cores' {2 * BOUND}"
    )
    print(
        f"null directions {drawn:.1f} s; scipy's dense solver on one pair {dense:.1f} processor seconds, its mean "
        f"{short:+.1e} from ours; peak of memory {peak:.2f} GB"
    )
    print(f"shared between neighbours {np.mean([v for (i, j), v in shared.items() if j == i + 1] or [np.nan]):.3f}")
    results = dict(
        product=product_s,
        seconds=seconds,
        processor_seconds=busy,
        all_seconds=whole,
        all_processor_seconds=processor,
        dense_solver=dense,
        short_of_dense=short,
        peak_gb=round(peak, 2),
        gap=gap,
    )
    print(json.dumps(dict(vars(args), matched=len(chosen), **results)))


if __name__ == "__main__":
    main()
