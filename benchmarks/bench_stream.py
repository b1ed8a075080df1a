"""Speed of filling buffers with a model's activations: on the devices, through the host, and by the pass alone.

Run: python -m benchmarks.bench_stream [--models 16:32:float32 128:128:float32 64:128:bfloat16] [--layers 12]
         [--rows 16384] [--pairs 5]
Random Llamas, each given as width:tokens of a text:dtype, are read at the residual stream after each layer into a
buffer that training reads from the devices. Both ways are timed in turn and compared by ratios of pairs. The floor is
the same pass with its values dropped: no way is faster, so the floor over the host's way is the most that the ratio
can be. Last, one line of JSON.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from saejax.activations.buffers import ShardBuffers
from saejax.activations.device_buffers import DeviceBuffers
from saejax.activations.documents import COLUMNS, Documents
from saejax.activations.jax_capture import DecoderReader
from saejax.activations.plan import Plan
from saejax.models.families import read_config
from saejax.models.language_model import forward
from saejax.models.settings import ModelConfig
from saejax.models.sites import Site
from saejax.models.source import resolve
from saejax.parallel.mesh import make_mesh

VOCABULARY = 512


class Shape(NamedTuple):
    """The shape of a model and its texts."""

    width: int
    length: int  # tokens of a text
    dtype: str

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Return the shape that "576:128:float32" stands for."""
        width, length, dtype = text.split(":")
        return cls(int(width), int(length), dtype)


def random_model(folder: Path, layers: int, width: int, length: int) -> None:
    """Write a Llama with random weights, in the hub's format."""
    torch.manual_seed(0)
    heads = dict(num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=length)
    shape = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, vocab_size=VOCABULARY)
    LlamaForCausalLM(LlamaConfig(**heads, **shape)).save_pretrained(folder)


def random_documents(rows: int, length: int) -> Documents:
    """Return random tokens, in documents of one length."""
    ids_T = np.random.default_rng(0).integers(1, VOCABULARY, rows).astype(np.int32)
    lengths_N = np.diff(np.append(np.arange(0, rows, length), rows))
    return Documents.contiguous(ids_T, lengths_N, np.zeros((len(lengths_N), len(COLUMNS)), np.int32), ("random",))


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["16:32:float32", "128:128:float32", "64:128:bfloat16"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=16_384)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    results = {}
    for model in args.models:
        shape = Shape.parse(model)
        with tempfile.TemporaryDirectory() as folder:
            random_model(Path(folder), args.layers, shape.width, shape.length)
            seconds = measure(Path(folder), args.layers, shape, args.rows, args.pairs)
        ratio, most, of_floor = (
            float(np.median(seconds[a] / seconds[b]))
            for a, b in (("host", "devices"), ("host", "floor"), ("floor", "devices"))
        )
        print(f"width {shape.width}, {shape.length} tokens a text, {shape.dtype}")
        for name, values in seconds.items():
            print(f"  {name:8s} {args.rows / np.median(values):12,.0f} tokens/s of all {args.layers} sites")
        print(
            f"  on the devices {ratio:.2f} times as fast as through the host, where the pass alone is {most:.2f} times "
            f"as fast; {of_floor:.0%} of the pass alone"
        )
        results[model] = dict(ratio=round(ratio, 3), most=round(most, 3), of_floor=round(of_floor, 3))
    print(json.dumps(vars(args) | dict(models=results)))


def measure(folder: Path, layers: int, shape: Shape, rows: int, pairs: int) -> dict[str, np.ndarray]:
    """Return the seconds of each way to make a buffer, one for each pair."""
    sites = [Site("resid_post", layer) for layer in range(layers)]
    part, plan = tuple(map(str, sites)), Plan(random_documents(rows, shape.length), rows, 4096, 0, 0)
    config = read_config(json.loads((folder / "config.json").read_text()), "random")
    source = resolve(ModelConfig(path=str(folder)))
    reader = DecoderReader(source, config, sites, make_mesh(), shape.dtype, shape.dtype)
    on_devices = DeviceBuffers(reader, [part], rows, shape.dtype)
    on_host = ShardBuffers(reader.widths, rows, shape.dtype)

    def devices() -> None:
        on_devices.fill(plan.batches(0))
        on_devices.norms()

    def host() -> None:
        reader.read(plan.batches(0), on_host.take)
        held_SxRxD = np.stack([on_host.read(site, np.arange(rows)) for site in part])
        jax.block_until_ready(jax.device_put(held_SxRxD))

    dropped = jax.jit(lambda params, *batch: sum(map(jnp.sum, forward(config, tuple(sites), False, params, *batch)[1])))

    def floor() -> None:
        jax.block_until_ready([dropped(reader.params, *reader.pad_batch(batch)) for batch in plan.batches(0)])

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
        np.testing.assert_array_equal(on_devices.read(site, np.arange(rows)), on_host.read(site, np.arange(rows)))
    return {name: np.array(values) for name, values in taken.items()}


if __name__ == "__main__":
    main()
