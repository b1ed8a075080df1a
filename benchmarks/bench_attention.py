"""Attention of long prompts: tiles beside blocks of queries, in time and in memory.

Run: python -m benchmarks.bench_attention [--tokens 2048,4096] [--rounds 5]
One layer's attention for one prompt with the heads of SmolLM2-135M in float32, forward and with a gradient, is timed by
turns both ways on this machine, with the share of the time that its products alone take at the rate of one large
product here. Where libtpu is installed, that of 32 heads of 128 in bfloat16 is compiled for a v5e, and the memory that
the compiler sets aside printed. Last comes one line of JSON.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.by_turns import medians, seconds
from saejax.models import attention
from saejax.models.attention import whole_prompts
from saejax.models.config import GRADIENT, DecoderConfig
from saejax.models.families import read_config
from saejax.preflight.topology import find_slice

SHAPES = Path(__file__).parents[1] / "configs/shapes"
NEVER = 10**9
WAYS = {"blocks": NEVER, "tiles": 0}


def config_of(heads: int, kv_heads: int, width: int) -> DecoderConfig:
    """A decoder of such heads."""
    fields = json.loads((SHAPES / "qwen3-4b.json").read_text())
    config = read_config(fields, "qwen3-4b")
    return dataclasses.replace(config, n_heads=heads, n_kv_heads=kv_heads, d_head=width)


def programs(config: DecoderConfig, tokens: int, gradient: bool) -> Iterator[tuple[str, Any]]:
    """Both ways, each to be compiled before the next is asked for."""
    usual = attention.TILES_FROM
    for name, start in WAYS.items():

        def mean(q_xTxHxK: jax.Array, k_xTxNxK: jax.Array, v_xTxNxK: jax.Array) -> jax.Array:
            tables = whole_prompts(config, tokens).at(config, 0)
            return jnp.mean(
                attention.attend(config, GRADIENT, q_xTxHxK, k_xTxNxK, v_xTxNxK, tables).astype(jnp.float32)
            )

        attention.TILES_FROM = start
        yield name, jax.jit(jax.grad(mean, argnums=(0, 1, 2)) if gradient else mean)
        attention.TILES_FROM = usual


def rate() -> float:
    """FLOP/s of one large product here."""
    a_BxK = jnp.ones((2048, 2048))
    product = jax.jit(lambda a_BxK: a_BxK @ a_BxK)
    return 2 * 2048**3 / min([seconds(product, a_BxK) for _ in range(4)][1:])


def timed(tokens: int, rounds: int, gradient: bool) -> dict[str, float]:
    """Median seconds of each way by turns, and the ratio."""
    config = config_of(9, 3, 64)
    heads = config.n_heads, config.n_kv_heads, config.n_kv_heads
    qkv = [jax.random.normal(jax.random.key(i), (1, tokens, n, config.d_head)) for i, n in enumerate(heads)]
    ready = {name: program.lower(*qkv).compile() for name, program in programs(config, tokens, gradient)}
    found = medians({name: functools.partial(seconds, way, *qkv) for name, way in ready.items()}, rounds)
    flops = (7 if gradient else 2) * tokens**2 * config.n_heads * config.d_head  # of the half that is attended to
    return found | dict(ratio=found["tiles"] / found["blocks"], floor=flops / rate() / found["tiles"])


def memory(tokens: int, gradient: bool) -> dict[str, float]:
    """Megabytes that a v5e's compiler sets aside."""
    config, device = config_of(32, 8, 128), find_slice("v5e:2x4").devices[:1]
    where = NamedSharding(Mesh(np.array(device), ("data",)), PartitionSpec())
    heads = config.n_heads, config.n_kv_heads, config.n_kv_heads
    qkv = [jax.ShapeDtypeStruct((1, tokens, n, config.d_head), jnp.bfloat16, sharding=where) for n in heads]
    found = {}
    for name, program in programs(config, tokens, gradient):
        found[name] = program.lower(*qkv).compile().memory_analysis().temp_size_in_bytes / 2**20
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")], default=[1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for tokens in args.tokens:
        for gradient in (False, True):
            row = timed(tokens, args.rounds, gradient)
            rows.append(dict(tokens=tokens, gradient=gradient, **row))
            print(
                f"{tokens:6,} tokens {'gradient' if gradient else 'forward ':8}  blocks {row['blocks']:.3f} s  tiles "
                f"{row['tiles']:.3f} s  ratio {row['ratio']:.2f}  products alone {row['floor']:.0%}",
                flush=True,
            )
    for tokens in (4096, 8192) if importlib.util.find_spec("libtpu") else ():
        for gradient in (False, True):
            row = memory(tokens, gradient)
            rows.append(dict(tokens=tokens, gradient=gradient, megabytes=row))
            kind = "gradient" if gradient else "forward "
            print(
                f"{tokens:6,} tokens {kind:8}  v5e: blocks {row['blocks']:,.0f} MB  tiles {row['tiles']:,.1f} MB",
                flush=True,
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
