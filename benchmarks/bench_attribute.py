"""How fast attribution graphs are made: random transcoders on the embedded SmolLM2, fp32.

Run: python -m benchmarks.bench_attribute [--rows 3000] [--tokens 11] [--growth [--growth-rows 512]]
The transcoders have 2,048 features a layer, of which 18 are active at each position, so 11 tokens have 5,400 active
features. The first graph compiles; the second and third are timed. The floor is the arithmetic of the transposed
frozen layers, the output and value projections of attention, for the layers below each target and the positions up to
its own, at the speed of one large product of matrices on the same machine. With --growth, other lengths of prompts
follow, each in a process of its own. Prints a table and, last, one line of JSON.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import saejax
from saejax.attribution.graph import Graph
from saejax.attribution.graph.nodes import FEATURE
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.attribution.trace.rows import row_flops
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.models.config import DecoderConfig

FEATURES, ACTIVE = 2048, 18
GROWTH = (16, 64, 256, 1024)
TEXT = (
    "One day she said that there was a way to see where the water went, and that it was not far from here. The road "
    "led past the mill and over the hill to a small lake. "
)


def random_transcoders(config: DecoderConfig, seed: int = 0) -> LayerTranscoders:
    """A transcoder of random directions for each layer, in memory."""
    kinds = [
        DictionaryConfig(
            kind="topk", site=f"mlp_in.{layer}", target=f"mlp_out.{layer}", d_in=config.d_model, n_features=FEATURES,
            k=ACTIVE, centred=False,
        )
        for layer in range(config.n_layers)
    ]  # fmt: skip
    key = jax.random.key(seed)
    dictionaries = [Dictionary.initial(kind, jax.random.fold_in(key, layer)) for layer, kind in enumerate(kinds)]
    return LayerTranscoders.of(dictionaries, "random transcoders")


def floor_gflop(graph: Graph, config: DecoderConfig) -> float:
    """The arithmetic of the projections of attention that the targets need, in 10^9 operations."""
    nodes = graph.nodes[graph.target_R]
    layers_T = np.where(nodes.kind_N == FEATURE, nodes.layer_N + 1, config.n_layers)
    return row_flops(config, layers_T, nodes.position_N + 1) / 1e9


def gflops(size: int = 1024, products: int = 100) -> float:
    """Speed of a product of matrices, 10^9 operations a second."""
    a, b = jnp.ones((size, 576)), jnp.ones((576, 576)) / 576
    run = jax.jit(lambda a, b: jax.lax.fori_loop(0, products, lambda _, a: a @ b, a))
    run(a, b).block_until_ready()
    start = time.perf_counter()
    run(a, b).block_until_ready()
    return products * 2 * size * 576 * 576 / (time.perf_counter() - start) / 1e9


def measure(rows: int, tokens: int, rounds: int) -> dict[str, float]:
    """Seconds, with compiling and without, peak memory and share of the floor of one size."""
    lm = saejax.load_model("smollm2")
    ids_P = lm.tokenize([TEXT * (1 + tokens // 40)]).ids_BxT[0][: tokens - 1]
    prompt = [lm.tokenizer.bos_token_id, *ids_P.tolist()]
    transcoders, seconds = random_transcoders(lm.config), []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        graph = saejax.trace(lm, transcoders, prompt, max_features=rows)
        seconds.append(time.perf_counter() - start)
    steady = float(np.median(seconds[1:] or seconds))
    floor = floor_gflop(graph, lm.config) / gflops()
    left = float(np.abs(graph.unexplained_R).max() / np.abs(graph.value_R).max())
    return dict(
        rows=graph.count(FEATURE),
        active=graph.settings["active_features"],
        seconds=round(steady, 2),
        compile_s=round(seconds[0] - steady, 1),
        peak_gb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        of_floor=round(floor / steady, 2),
        unexplained=left,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000, help="features with a row")
    parser.add_argument("--tokens", type=int, default=11)
    parser.add_argument("--rounds", type=int, default=2, help="timed runs; 0: the first, which compiles")
    parser.add_argument("--growth", action="store_true", help="other lengths of prompts too")
    parser.add_argument("--growth-rows", type=int, default=512, help="features with a row there, at the most")
    args = parser.parse_args()
    names = ("tokens", "active", "rows", "seconds", "compile", "ms/row", "peak GB", "of floor")
    print(" ".join(f"{name:>8}" for name in names))

    def show(tokens: int, found: dict) -> None:
        print(
            f"{tokens:8} {found['active']:8,} {found['rows']:8,} {found['seconds']:8.2f} {found['compile_s']:8.1f} "
            f"{1000 * found['seconds'] / found['rows']:8.2f} {found['peak_gb']:8.2f} {found['of_floor']:8.0%}",
            flush=True,
        )

    found = measure(args.rows, args.tokens, args.rounds)
    show(args.tokens, found)
    for tokens in GROWTH if args.growth else ():
        command = [sys.executable, "-m", "benchmarks.bench_attribute", "--rounds=1"]
        command += [f"--tokens={tokens}", f"--rows={args.growth_rows}"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        show(tokens, json.loads(printed.splitlines()[-1]))
    print(json.dumps(dict(bench="attribute", **found)))


if __name__ == "__main__":
    main()
