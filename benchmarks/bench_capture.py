"""Speed of activation capture, JAX decoder against hooks in PyTorch.

Run: python -m benchmarks.bench_capture [--model smollm2] [--layer 15] [--batches 4] [--pairs 5]
Both backends' readers, the ones that `experiments.capture` uses, take three sites (resid_post, mlp_in, mlp_out) of one
layer into the buffers of a shard, and stop after the last site. They read the same batches, evenly chosen from those of
the first shard of the embedded corpus. The sides take turns in one process, so that their threads never run at once;
ratios are medians over pairs of neighbouring runs, because the speed of a shared machine drifts. Compiling is not
counted. Then the host's part alone: made-up values of ``--width`` are taken into a shard's buffers and written, on one
core, in processor time; what threads do (the copy to each row's place, checksums, the file) is told apart. Prints a
table and, last, one line of JSON. With ``--batches=0`` only the host's part is measured.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.bench_stream import random_documents
from saejax.activations.buffers import ShardBuffers
from saejax.activations.checksums import block_checksums
from saejax.activations.documents import make_documents
from saejax.activations.jax_capture import DecoderReader
from saejax.activations.plan import CapturedValues, Plan, Reader
from saejax.activations.settings import CaptureConfig
from saejax.activations.store import DTYPES as STORED_AS
from saejax.activations.store import INDEX
from saejax.activations.torch_capture import SiteReader
from saejax.activations.writer import StoreWriter
from saejax.models import source
from saejax.models.config import DecoderConfig
from saejax.models.families import read_config
from saejax.models.parameters import parameter_table
from saejax.models.settings import ModelConfig
from saejax.models.sites import Site
from saejax.parallel.mesh import make_mesh
from saejax.tasks.settings import CorpusConfig

DTYPES = ("float32", "bfloat16")
Side = tuple[str, str]  # backend and dtype


def matmul_rate(dtype: str, size: int = 2048) -> float:
    """Return the FLOP/s of a matrix product with operands of a dtype and sums in fp32."""
    a = jnp.ones((size, size), dtype)
    precision = "highest" if dtype == "float32" else "default"  # or a GPU would multiply fp32 as TF32
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32))
    return 2 * size**3 / seconds(lambda: product(a, a).block_until_ready())


def seconds(work: Callable[[], object], least: float = 0.5, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the mean seconds of ``work()`` by a clock, repeated for at least ``least`` seconds."""
    start, count = clock(), 0
    while count == 0 or clock() - start < least:
        work()
        count += 1
    return (clock() - start) / count


def flops_per_token(config: DecoderConfig, layers: int) -> float:
    """Return the FLOPs of products with the layers' weights; attention scores, a few per cent more, are left out."""
    matrices = [
        np.prod(shape[1:])
        for name, (shape, _) in parameter_table(config).items()
        if name.startswith("layers.") and len(shape) > 2
    ]
    return 2.0 * layers * float(sum(matrices))


class Capture:
    """The work of both backends.

    Args:
      model: as ``--model.path``.
      layer: whose sites are captured.
      batches: how many are read in a run.
      batch_tokens: tokens of a batch.
    """

    def __init__(self, model: str, layer: int, batches: int, batch_tokens: int):
        model_source = source.resolve(ModelConfig(path=model))
        self.config = read_config(source.read_model_config(model_source.folder), model)
        self.sites = tuple(Site(kind, layer).check(self.config) for kind in ("resid_post", "mlp_in", "mlp_out"))
        documents = make_documents(CorpusConfig(), source.load_tokenizer(model_source), self.config.context)
        plan = Plan(documents, CaptureConfig().shard_rows, batch_tokens, last=0, seed=CorpusConfig().seed)
        whole = plan.batches(0)
        self.batches = [whole[int(i)] for i in np.linspace(0, len(whole) - 2, batches)]  # the last one is not full
        self.tokens = sum(batch.rows for batch in self.batches)
        widths = {site: site.width(self.config) for site in self.sites}
        self._buffers = ShardBuffers(widths, plan.size(0), "bfloat16")
        self.readers: dict[Side, Reader] = {}
        for dtype in DTYPES:
            torch_model = source.load_torch_model(model_source, dtype)
            self.readers["torch", dtype] = SiteReader(torch_model, self.sites, "bfloat16")
            self.readers["jax", dtype] = DecoderReader(
                model_source, self.config, self.sites, make_mesh(), dtype, "bfloat16"
            )

    def run(self, side: Side) -> float:
        """Return the tokens per second of one run over all batches."""
        start = time.perf_counter()
        self.readers[side].read(self.batches, self._buffers.take)
        return self.tokens / (time.perf_counter() - start)


def measure_capture(capture: Capture, pairs: int) -> tuple[dict[Side, np.ndarray], dict[str, np.ndarray]]:
    """Return tokens per second of every side, and FLOP/s of a matrix product of every dtype, [pairs] each."""
    for side in capture.readers:
        capture.run(side)  # compiles, and touches all memory
    speeds: dict[Side, list[float]] = {side: [] for side in capture.readers}
    rates: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    for pair in range(pairs):
        for dtype in DTYPES:
            order = ("torch", "jax") if pair % 2 else ("jax", "torch")
            for backend in order:
                speeds[backend, dtype].append(capture.run((backend, dtype)))
            rates[dtype].append(matmul_rate(dtype))
    return {side: np.array(values) for side, values in speeds.items()}, {k: np.array(v) for k, v in rates.items()}


