"""Time of AuxK by the number of dead features: with their columns alone, and with all columns.

Run: python -m benchmarks.bench_auxk [--features 4608] [--width 576] [--batch 1024] [--rounds 5]
Value and gradients of one batch, both ways in turn. The floor is the time that the products of the columns that are
computed with would take, at the rate of one large product here. Last, one line of JSON.
"""

import argparse
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.by_turns import medians, seconds
from benchmarks.train_setup import matmul_rate
from saejax.dictionaries.losses import AuxKForm, auxk, dead_columns

OPERANDS = "bfloat16"


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(features=4608, width=576, batch=1024, rounds=5).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    batch, features, width, k = args.batch, args.features, args.width, args.width // 2
    rng = np.random.default_rng(0)
    shapes = (batch, features), (features, width), (batch, width)
    pre_BxF, W_dec_FxD, error_BxD = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    rate = matmul_rate(OPERANDS, batch, width, features)

    def program(all_columns: bool) -> jax.stages.Compiled:
        def loss(pre_BxF: jax.Array, W_dec_FxD: jax.Array, error_BxD: jax.Array, dead_F: jax.Array) -> jax.Array:
            return auxk(pre_BxF, dead_F, W_dec_FxD, error_BxD, AuxKForm(k, OPERANDS, all_columns))

        dead_F = jnp.zeros(features, bool)
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(pre_BxF, W_dec_FxD, error_BxD, dead_F).compile()

    ways, few, rows = dict(few=program(False), all=program(True)), dead_columns(features, k), []
    for share in (0.0, 0.01, 0.1, 0.5):
        dead_F = jnp.asarray(rng.random(features) < share)
        count = int(dead_F.sum())
        arguments = pre_BxF, W_dec_FxD, error_BxD, dead_F
        taken = {name: functools.partial(seconds, way, *arguments) for name, way in ways.items()}
        timings = medians(taken, args.rounds)
        columns = 0 if not count else few if count <= few else features
        floor = 6 * batch * columns * width / rate
        rows.append(dict(dead=count, **timings, ratio=timings["all"] / timings["few"], floor=floor / timings["few"]))
        print(
            f"{count:6,} of {features:,} dead: {timings['few'] * 1e3:.1f} ms, all columns {timings['all'] * 1e3:.1f} "
            f"({rows[-1]['ratio']:.2f} times); products alone {rows[-1]['floor']:.0%}",
            flush=True,
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
