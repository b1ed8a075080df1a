"""What AuxK takes by the number of dead features: with their columns alone, and with all columns.

Run: python -m benchmarks.bench_auxk [--features 4608] [--width 576] [--batch 1024] [--rounds 5]
Value and gradients of one batch, both ways in turn. The floor is the time that the products of the columns that are
computed with would take, at the rate of one large product here. Last, one line of JSON.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries.auxk import auxk, room_for_few
from saejax.dictionaries.matmul import matmul

OPERANDS = "bfloat16"


def seconds_of(
    programs: dict[str, jax.stages.Compiled], arguments: tuple[jax.Array, ...], rounds: int
) -> dict[str, float]:
    """Median seconds of each program, run in turn; the first turn does not count."""
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(rounds + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            taken[name] += [time.perf_counter() - start] if turn else []
    return {name: float(np.median(each)) for name, each in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(features=4608, width=576, batch=1024, rounds=5).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    batch, features, width, k = args.batch, args.features, args.width, args.width // 2
    rng = np.random.default_rng(0)
    shapes = (batch, features), (features, width), (batch, width)
    pre_BxF, W_dec_FxD, error_BxD = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    product = jax.jit(lambda a, b: matmul(a, b, OPERANDS)).lower(pre_BxF, W_dec_FxD).compile()
    rate = 2 * batch * features * width / seconds_of(dict(one=product), (pre_BxF, W_dec_FxD), args.rounds)["one"]

    def program(all_columns: bool) -> jax.stages.Compiled:
        def loss(pre_BxF: jax.Array, W_dec_FxD: jax.Array, error_BxD: jax.Array, dead_F: jax.Array) -> jax.Array:
            return auxk(pre_BxF, dead_F, W_dec_FxD, error_BxD, k, OPERANDS, all_columns=all_columns)

        dead_F = jnp.zeros(features, bool)
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(pre_BxF, W_dec_FxD, error_BxD, dead_F).compile()

    ways, few, rows = dict(few=program(False), all=program(True)), room_for_few(features, k), []
    for share in (0.0, 0.01, 0.1, 0.5):
        dead_F = jnp.asarray(rng.random(features) < share)
        count = int(dead_F.sum())
        seconds = seconds_of(ways, (pre_BxF, W_dec_FxD, error_BxD, dead_F), args.rounds)
        columns = 0 if not count else few if count <= few else features
        floor = 6 * batch * columns * width / rate
        rows.append(dict(dead=count, **seconds, ratio=seconds["all"] / seconds["few"], floor=floor / seconds["few"]))
        print(
            f"{count:6,} of {features:,} dead: {seconds['few'] * 1e3:.1f} ms, all columns {seconds['all'] * 1e3:.1f} "
            f"({rows[-1]['ratio']:.2f} times); products alone {rows[-1]['floor']:.0%}",
            flush=True,
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
