"""Host memory that a large set of transcoders takes when a long prompt is traced.

Run: python -m benchmarks.bench_large_set [--layers 36] [--features 16384] [--tokens 2048] [--rows 64] [--folder DIR]
The set is circuit-tracer's form in bfloat16: by default a tenth of the 36 x 163,840 features of Qwen3-4B's, 6 GB of
files, TopK with 64 active features at each position. The model has as many layers of its width, 2,560, and little else.
Its weights, what is kept of the set, streams and directions are on the device, which here is the host's processor; all
that the process has beside those is what a host with an accelerator would need. Both are sampled while the graph is
made. The floor on the host is the rows of the graph and one transcoder. Prints a table and, last, one line of JSON.
"""

import argparse
import json
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import psutil
import yaml
from safetensors.numpy import save_file

import saejax
from saejax.attribution.trace.prompt import trace_prompt

WIDTH, ACTIVE, VOCAB = 2560, 64, 1000
EVERY = 0.05  # seconds between two looks
GB = 1e9


def write_set(folder: Path, layers: int, features: int) -> None:
    """Return a circuit-tracer set of random directions, one layer at a time."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for layer in range(layers):
        arrays = {
            name: (rng.standard_normal((features, WIDTH), np.float32) / np.sqrt(WIDTH)).astype(ml_dtypes.bfloat16)
            for name in ("W_enc", "W_dec")
        }
        arrays |= dict(b_enc=np.zeros(features, ml_dtypes.bfloat16), b_dec=np.zeros(WIDTH, ml_dtypes.bfloat16))
        save_file(arrays, folder / f"layer_{layer}.safetensors")
    settings = dict(model_name="random", model_kind="transcoder_set", activation="topk", k=ACTIVE)
    settings |= dict(feature_input_hook="mlp.hook_in", feature_output_hook="hook_mlp_out")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))


def write_model(folder: Path, layers: int, tokens: int) -> None:
    """Return a random Qwen3 of that width, with two heads and a narrow MLP."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=2 * tokens, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)


class Watch:
    """Peaks of a process's memory, of its device arrays, and of the rest, sampled in a thread.

    Memory-mapped files are not counted: the system drops their pages when it needs room.
    """

    def __init__(self) -> None:
        self.process = self.devices = self.host = 0.0
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        this_process = psutil.Process()
        while not self._stop.wait(EVERY):
            devices = sum(array.nbytes for array in jax.live_arrays()) / GB
            memory = this_process.memory_info()
            process = (memory.rss - memory.shared) / GB
            self.process, self.devices = max(self.process, process), max(self.devices, devices)
            self.host = max(self.host, process - devices)


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--features", type=int, default=16_384)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=64, help="features that get a row")
    parser.add_argument(
        "--folder", type=Path, help="where the set is written, which is removed; default: a temporary one"
    )
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        write_set(folder / "set", args.layers, args.features)
        write_model(folder / "model", args.layers, args.tokens)
        measured = measure(folder, args.tokens, args.rows)
    finally:
        shutil.rmtree(folder)
    size = args.layers * args.features * WIDTH * 2 * 2 / GB
    print(
        f"set {size:.1f} GB in bfloat16, {args.tokens:,} tokens, {measured['active']:,} active features, "
        f"{args.rows} rows"
    )
    print(
        f"  peak of the process {measured['process_gb']:.1f} GB, of that device arrays {measured['device_gb']:.1f} GB"
    )
    print(f"  peak of host memory without device arrays {measured['host_gb']:.1f} GB; {measured['seconds']:.0f} s")
    print(json.dumps(dict(set_gb=round(size, 2), tokens=args.tokens, rows=args.rows, **measured)))


def measure(folder: Path, tokens: int, rows: int) -> dict[str, Any]:
    """Trace a prompt of random tokens."""
    model = saejax.load_model(str(folder / "model"))
    prompt = np.random.default_rng(1).integers(1, VOCAB, tokens)
    start = time.perf_counter()
    with Watch() as watch:
        graph, *_ = trace_prompt(model, folder / "set", prompt, max_features=rows, max_logits=3, logit_mass=1.0)
    return dict(
        active=graph.settings["active_features"],
        process_gb=round(watch.process, 2),
        device_gb=round(watch.devices, 2),
        host_gb=round(watch.host, 2),
        seconds=round(time.perf_counter() - start, 1),
    )


if __name__ == "__main__":
    main()
