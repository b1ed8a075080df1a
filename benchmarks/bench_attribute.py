"""Speed of attribution graphs: random transcoders on the embedded SmolLM2, fp32.

Run: python -m benchmarks.bench_attribute [--rows 3000] [--tokens 11] [--growth [--growth-rows 512]]
The transcoders have 2,048 features a layer, of which 18 are active at each position, so 11 tokens have 5,400 active
features. The first prompt compiles; two others of its length are timed, and what they compile is counted. The floor is
the arithmetic of the transposed frozen layers, the output and value projections of attention, for the layers below each
target and the positions up to its own, at the speed of one large product of matrices on the same machine. Times of the
process on all cores stand beside those on the clock: they hold where others use the machine, too. With --growth, other
lengths of prompts follow, each in a process of its own. Prints a table and, last, one line of JSON.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import saejax
from saejax.attribution.graph import Graph
from saejax.attribution.graph.data import FEATURE
from saejax.attribution.local.dictionaries import LayerTranscoders
from saejax.attribution.trace.prompt import trace_prompt
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.models.config import DecoderConfig

FEATURES, ACTIVE = 2048, 18
GROWTH = (16, 64, 256, 1024)
COMPILED = "/jax/core/compile/backend_compile_duration"  # of jax.monitoring
TEXT = (
    "One day she said that there was a way to see where the water went, and that it was not far from here. The road "
    "led past the mill and over the hill to a small lake. "
)


def random_transcoders(config: DecoderConfig, seed: int = 0) -> LayerTranscoders:
    """Return a transcoder of random directions for each layer, in memory."""
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


def row_flops(model: DecoderConfig, layers: np.ndarray | float, positions: np.ndarray | float) -> float:
    """Return the least number of operations of rows of a graph; a product of [m, k] and [k, n] has 2 m k n.

    That is the transposed projections of values and outputs of attention.

    Args:
      model: of the decoder.
      layers: how many layers each target goes down through, [R] or one number.
      positions: the positions up to its own.
    """
    per_token = 2.0 * model.d_model * model.d_head * (model.n_heads + model.n_kv_heads)
    return float(np.sum(np.asarray(layers, np.float64) * positions)) * per_token


def graph_flops(graph: Graph, model: DecoderConfig) -> float:
    """Return the operations that all rows of a whole graph need at least."""
    nodes = graph.nodes[graph.target_R]
    layers_R = np.where(nodes.kind_N == FEATURE, nodes.layer_N + 1, model.n_layers)
    return row_flops(model, layers_R, nodes.position_N + 1)


def gflops(size: int = 1024, products: int = 100) -> float:
    """Return the speed of a matrix product in fp32, GFLOP/s."""
    a, b = jnp.ones((size, 576)), jnp.ones((576, 576)) / 576
    run = jax.jit(lambda a, b: jax.lax.fori_loop(0, products, lambda _, a: a @ b, a))
    run(a, b).block_until_ready()
    start = time.perf_counter()
    run(a, b).block_until_ready()
    return products * 2 * size * 576 * 576 / (time.perf_counter() - start) / 1e9


def peak_gb() -> float:
    """Return the most memory that the process had, weights and compiler included."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)


class Clock:
    """Wall-clock and processor seconds, [2], of named steps that run once for each prompt."""

    def __init__(self) -> None:
        self.taken: dict[str, list[np.ndarray]] = {}

    @contextmanager
    def times(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to the times of step ``name``."""
        start = np.array([time.perf_counter(), time.process_time()])
        yield
        self.taken.setdefault(name, []).append(np.array([time.perf_counter(), time.process_time()]) - start)

    def steady(self, name: str) -> np.ndarray:
        """Return the median of all prompts but the first, which compiles."""
        return np.median(self.taken[name][1:] or self.taken[name], axis=0)


def measure(rows: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of each part, with compiling and without, peak memory and share of the floor of one size."""
    lm = saejax.load_model("smollm2")
    ids_P = lm.tokenize([TEXT * (2 + tokens // 40)]).ids_BxT[0]
    transcoders, clock = random_transcoders(lm.config), Clock()
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    for start in range(1 + rounds):
        if start == 1:
            events.clear()
        graph = None  # of the last prompt, which the stage does not keep either
        prompt = [lm.tokenizer.bos_token_id, *ids_P[start : start + tokens - 1].tolist()]
        with clock.times("trace"):
            graph = trace_prompt(lm, transcoders, prompt, max_features=rows).graph
    compiled_later = events.count(COMPILED) if rounds else None
    speed, (seconds, cpu_s) = gflops(), clock.steady("trace")
    return dict(
        rows=graph.count(FEATURE),
        active=graph.settings["active_features"],
        seconds=round(seconds, 2),
        cpu_s=round(cpu_s, 2),
        compile_s=round(clock.taken["trace"][0][0] - seconds, 1),
        compiled_later=compiled_later,
        peak_gb=peak_gb(),
        of_floor=round(graph_flops(graph, lm.config) / 1e9 / speed / seconds, 2),
        unexplained=float(np.abs(graph.unexplained_R).max() / np.abs(graph.value_R).max()),
    )


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000, help="features with a row")
    parser.add_argument("--tokens", type=int, default=11)
    parser.add_argument("--rounds", type=int, default=2, help="timed runs; 0: the first, which compiles")
    parser.add_argument("--growth", action="store_true", help="other lengths of prompts too")
    parser.add_argument("--growth-rows", type=int, default=512, help="features with a row there, at the most")
    args = parser.parse_args()
    names = ("tokens", "active", "rows", "seconds", "CPU s", "compile", "ms/row", "peak GB", "of floor")
    print(" ".join(f"{name:>8}" for name in names))

    def show(tokens: int, results: dict[str, Any]) -> None:
        print(
            f"{tokens:8} {results['active']:8,} {results['rows']:8,} {results['seconds']:8.2f} {results['cpu_s']:8.2f} "
            f"{results['compile_s']:8.1f} {1000 * results['seconds'] / results['rows']:8.2f} "
            f"{results['peak_gb']:8.2f} {results['of_floor']:8.0%}",
            flush=True,
        )

    results = measure(args.rows, args.tokens, args.rounds)
    show(args.tokens, results)
    for tokens in GROWTH if args.growth else ():
        command = [sys.executable, "-m", "benchmarks.bench_attribute", "--rounds=1"]
        command += [f"--tokens={tokens}", f"--rows={args.growth_rows}"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        show(tokens, json.loads(printed.splitlines()[-1]))
    print(f"programs that later prompts compiled: {results['compiled_later']}")
    print(json.dumps(dict(bench="attribute", **results)))


if __name__ == "__main__":
    main()
