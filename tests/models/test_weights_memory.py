"""Host memory while a checkpoint is read, in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

MIB = 2**20
# Peaks are taken from the kernel's high-water mark of resident memory, which counts mapped pages of files too.
MEASURE = """
import json, sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import AxisType, Mesh
from saejax.models.families import read_config
from saejax.models.weights import load_params
from saejax.parallel.mesh import AXES

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024

folder = Path(sys.argv[1])
config = read_config(json.loads((folder / "config.json").read_text()), "config.json")
for argument in sys.argv[2:]:
    dtype, devices, layers = argument.split(",")
    mesh = Mesh(np.array(jax.devices()[: int(devices)]).reshape(1, 1, -1), AXES, axis_types=(AxisType.Auto,) * 3)
    jax.block_until_ready([jax.device_put(np.ones(8, np.float32), device) for device in mesh.devices.flat])
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to the present
    before = status("VmRSS")
    params = jax.block_until_ready(load_params(folder, config, mesh, dtype, int(layers) or None))
    peak = status("VmHWM") - before
    kept = sum(value.nbytes for value in params.values())
    shards = sum(shard.data.nbytes for value in params.values() for shard in value.addressable_shards)
    largest = max(shard.data.nbytes for value in params.values() for shard in value.addressable_shards)
    print(json.dumps(dict(kept=kept, shards=shards, largest=largest, peak=peak)))
    del params
"""


@pytest.fixture
def folder():
    """A folder that goes with the test: pytest would keep the gigabytes of three runs."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def measure(folder, *loads: str) -> list[dict[str, int]]:
    """Bytes of each load: "DTYPE,DEVICES,LAYERS" (0: all)."""
    # Freed memory goes back to the system at once, so that the second load does not take over that of the first.
    environment = os.environ | dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    environment |= dict(JAX_NUM_CPU_DEVICES="8", JAX_PLATFORMS="cpu")
    command = [sys.executable, "-c", MEASURE, str(folder), *loads]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def save_random(folder) -> int:
    """Saves a model of random bfloat16 numbers in several files; returns the number of bytes of its tensors."""
    sizes = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8)
    config = LlamaConfig(**sizes, vocab_size=20_000)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    rng, index, total, names = np.random.default_rng(0), {}, 0, list(shapes)
    for start in range(0, len(names), 20):
        file, some = f"model-{start:05d}.safetensors", names[start : start + 20]
        # 0x3c00 to 0x3cff are the bfloat16 numbers around 0.01.
        bits = {name: rng.integers(0x3C00, 0x3D00, shapes[name], dtype=np.uint16) for name in some}
        save_file({name: value.view(ml_dtypes.bfloat16) for name, value in bits.items()}, folder / file)
        index |= dict.fromkeys(some, file)
        total += sum(value.nbytes for value in bits.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=index)))
    return total


def test_reading_takes_little_more_than_what_is_kept(folder):
    size = save_random(folder)
    half, whole, spread, part = measure(folder, "bfloat16,1,0", "float32,1,0", "bfloat16,8,0", "bfloat16,1,2")
    print([(load["peak"], load["kept"]) for load in (half, whole, spread, part)])
    # The head is the largest tensor, a sixth of the model.
    assert half["kept"] == size > 100 * MIB and whole["kept"] == 2 * size and part["kept"] < 0.6 * size
    # A gauge that sees nothing would pass every upper bound; pages freed since it was set may lie below what is kept.
    assert 0.8 * half["kept"] < half["peak"]
    # Every device holds an eighth, but for the norms, which are replicated.
    assert spread["shards"] < 1.01 * size and spread["largest"] < 0.03 * size
    for load, kept in ((half, size), (whole, 2 * size), (spread, size), (part, part["kept"])):
        assert load["peak"] < 1.1 * kept + 16 * MIB
