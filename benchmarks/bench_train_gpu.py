"""Speed of training on an accelerator, from synthetic activations of the shapes of real runs.

Run: python -m benchmarks.bench_train_gpu [--parts dense,topk,study] [--tiny]
dense: one dictionary d 2304, F 32,768, batch 8,192, bf16 products: the share of the rate of a matrix product of the
same operands that 12 d F operations a token come to. topk: the same shape for TopK and BatchTopK with k 64 and AuxK
idle, against the tokens/s that the dense floor would allow. study: the four dictionaries of the reasoning study's Phase
4 (linear, 20 epochs, which took it 372 s together), whole epochs in one program, and the held-out explained variance of
batch 1,024 beside batch 32. Compiling is counted in none but printed. Last comes one line of JSON. --tiny runs it all
in small shapes.
"""

import argparse
import json
import time

from saejax.runner import environment

environment.for_libraries()
environment.for_devices(deterministic=False, shares_gpu=False)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402

from benchmarks.train_setup import Stepper, make_stack, matmul_rate, sparse_sums  # noqa: E402
from saejax.training.state import finish_dictionary, init_state  # noqa: E402
from saejax.training.step import train_step  # noqa: E402

DENSE = ("standard", "jumprelu", "linear")
STUDY = ((1024, 8192, 50_000), (2048, 16_384, 50_000), (2048, 16_384, 10_000), (2560, 20_480, 20_000))
EPOCHS = 20
STUDY_SECONDS = 372.0  # of the study's own trainer, for all four


def measure_steps(args: argparse.Namespace) -> dict[str, float]:
    """Return the speed of each kind as a multiple of the dense floor, which is set by the measured matmul rate."""
    batches, shape = sparse_sums(2, args.batch, args.d), (args.batch, args.d, args.features)
    wanted = {kind: (kind, "auto") for kind in DENSE if "dense" in args.parts}
    if "topk" in args.parts:
        wanted |= {kind: (kind, "dense") for kind in ("topk", "batchtopk")}
    ratios = {}
    for name, (kind, products) in wanted.items():
        shape_of = kind, args.d, args.features, args.batch, args.k, "bfloat16"
        stepper = Stepper(make_stack(*shape_of, products=products), batches)
        stepper.run(3)  # compiles
        rate = matmul_rate("bfloat16", *shape, repeats=20)
        speeds = [args.steps * args.batch / stepper.run(args.steps) for _ in range(3)]
        flops_per_token = 12 * args.d * args.features  # encoder and decoder, forward and backward
        floor = rate / flops_per_token
        ratios[name] = float(np.median(speeds)) / floor
        print(
            f"{name:12} {np.median(speeds):12,.0f} tokens/s, {ratios[name]:.2f} of the dense floor of {floor:,.0f}, "
            f"{np.median(speeds) * flops_per_token / rate:.2f} of {rate / 1e12:.1f} TFLOP/s",
            flush=True,
        )
    return ratios


def train_epochs(
    d: int, features: int, rows_NxD: np.ndarray, held_out_NxD: np.ndarray, batch: int, matmul: str
) -> dict:
    """Return the seconds of all epochs, compiling apart, and the held-out explained variance."""
    per_epoch = len(rows_NxD) // batch
    rate = 1e-3 * (batch / 32) ** 0.5  # Adam's with the root of the batch
    settings = dict(l1=(1e-4,), decorrelation=0.01, learning_rate=(rate,), steps=per_epoch * EPOCHS)
    stack = make_stack("linear", d, features, batch, 1, matmul, **settings)
    data_NxD, state, hyper = jnp.asarray(rows_NxD), init_state(stack), stack.hyperparams

    def epoch(state, hyper, data_NxD, order_N):
        def step(state, place_B):
            return train_step(stack, state, hyper, (data_NxD[place_B][None],))[0], None

        return lax.scan(step, state, order_N[: per_epoch * batch].reshape(per_epoch, batch))[0]

    orders = [jnp.asarray(np.random.default_rng(e).permutation(len(rows_NxD)).astype(np.int32)) for e in range(EPOCHS)]
    start = time.perf_counter()
    run = jax.jit(epoch, donate_argnums=0).lower(state, hyper, data_NxD, orders[0]).compile()
    compiled = time.perf_counter()
    for order_N in orders:
        state = run(state, hyper, data_NxD, order_N)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - compiled
    error = np.asarray(held_out_NxD - finish_dictionary(stack, state, 0)(jnp.asarray(held_out_NxD)), np.float64)
    variance = np.square(held_out_NxD - held_out_NxD.mean(0), dtype=np.float64).sum()
    return dict(seconds=seconds, compiling=compiled - start, explained=1 - np.square(error).sum() / variance)


def measure_study(args: argparse.Namespace) -> dict[str, float]:
    """Train the shapes of the study in large batches and at batch 32; return the seconds and the worst ratio."""
    total, ratios = 0.0, []
    for d, features, tokens in args.study:
        vectors = sparse_sums(1, tokens + tokens // 10, d)[0]
        rows, held_out = vectors[:tokens], vectors[tokens:]
        large, small = (
            train_epochs(d, features, rows, held_out, batch, "bfloat16") for batch in (args.study_batch, 32)
        )
        total += large["seconds"]
        ratios.append(large["explained"] / small["explained"])
        print(
            f"{d} -> {features:,}, {tokens:,} tokens, {EPOCHS} epochs: {large['seconds']:.2f} s at batch "
            f"{args.study_batch:,} (compiling {large['compiling']:.1f} s), {small['seconds']:.1f} s at batch 32; "
            f"held-out explained variance {large['explained']:.4f} and {small['explained']:.4f}",
            flush=True,
        )
    print(f"all four in {total:.1f} s; the study took {STUDY_SECONDS:.0f} s")
    return dict(study_seconds=round(total, 2), explained_to_batch_32=round(min(ratios), 4))


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="dense,topk,study", help="which of them to measure")
    parser.add_argument("--d", type=int, default=2304)
    parser.add_argument("--features", type=int, default=32_768)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--tiny", action="store_true", help="small shapes: does it run? (kernels are interpreted on a CPU)"
    )
    args = parser.parse_args()
    args.parts, args.study, args.study_batch = args.parts.split(","), STUDY, 1024
    if args.tiny:
        args.d, args.features, args.batch, args.k, args.steps = 64, 1024, 256, 16, 2
        args.study, args.study_batch = ((16, 128, 8000), (32, 256, 4000)), 256
    print(f"{jax.devices()[0].device_kind}; d {args.d}, F {args.features:,}, batch {args.batch:,}, bf16 products")
    steps = measure_steps(args)
    line = dict(bench="train_gpu", floor={kind: round(share, 3) for kind, share in steps.items() if kind in DENSE})
    line |= {f"{name}_to_dense_floor": round(share, 2) for name, share in steps.items() if name not in DENSE}
    if "study" in args.parts:
        line |= measure_study(args)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