def measure_host(width: int, length: int, rows: int = 16_384, dtype: str = "bfloat16") -> dict[str, float]:
    """Return processor time of storing a shard of one site, on one core.

    Args:
      width: of the site.
      length: tokens of each document.
      rows: rows of the shard.
      dtype: "float32" or "bfloat16", as stored.

    Returns:
      "main": microseconds a token of the thread that runs the model; "copy": of copying rows to their places, in
      threads; "copy_gb_s", "checksum_gb_s" and "write_gb_s": rates of what threads do, the last with the checksums.
    """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    site, plan = Site("resid_post", 0), Plan(random_documents(rows, length), rows, 4096, 0, 0)
    buffers, batches = ShardBuffers({site: width}, rows, dtype), plan.batches(0)
    rng = np.random.default_rng(0)
    vectors_BxTxD = rng.standard_normal((4096 // length, length, width), np.float32).astype(STORED_AS[dtype])
    norms_BxT = np.linalg.norm(vectors_BxTxD.astype(np.float32), axis=-1)
    values = CapturedValues([vectors_BxTxD], norms_BxT, np.zeros((len(norms_BxT), width), np.float32))

    def take() -> tuple[float, float]:
        """Return processor time of this thread, and of all threads."""
        start, start_all = time.thread_time(), time.process_time()
        for batch in batches:
            buffers.take(batch, site, values)
        in_main = time.thread_time() - start
        buffers.read(str(site), np.zeros(1, int))  # waits for the threads
        return in_main, time.process_time() - start_all

    take()  # touches all memory
    main, in_all = np.median([take() for _ in range(5)], axis=0)
    shard = buffers.shard(str(site), rows)
    content = memoryview(shard.vectors_RxD).cast("B")
    checksum = seconds(lambda: block_checksums(content), clock=time.process_time)
    with tempfile.TemporaryDirectory() as folder:
        writer = StoreWriter(Path(folder), plan, {str(site): width}, dtype, {INDEX: "", str(site): ""})
        write = seconds(lambda: writer.write_site(str(site), 0, shard), clock=time.process_time)
    size = len(content) / 1e9
    return dict(
        main=1e6 * main / rows,
        copy=1e6 * (in_all - main) / rows,
        copy_gb_s=size / (in_all - main),
        checksum_gb_s=size / checksum,
        write_gb_s=size / write,
    )


def report_host(width: int) -> dict[str, float]:
    """Print the host's part, and return that of texts of 1,024 tokens."""
    figures = {}
    for length in (1024, 128):
        figures[length] = host = measure_host(width, length)
        print(
            f"Host, one core, width {width:,} in bfloat16, texts of {length:,} tokens: {host['main']:.3f} microseconds "
            f"a token and site; in threads {host['copy']:.2f} more to copy rows ({host['copy_gb_s']:.1f} GB/s), "
            f"checksums {host['checksum_gb_s']:.1f} GB/s, checksums and file {host['write_gb_s']:.1f} GB/s"
        )
    return {name: round(value, 3) for name, value in figures[1024].items()}


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch_tokens", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--width", type=int, default=2560)
    args = parser.parse_args()
    if not args.batches:
        return print(json.dumps(dict(bench="capture", host=report_host(args.width))))
    capture = Capture(args.model, args.layer, args.batches, args.batch_tokens)
    speeds, rates = measure_capture(capture, args.pairs)
    best = {backend: max(DTYPES, key=lambda dtype: np.median(speeds[backend, dtype])) for backend in ("jax", "torch")}
    ratio = {
        "fp32": np.median(speeds["jax", "float32"] / speeds["torch", "float32"]),
        "best": np.median(speeds["jax", best["jax"]] / speeds["torch", best["torch"]]),
    }
    work = flops_per_token(capture.config, args.layer + 1)
    print(f"Capture of {', '.join(map(str, capture.sites))} of {args.model}, {capture.tokens:,} tokens")
    print(f"{'backend':8} {'dtype':9} {'tokens/s':>9} {'of the matmul rate':>20}")
    for (backend, dtype), values in sorted(speeds.items()):
        share = np.median(values * work / rates[dtype])
        print(f"{backend:8} {dtype:9} {np.median(values):9,.0f} {share:20.0%}")
    for dtype in DTYPES:
        print(f"matrix products, {dtype}: {np.median(rates[dtype]) / 1e9:,.0f} GFLOP/s")
    print(f"JAX to torch: {ratio['fp32']:.2f} in fp32; {ratio['best']:.2f} for {best['jax']} to {best['torch']}")
    rounded = {name: round(float(value), 2) for name, value in ratio.items()}
    print(json.dumps(dict(bench="capture", ratio=rounded, host=report_host(args.width))))


if __name__ == "__main__":
    main()
