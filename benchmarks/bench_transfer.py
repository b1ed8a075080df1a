"""Speed of matching the dictionaries of all layers with each other: random stacks of the size of one of SmolLM2.

Half of each dictionary's directions are those of the one before, turned a little, as features drift through layers; the
others are new.

Run: python -m benchmarks.bench_transfer [--dictionaries 30] [--features 4608] [--d 576] [--pairs 0] [--study 0]
     python -m benchmarks.bench_transfer --tokens 32768 --features 131072
Prints the seconds of the products alone, of the assignments of all pairs, found and null, and their share of the ten
minutes that they may take on two cores, the largest gap, scipy's dense solver on one pair (its time, and its sum beside
ours), the peak of memory and, last, one line of JSON. Processor seconds, of all threads, are told beside the clock's,
which others on the machine make longer.

With --tokens N one pair of dictionaries is matched by made-up activity on N tokens, 64 features on each: most of the
second's features fire where one of the first's does. The peak of memory, beside two dense arrays, is told.

With --study N the stage itself compares N of the 98 dictionaries of the reasoning study, at an eighth of their widths,
random, of four random language models: all pairs of a model and 50 pairs of two. The peak of memory of N = 98 should
hardly be above that of N = 24.
"""

import argparse
import itertools
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from saejax.dictionaries import Dictionary, DictionaryConfig, save_dictionary
from saejax.matching.match import match
from saejax.matching.rows import CentredRows, independent_rows, unit
from saejax.matching.transfer.activity import MIN_FIRINGS
from saejax.models.settings import ModelConfig
from saejax.models.source import load_tokenizer, resolve
from saejax.parallel.mesh import make_mesh
from saejax.runner import command


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


# Width and layers of the study's models; each layer has a dictionary of eight features per dimension.
STUDY = {"gpt2-medium": (1024, 24), "pythia-1.4b": (2048, 24), "phi-2": (2560, 32), "gemma-2b": (2048, 18)}
EXACT = 5000  # features with which scipy's dense solver takes seconds; its time grows with their cube


def write_study(folder: Path) -> None:
    """Write random language models and dictionaries of the study's layers at an eighth of its widths."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(resolve(ModelConfig(path="smollm2")))
    for number, (name, (width, layers)) in enumerate(STUDY.items()):
        d, path = width // 8, folder / name
        shape = dict(hidden_size=d, intermediate_size=2 * d, num_hidden_layers=layers, max_position_embeddings=512)
        heads = dict(num_attention_heads=4, num_key_value_heads=4, vocab_size=len(tokenizer))
        LlamaForCausalLM(LlamaConfig(**shape, **heads)).save_pretrained(path)
        tokenizer.save_pretrained(path)
        fingerprint = resolve(ModelConfig(path=str(path)), decoder=True).fingerprint
        for layer in range(layers):
            site = dict(site=f"resid_post.{layer}", model=str(path), fingerprint=fingerprint)
            config = DictionaryConfig(kind="topk", k=32, d_in=d, n_features=8 * d, **site)
            random = Dictionary.initial(config, jax.random.key(100 * number + layer))
            save_dictionary(folder / "dictionaries" / f"{name}-{layer:02d}", random)


def compare_study(count: int) -> None:
    """Compare ``count`` of the study's dictionaries by the stage, and print its time and its peak of memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In another process, whose memory is not counted.
        writer = multiprocessing.get_context("spawn").Process(target=write_study, args=(folder,))
        writer.start()
        writer.join()
        every = sorted((folder / "dictionaries").iterdir())
        chosen = [str(every[i]) for i in np.linspace(0, len(every) - 1, count).round().astype(int)]
        flags = dict(dictionaries=",".join(chosen), measures="decoder,activity", between=50, tokens=4096)
        start, begun = time.perf_counter(), time.process_time()
        argv = ["bench_transfer", f"--workdir={folder / 'run'}", f"--model.path={folder / next(iter(STUDY))}"]
        status = command.run(
            ["transfer"], "", [*argv, *(f"--transfer.{flag}={value}" for flag, value in flags.items())]
        )
        seconds, processor = time.perf_counter() - start, time.process_time() - begun
        pairs = len((folder / "run" / "transfer" / "pairs.csv").read_text().splitlines()) - 1 if not status else 0
    peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    figures = dict(
        study=count, status=status, figures=pairs, seconds=seconds, processor_seconds=processor, peak_gb=peak
    )
    print(json.dumps(figures))


def match_activity(features: int, tokens: int, active: int = 64) -> None:
    """Match two dictionaries by their activity, and print the time and the peak of memory."""
    rng = np.random.default_rng(0)
    # Features fire from on every hundredth token to on a few, as most of a wide dictionary do.
    index_NxA = (features * rng.random((tokens, active)) ** 2).astype(np.int64)
    value_NxA = rng.lognormal(size=(tokens, active)).astype(np.float32)
    rows = []
    for noise in (0.0, 0.2):
        moved_NxA = np.where(
            rng.random(index_NxA.shape) < noise, rng.integers(features, size=index_NxA.shape), index_NxA
        )
        entries = value_NxA.reshape(-1), moved_NxA.reshape(-1), np.arange(tokens + 1) * active
        f_NxF = sparse.csr_array(entries, (tokens, features))
        f_NxF.sum_duplicates()
        rows.append(CentredRows.of(f_NxF, np.bincount(f_NxF.indices, minlength=features) >= MIN_FIRINGS))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    ((_, matched),) = match([(0, *rows)], make_mesh())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = dict(
        features=features, tokens=tokens, processor_seconds=time.process_time() - start, gap=matched.gap,
        shared=float((matched.value_F >= 0.7).mean()), peak_gb=round(peak / 1e6, 2), before_gb=round(before / 1e6, 2),
    )  # fmt: skip
    print(
        f"{features:,} features on {tokens:,} tokens: peak of memory {peak / 1e6:.2f} GB ({before / 1e6:.2f} before); "
        f"dense rows of two dictionaries take {8 * features * tokens / 1e9:.1f} GB"
    )
    print(json.dumps(figures))


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dictionaries", type=int, default=30)
    parser.add_argument("--features", type=int, default=4608)
    parser.add_argument("--d", type=int, default=576)
    parser.add_argument("--pairs", type=int, default=0, help="pairs that are matched, drawn evenly; 0: all")
    parser.add_argument("--study", type=int, default=0, help="dictionaries of the study that the stage compares")
    parser.add_argument("--tokens", type=int, default=0, help="tokens of made-up activity by which a pair is matched")
    args = parser.parse_args()
    if args.tokens:
        return match_activity(args.features, args.tokens)
    if args.study:
        return compare_study(args.study)
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
    dense = short = float("nan")
    if args.features <= EXACT:
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
        dense_solver=None if dense != dense else dense,
        short_of_dense=None if short != short else short,
        peak_gb=round(peak, 2),
        gap=gap,
    )
    print(json.dumps(dict(vars(args), matched=len(chosen), **results)))


if __name__ == "__main__":
    main()
