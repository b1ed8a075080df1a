"""Speed of training: against sae-lens, against the machine's matrix products, and of the input pipeline and stacks.

Run: python -m benchmarks.bench_train [--parts kinds,input,stack] [--kinds standard,topk] [--d 576] [--features 4608]
Ours and sae-lens' own trainer take turns on the same activations in memory, each through whole steps with Adam,
clipping, schedules and dead counters, each in fp32 and with bf16 products (autocast there); the better one of each
counts. The floor of a dense kind is 12 d F operations a token, of a top-k kind 2 d F, at the rate of a matrix product
of the same operands, measured in between. Compiling is not counted, but for the stack. sae-lens is installed into
build/saelens/ on first use, or found by --saelens. Prints tables and, last, one line of JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from saejax.runner.environment import keep_freed_memory

keep_freed_memory()  # as every binary does, before JAX starts

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.bench_input import PARTS, SITE, WINDOW_ROWS, random_store  # noqa: E402
from benchmarks.tool_environments import saelens_python  # noqa: E402
from benchmarks.train_setup import Stepper, make_stack, matmul_rate, sparse_sums  # noqa: E402
from saejax.activations.batches import READ_OPTIONS, make_batches  # noqa: E402
from saejax.activations.store import Store  # noqa: E402
from saejax.training.state import init_state  # noqa: E402
from saejax.training.step import compile_step  # noqa: E402

DTYPES = ("float32", "bfloat16")
COMPARED = ("standard", "jumprelu", "topk", "batchtopk", "matryoshka")
KINDS = (*COMPARED, "gated", "linear")
# Floating-point operations per token, in d F: encoder and decoder forwards and twice backwards; for gated the decoder
# of its gate's own error once more, forwards and backwards to the features; top-k kinds need only the encoder densely.
FLOOR = dict(standard=12, jumprelu=12, linear=12, gated=16, topk=2, batchtopk=2, matryoshka=2)
K = 32


class SaeLens:
    """sae-lens' trainer in a process of its own, which idles between requests.

    Args:
      python: an interpreter that has it.
      activations: an .npy file of batches [N, B, D].
      features, k: of its dictionaries.
    """

    def __init__(self, python: str, activations: Path, features: int, k: int):
        script = Path(__file__).with_name("bench_train_saelens.py")
        command = [python, "-W", "ignore", str(script), str(activations), str(features), str(k)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request: object) -> float:
        """Send a request to the process; return the seconds that it took."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("sae-lens' process ended: see what it printed above")
        return float(json.loads(line)["seconds"])

    def close(self) -> None:
        """End its process."""
        self._process.communicate()


def measure_kind(kind: str, args: argparse.Namespace, batches: np.ndarray, theirs: SaeLens | None) -> dict:
    """Return tokens per second of ours and theirs, and our share of the floor, by precision: medians over rounds."""
    ours = {dtype: Stepper(make_stack(kind, args.d, args.features, args.batch, K, dtype), batches) for dtype in DTYPES}
    compared = theirs is not None and kind in COMPARED
    shape, flops = (args.batch, args.d, args.features), FLOOR[kind] * args.d * args.features
    for dtype in DTYPES:  # compiles, and touches all memory
        ours[dtype].run(2)
        if compared:
            theirs.ask(kind=kind, autocast=dtype == "bfloat16", steps=1)
    our_rates: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    their_rates: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    share: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    for _ in range(args.rounds):
        for dtype in DTYPES:
            before = matmul_rate(dtype, *shape)
            our_rates[dtype].append(args.steps * args.batch / ours[dtype].run(args.steps))
            share[dtype].append(our_rates[dtype][-1] * flops / ((before + matmul_rate(dtype, *shape)) / 2))
            if compared:
                seconds = theirs.ask(kind=kind, autocast=dtype == "bfloat16", steps=args.steps)
                their_rates[dtype].append(args.steps * args.batch / seconds)
    if compared:
        theirs.ask(forget=True)
    medians = [
        {dtype: float(np.median(values)) for dtype, values in side.items() if values}
        for side in (our_rates, their_rates, share)
    ]
    return dict(zip(("ours", "theirs", "floor"), medians, strict=True))


def measure_kinds(args: argparse.Namespace) -> dict[str, dict]:
    """Measure every kind, and print a table."""
    batches = sparse_sums(4, args.batch, args.d)
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "activations.npy"
        np.save(path, batches)
        compared = not args.tiny and set(args.kinds) & set(COMPARED)
        theirs = SaeLens(args.saelens or saelens_python(), path, args.features, K) if compared else None
        print(f"d {args.d}, F {args.features:,}, batch {args.batch:,}; tokens/s, and ours as a share of the floor")
        print(
            f"{'kind':11}{'ours fp32':>11}{'bf16':>9}{'sae-lens fp32':>15}{'bf16':>9}{'ratio':>7}"
            f"{'floor fp32':>12}{'bf16':>7}"
        )
        for kind in args.kinds:
            measured[kind] = result = measure_kind(kind, args, batches, theirs)
            theirs_shown = "".join(
                f"{result['theirs'][dtype]:{width},.0f}" if result["theirs"] else f"{'':{width}}"
                for dtype, width in zip(DTYPES, (15, 9), strict=True)
            )
            ratio = f"{ratio_of(result):7.2f}" if result["theirs"] else f"{'':7}"
            ours, floor = result["ours"], result["floor"]
            print(
                f"{kind:11}{ours['float32']:11,.0f}{ours['bfloat16']:9,.0f}{theirs_shown}{ratio}"
                f"{floor['float32']:12.0%}{floor['bfloat16']:7.0%}",
                flush=True,
            )
        if theirs:
            theirs.close()
    return measured


