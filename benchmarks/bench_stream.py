"""How fast buffers of a model's activations are made: on the devices, through the host, and by the pass alone.

Run: python -m benchmarks.bench_stream [--layers 12] [--width 64] [--rows 16384] [--pairs 5]
A random Llama is read at the residual stream after each layer, in bfloat16, into a buffer that training reads from
the devices. Both ways are timed in turn and compared by ratios of pairs. The floor is the same pass with its values
dropped. Last, one line of JSON.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from saejax.activations.buffers import HostBuffers
from saejax.activations.device_buffers import DeviceBuffers
from saejax.activations.documents import COLUMNS, Documents
from saejax.activations.jax_capture import DecoderReader
from saejax.activations.plan import Plan
from saejax.models.families import read_config
from saejax.models.language_model import forward
from saejax.models.sites import Site
from saejax.models.source import resolve
from saejax.parallel.mesh import make_mesh
from saejax.settings import ModelConfig

VOCABULARY, LENGTH = 512, 128


def random_model(folder: Path, layers: int, width: int) -> None:
    """A Llama with random weights, in the hub's format."""
    torch.manual_seed(0)
    heads = dict(num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=LENGTH)
    shape = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, vocab_size=VOCABULARY)
    LlamaForCausalLM(LlamaConfig(**heads, **shape)).save_pretrained(folder)


def random_documents(rows: int) -> Documents:
    """Random tokens, in documents of one length."""
    ids_T = np.random.default_rng(0).integers(1, VOCABULARY, rows).astype(np.int32)
    offsets_N = np.append(np.arange(0, rows, LENGTH), rows).astype(np.int64)
    return Documents(ids_T, offsets_N, np.zeros((len(offsets_N) - 1, len(COLUMNS)), np.int32), ("random",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rows", type=int, default=16_384)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        random_model(Path(folder), args.layers, args.width)
        seconds = measure(Path(folder), args.layers, args.rows, args.pairs)
    ratio, of_floor = (
        float(np.median(seconds[a] / seconds[b])) for a, b in (("host", "devices"), ("floor", "devices"))
    )
    for name, values in seconds.items():
        print(f"{name:8s} {args.rows / np.median(values):12,.0f} tokens/s of all {args.layers} sites")
    print(f"on the devices {ratio:.2f} times as fast as through the host; {of_floor:.0%} of the pass alone")
    print(json.dumps(dict(vars(args), ratio=round(ratio, 3), of_floor=round(of_floor, 3))))


def measure(folder: Path, layers: int, rows: int, pairs: int) -> dict[str, np.ndarray]:
    """Seconds of each way to make a buffer, one for each pair."""
    sites = [Site("resid_post", layer) for layer in range(layers)]
    part, plan = tuple(map(str, sites)), Plan(random_documents(rows), rows, 4096, 0, 0)
    config = read_config(json.loads((folder / "config.json").read_text()), "random")
    source = resolve(ModelConfig(path=str(folder)))
    reader = DecoderReader(source, config, sites, plan.padded_shape, make_mesh(), "bfloat16", "bfloat16")
    there, here = DeviceBuffers(reader, [part], rows, "bfloat16"), HostBuffers(reader, rows, "bfloat16")

    def devices() -> None:
        there.fill(plan.batches(0))
        there.norms()

    def host() -> None:
        here.fill(plan.batches(0))
        held_SxRxD = np.stack([here.read(site, np.arange(rows)) for site in part])
        jax.block_until_ready(jax.device_put(held_SxRxD))

    dropped = jax.jit(lambda params, *batch: sum(map(jnp.sum, forward(config, tuple(sites), False, params, *batch)[1])))

    def floor() -> None:
        jax.block_until_ready([dropped(reader.params, *reader.padded(batch)) for batch in plan.batches(0)])

    ways: dict[str, Callable[[], None]] = dict(devices=devices, host=host, floor=floor)
    for way in ways.values():  # compiles
        way()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(pairs):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - start)
    for site in part:
        np.testing.assert_array_equal(there.read(site, np.arange(rows)), here.read(site, np.arange(rows)))
    return {name: np.array(values) for name, values in taken.items()}


if __name__ == "__main__":
    main()