def ratio_of(result: dict) -> float:
    """Return the ratio of our speed to theirs, each in its faster precision."""
    return max(result["ours"].values()) / max(result["theirs"].values())


def standard_rate(args: argparse.Namespace) -> float:
    """Return the tokens per second of a standard dictionary with bf16 products."""
    stack = make_stack("standard", args.d, args.features, args.batch, K, "bfloat16")
    stepper = Stepper(stack, sparse_sums(2, args.batch, args.d))
    stepper.run(2)  # compiles
    return 4 * args.batch / stepper.run(4)


def measure_input(args: argparse.Namespace, training: float) -> float:
    """Print the rows per second of the input pipeline alone; return it as a multiple of a training rate."""
    with tempfile.TemporaryDirectory() as folder:
        store = random_store(Path(folder), 40 * args.batch, args.d, "bfloat16", 65_536)
        rates = []
        for epoch in range(3):  # the first one maps the files
            start = time.perf_counter()
            batches = make_batches(store, PARTS, args.batch, epoch, 1, WINDOW_ROWS).to_iter_dataset(READ_OPTIONS)
            rows = sum(batch[0].shape[1] for batch in batches)
            rates.append(rows / (time.perf_counter() - start))
    rate = float(np.median(rates[1:]))
    print(f"input pipeline alone: {rate:,.0f} tokens/s, {rate / training:.1f} times the fastest training")
    return rate / training


def train_members(store_folder: str, seeds: Sequence[int], args: argparse.Namespace) -> float:
    """Train a dictionary per seed on a store, as one stack; return the seconds of a step without compiling."""
    store = Store.open(Path(store_folder))
    stack = make_stack("topk", store.d(SITE), 4 * store.d(SITE), args.batch, K, "bfloat16", seeds)
    train_step, state, times, metrics = compile_step(stack), init_state(stack), [], None
    batches = make_batches(store, PARTS, args.batch, 0, args.epochs, WINDOW_ROWS).to_iter_dataset(READ_OPTIONS)
    for (batch,) in batches:
        placed = (jax.make_array_from_process_local_data(stack.batch_sharding, batch),)
        jax.block_until_ready(metrics)  # one step ahead of the device, as the training loop
        times.append(time.perf_counter())
        state, metrics = train_step(state, stack.hyperparams, placed)
    jax.block_until_ready(metrics)
    return float((times[-1] - times[2]) / (len(times) - 3))


def measure_stack(args: argparse.Namespace) -> tuple[float, float]:
    """Print a stack of dictionaries (d 256, F 1,024) against as many runs in turn: everything, and step to step."""
    seeds = list(range(args.members))
    with tempfile.TemporaryDirectory() as folder:
        random_store(Path(folder), args.stack_rows, 256, "bfloat16", 65_536)

        def child(seeds: Sequence[int]) -> tuple[float, float]:
            command = [
                sys.executable,
                "-m",
                "benchmarks.bench_train",
                f"--batch={args.batch}",
                f"--epochs={args.epochs}",
            ]
            command += [f"--train_on={folder}", f"--seeds={','.join(map(str, seeds))}"]
            start = time.perf_counter()
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
            return time.perf_counter() - start, float(done.stdout.splitlines()[-1])

        together, step_together = child(seeds)
        alone = [child([seed]) for seed in seeds]
    whole = sum(seconds for seconds, _ in alone) / together
    steady = sum(step for _, step in alone) / step_together
    print(
        f"{args.members} dictionaries d 256, F 1,024: as one stack {together:.0f} s, in turn {whole * together:.0f} s: "
        f"{whole:.2f} times as fast, start, compiling and reading included; step to step {steady:.2f}"
    )
    return whole, steady


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="kinds,input,stack", help="which of them to measure")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--d", type=int, default=576)
    parser.add_argument("--features", type=int, default=4608)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="steps of each side in a round")
    parser.add_argument("--members", type=int, default=8, help="of the stack")
    parser.add_argument("--stack_rows", type=int, default=120_000, help="rows of the store that the stack trains on")
    parser.add_argument("--epochs", type=int, default=1, help="of the stack")
    parser.add_argument("--saelens", default="", help="an interpreter that has sae-lens; empty: one is installed")
    parser.add_argument("--tiny", action="store_true", help="small shapes, without sae-lens: does it run?")
    parser.add_argument("--train_on", default="", help=argparse.SUPPRESS)
    parser.add_argument("--seeds", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.kinds = args.kinds.split(",")
    if args.tiny:
        args.d, args.features, args.batch, args.rounds, args.members, args.stack_rows = 64, 2048, 256, 1, 2, 4000
    if args.train_on:
        print(train_members(args.train_on, [int(seed) for seed in args.seeds.split(",")], args))
        return
    parts, line = args.parts.split(","), dict(bench="train")
    fastest = 0.0
    if "kinds" in parts:
        measured = measure_kinds(args)
        line["ratio"] = {kind: round(ratio_of(result), 2) for kind, result in measured.items() if result["theirs"]}
        line["floor"] = {kind: round(result["floor"]["float32"], 2) for kind, result in measured.items()}
        line["floor_bf16"] = {kind: round(result["floor"]["bfloat16"], 2) for kind, result in measured.items()}
        fastest = max(max(result["ours"].values()) for result in measured.values())
    if "stack" in parts:
        whole, steady = measure_stack(args)
        line |= dict(stack=round(whole, 2), stack_steady=round(steady, 2))
    if "input" in parts:
        line["input"] = round(measure_input(args, fastest or standard_rate(args)), 1)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
